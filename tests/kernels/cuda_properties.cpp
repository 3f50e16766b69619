// Properties of the GPU kernels on a CPU, for sanitizers: random layers of every width and kind, every
// way of multiplying, buffers of exactly the size that a call may touch, threads in two orders.
//
//   cuda_properties [BITS]    one width or all; prints those it ran, one a line, or the case that
//                             failed on stderr, with status 1
#include "random_layers.h"

#include "emulated_cuda.h"
#include "emulated_modules.h"
#include "rounding_properties.h"

using namespace lwquant;
using namespace lwquant::gpu;

namespace {

// Exactly n bytes, aligned as cudaMalloc's are, without anything useful in them.
struct DeviceBytes {
  std::unique_ptr<uint8_t, void (*)(void*)> data;
  explicit DeviceBytes(int64_t n) : data(nullptr, free) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, static_cast<size_t>(n))) abort();
    memset(memory, 0xff, static_cast<size_t>(n));
    data.reset(static_cast<uint8_t*>(memory));
  }
  uint8_t* get() const { return data.get(); }
};

// (n,) numbers of one of the caller's types.
struct Numbers {
  Float type;
  int64_t n;
  DeviceBytes bytes;
  Numbers(Float type, int64_t n)
      : type(type), n(n), bytes(n * (type == kFloat32 ? 4 : 2)) {}
  void* get() const { return bytes.get(); }
  void set(int64_t k, float v) { store(k, v); }
  double at(int64_t k) const {
    if (type == kFloat32) return reinterpret_cast<const float*>(bytes.get())[k];
    const uint32_t bits = reinterpret_cast<const uint16_t*>(bytes.get())[k];
    return type == kFloat16 ? half_to_float(static_cast<uint16_t>(bits)) : float_of(bits << 16);
  }
  double unit() const {  // of the last place, of numbers near 1
    return type == kFloat32 ? 0x1p-24 : type == kFloat16 ? 0x1p-11 : 0x1p-8;
  }
  double smallest() const { return type == kFloat16 ? 0x1p-24 : 0; }
  double largest() const { return type == kFloat16 ? 65504 : 3e38; }

 private:
  void store(int64_t k, float v) {
    if (type == kFloat32) {
      reinterpret_cast<float*>(bytes.get())[k] = v;
      return;
    }
    const uint16_t pattern = type == kFloat16 ? float_as_half(v) : float_as_bfloat(v);
    reinterpret_cast<uint16_t*>(bytes.get())[k] = pattern;
  }
};

struct Gpu {
  gpu::Module module;
  int n_multiprocessors;
};

// Whether all blocks run at a time, and would not if there were twice as many warps or one split
// more; as far as a block may be that small and a split that short.
void check_plan(const Layer& l, const Gpu& gpu, const Tiles& tiles, int64_t n_tokens,
                const Plan& plan) {
  const int64_t warps = int64_t{emulated_modules::kResidentThreads / kWarp} * gpu.n_multiprocessors;
  const int64_t n_tiles = tiles.n_tiles;
  if (plan.many) {
    const int own = n_tokens > 32 ? 8 : 4;  // tiles and warps of a block
    const int64_t blocks = plan.n_layouts * ((n_tiles + own - 1) / own);
    const bool fits = blocks * plan.n_splits * own <= warps;
    const bool more_would = blocks * (plan.n_splits + 1) * own <= warps;
    const bool may_be_more = plan.n_splits < kMostSplits && plan.n_splits < plan.n_chunks;
    if ((!fits && plan.n_splits > 1) || (more_would && may_be_more)) fail(l.is, "splits are off");
    return;
  }
  const auto fit = [&](int n_warps) {
    const int each = emulated_modules::kResidentThreads / (n_warps * kWarp);
    return n_tiles <= int64_t{each} * gpu.n_multiprocessors;
  };
  const int most = std::min(kMostFewWarps, (plan.n_chunks + 1) / 2);
  const bool fewest = plan.n_warps <= kMostFewWarps >> (kFewSizes - 1);
  if (!fit(plan.n_warps) && !fewest) fail(l.is, "blocks of one token are too large");
  if (plan.n_warps < most && fit(2 * plan.n_warps)) fail(l.is, "blocks of one token are too small");
}

// One call, in the one order of threads.
void run(const Layer& l, const OwnTiles& own, const Gpu& gpu, const Numbers& x, int64_t n_tokens,
         const Numbers& bias, emulated::Order order, Numbers& y) {
  emulated::machine().order = order;
  const Plan plan = make_plan(gpu.module, own.tiles, n_tokens);
  check_plan(l, gpu, own.tiles, n_tokens, plan);
  const DeviceBytes workspace(plan.workspace_bytes);
  const Call call = {own.data.get(), x.get(),  x.type, n_tokens,        bias.get(),
                     bias.type,      y.get(), y.type, workspace.get(), nullptr};
  if (const char* error = multiply(gpu.module, own.tiles, plan, call)) fail(l.is, error);
}

// x as the CPU's integers say, (n_tokens, in_features).
std::vector<double> rounded(const Layer& l, const Gpu& gpu, const Numbers& x, int64_t n_tokens) {
  const int64_t in = l.is.in_features, size = gpu.module.span_blocks * kBlockInputs;
  std::vector<double> result(static_cast<size_t>(n_tokens * in));
  for (int64_t t = 0; t < n_tokens; ++t) {
    for (int64_t first = 0; first < in; first += size) {
      const int64_t n = in - first < size ? in - first : size;
      float span[kMaxSpanBlocks * kBlockInputs];
      int16_t q[kMaxSpanBlocks * kBlockInputs];
      for (int64_t k = 0; k < n; ++k) span[k] = static_cast<float>(x.at(t * in + first + k));
      const int bits = gpu.module.activation_bits;
      uint8_t* quads = reinterpret_cast<uint8_t*>(q);
      const Span found = kReference.quantize_span(span, n, size, bits, quads);
      for (int64_t k = 0; k < n; ++k) {
        const int value = bits == 8 ? static_cast<int8_t>(quads[k]) : q[k];
        result[static_cast<size_t>(t * in + first + k)] = double{found.scale} * value;
      }
    }
  }
  return result;
}

void check_product(const Layer& l, const OwnTiles& own, const Gpu& gpu, int64_t n_tokens,
                   Float type, Random& random) {
  const int64_t in = l.is.in_features, out = l.is.out_features;
  Numbers x(type, n_tokens * in), y(type, n_tokens * out), again(type, n_tokens * out);
  Numbers bias(static_cast<Float>(random.below(3)), out);
  const float factor = type != kFloat32                ? 1.0f
                       : l.is.values == Values::kTiny ? 1e-41f
                       : l.is.values == Values::kHuge ? 1e27f
                                                      : 1.0f;
  for (int64_t k = 0; k < x.n; ++k) {
    const bool full = l.is.values == Values::kSaturating;
    x.set(k, full ? (k % 3 ? 1.0f : -1.0f) : random.symmetric() * factor);
  }
  for (int64_t r = 0; r < out; ++r) bias.set(r, l.bias[r]);
  run(l, own, gpu, x, n_tokens, bias, emulated::Order::kForward, y);
  run(l, own, gpu, x, n_tokens, bias, emulated::Order::kBackward, again);
  const size_t n_bytes = static_cast<size_t>(y.n) * (type == kFloat32 ? 4 : 2);
  if (memcmp(y.get(), again.get(), n_bytes) != 0) fail(l.is, "the order of threads matters");

  // Two bounds. From the product with the activations as the CPU rounds them: float32 arithmetic,
  // at most one addition a span and one for each warp, split and half, three roundings before them.
  // From the product with x: half a step of the group's largest more for each weight.
  const std::vector<double> integers = rounded(l, gpu, x, n_tokens);
  for (int64_t t = 0; t < n_tokens; ++t) {
    std::vector<double> largest(static_cast<size_t>(l.n_groups), 0x1p-100);
    for (int64_t k = 0; k < in; ++k) {
      double& most = largest[static_cast<size_t>(k / l.is.group_size)];
      most = fmax(most, fabs(x.at(t * in + k)));
    }
    for (int64_t r = 0; r < out; ++r) {
      double exact = bias.at(r), of_rounded = exact, size = fabs(exact), steps = 0;
      for (int64_t k = 0; k < in; ++k) {
        const size_t group = static_cast<size_t>(k / l.is.group_size);
        const size_t own_group = static_cast<size_t>(r * l.n_groups) + group;
        const double scale = l.scales[own_group], zero = l.zeros[own_group];
        const double code = l.codes[static_cast<size_t>(r * in + k)];
        const double value = integers[static_cast<size_t>(t * in + k)];
        exact += x.at(t * in + k) * (code - zero) * scale;
        of_rounded += value * (code - zero) * scale;
        size += fabs(value) * (code + zero) * scale;
        steps += 0.51 * largest[group] / largest_activation(gpu.module.activation_bits) *
                 fabs(code - zero) * scale;
      }
      const double additions = static_cast<double>(in) / 32 + 40;
      const double float32 = additions * 0x1p-24 * size + static_cast<double>(in) * 0x1p-120;
      const double got = y.at(t * out + r);
      if (fabs(of_rounded) + float32 >= y.largest()) {
        if (!isinf(got) && fabs(got) < 0.9 * y.largest()) fail(l.is, "an overflow was lost");
        continue;
      }
      const double last = y.unit() * (fabs(of_rounded) + float32) + y.smallest();
      if (!(fabs(got - of_rounded) <= float32 + last)) fail(l.is, "a product is off");
      if (!(fabs(got - exact) <= steps + float32 + last)) fail(l.is, "activations are off");
    }
  }
}

// A token with NaN or infinity has NaN for outputs, the others do not notice.
void check_not_finite(const Layer& l, const OwnTiles& own, const Gpu& gpu, int64_t n_tokens,
                      Random& random) {
  const int64_t in = l.is.in_features, out = l.is.out_features;
  Numbers x(kFloat32, n_tokens * in), y(kFloat32, n_tokens * out), other(kFloat32, n_tokens * out);
  Numbers bias(kFloat32, out);
  for (int64_t k = 0; k < x.n; ++k) x.set(k, random.symmetric());
  for (int64_t r = 0; r < out; ++r) bias.set(r, 0.0f);
  run(l, own, gpu, x, n_tokens, bias, emulated::Order::kForward, y);
  const int64_t bad = random.below(n_tokens);
  x.set(bad * in + random.below(in), random.below(2) ? INFINITY : NAN);
  run(l, own, gpu, x, n_tokens, bias, emulated::Order::kForward, other);
  for (int64_t k = 0; k < y.n; ++k) {
    const double got = other.at(k);
    if (k / out == bad ? !isnan(got) : got != y.at(k)) fail(l.is, "NaN goes astray");
  }
}

void check_weight(const Layer& l, const OwnTiles& own, const Gpu& gpu, Float type, Random& random) {
  const int64_t in = l.is.in_features;
  const int64_t first_tile = random.below(own.tiles.n_tiles), row = first_tile * kTileOutputs;
  const int64_t n_rows = 1 + random.below(l.is.out_features - row);
  Numbers weight(type, n_rows * in);
  if (const char* error = gpu::dequantize(gpu.module, own.tiles, own.data.get(), first_tile, n_rows,
                                          weight.get(), type, nullptr)) {
    fail(l.is, error);
  }
  for (int64_t k = 0; k < weight.n; ++k) {
    const double wanted = l.at(row + k / in, k % in), got = weight.at(k);
    if (type == kFloat32) {
      const size_t group =
          static_cast<size_t>((row + k / in) * l.n_groups + k % in / l.is.group_size);
      const float code = l.codes[static_cast<size_t>(row * in + k)];
      const float exact =
          (code - static_cast<float>(l.zeros[group])) * static_cast<float>(l.scales[group]);
      if (got != exact) fail(l.is, "a weight differs from the CPU's");
    }
    if (fabs(wanted) > weight.largest()) {
      if (!isinf(got) && fabs(got) != weight.largest()) fail(l.is, "a weight's overflow was lost");
      continue;
    }
    const double bound = fabs(wanted) * (weight.unit() + 0x1p-23) + weight.smallest() / 2;
    if (!(fabs(got - wanted) <= bound)) fail(l.is, "a weight is off");
  }
}

void check(const Case& c, int span, int64_t number, Random& random) {
  const Layer l(c, random);
  const OwnTiles own(l);
  const int planes = emulated_modules::planes_of(c.bits, span);
  Gpu gpu{};
  const int machines[] = {1, 3, 132};
  gpu.n_multiprocessors = machines[number % 3];
  const void* image = emulated_modules::module_for(c.bits, planes, span);
  if (!image) fail(c, "no kernels were compiled");
  // The context of no GPU is current, or that of the other one.
  const Driver& driver = emulated_modules::driver();
  const int device = static_cast<int>(number % 2);
  void *before = nullptr, *after = nullptr;
  if (number % 3) driver.retain_context(&before, 1 - device);
  driver.set_context(before);
  if (const char* error =
          load_module(driver, device, image, c.bits, 8 * planes, span, gpu.n_multiprocessors,
                      &gpu.module)) {
    fail(c, error);
  }
  // One of those that each kernel takes; the others in other cases.
  const int64_t many[] = {2, 3, 8, 9, 16}, most[] = {17, 33, 64, 65, 130};
  const auto check_with = [&](int64_t n_tokens) {
    check_product(l, own, gpu, n_tokens, static_cast<Float>(random.below(3)), random);
  };
  check_with(1);
  const bool small = c.out_features * c.in_features < 10000;
  check_with(small && number % 2 ? most[random.below(5)] : many[random.below(5)]);
  if (small) check_not_finite(l, own, gpu, 1 + random.below(4), random);
  for (const Float type : {kFloat32, kFloat16, kBfloat16}) check_weight(l, own, gpu, type, random);
  driver.get_context(&after);
  if (after != before) fail(c, "another context is left behind");
}

}  // namespace

int main(int n_arguments, char** arguments) {
  running = "CUDA";
  const int only = n_arguments > 1 ? atoi(arguments[1]) : 0;
  Random random{1};
  int64_t number = 0;
  const int64_t shapes[][2] = {{1, 1}, {16, 32}, {33, 700}, {70, 129}, {64, 320}, {5, 576}, {210, 40}};
  for (int bits = 2; bits <= 8; ++bits) {
    if (only && bits != only) continue;
    for (const int span : emulated_modules::kSpans) {
      for (const auto& shape : shapes) {
        // Groups whose longest span is this one.
        const int64_t in = shape[1], size = span * kBlockInputs;
        const int64_t groups[] = {size, span == 4 ? in : 3 * size};
        const int64_t group_size = groups[random.below(2)];
        if (span != 4 && group_size >= in) continue;
        const Case c = {bits,
                        shape[0],
                        in,
                        group_size < in ? group_size : in,
                        random.below(2) == 1,
                        static_cast<Zeros>(number % 3),
                        0,
                        static_cast<Values>(random.below(4))};
        check(c, span, number++, random);
      }
    }
    check_rounding(bits, random);
    printf("%d\n", bits);
  }
  return 0;
}
