// Properties of the kernels without Python, for sanitizers and emulated processors: every
// instruction set of this machine, random layers of every width and kind, buffers of exactly the
// size that a call may touch.
//
//   kernel_properties [N]    every Nth case; prints the instruction sets it ran, one a line, or the
//                            case that failed on stderr, with status 1
#include "random_layers.h"
#include "workspace.h"

#ifdef LWQUANT_EMULATE_AMX
#include "emulated_amx.h"
#endif

using namespace lwquant;

namespace {

// What a call rounds weights and inputs to.
enum class Rounded { kNothing, kBf16, kInt8 };

Rounded rounded_to(const Layer& l, int64_t n_tokens, int activation_bits, bool bf16_inputs) {
  const PanelKernels* panels = panel_kernels(l.is.bits, l.weight.int8_weights, n_tokens,
                                             activation_bits, bf16_inputs);
  if (!panels) return Rounded::kNothing;
  return strcmp(panels->type, "int8") == 0 ? Rounded::kInt8 : Rounded::kBf16;
}

// The largest weight that codes may stand for among the 256 inputs that share an int8 step.
double reach(const Layer& l, int64_t row, int64_t input) {
  double found = 0;
  const int64_t first = input / 256 * 256;
  for (int64_t k = first; k < first + 256 && k < l.is.in_features; ++k) {
    const size_t group = static_cast<size_t>(row * l.n_groups + k / l.is.group_size);
    const double highest = (1 << l.is.bits) - 1 - l.zeros[group];
    found = fmax(found, l.scales[group] * fmax(l.zeros[group], highest));
  }
  return found;
}

// Whether y is what the layer makes of x, up to what its roundings may change; `place` is what the
// last place of a result is worth.
void check_results(const Layer& l, const Exact<float>& x, const Exact<float>& y, int64_t n_tokens,
                   int bits, Rounded to, double place) {
  const int64_t in = l.is.in_features, out = l.is.out_features;
  double errors = 0, products = 0;  // squares: roundings of different products do not add up
  for (int64_t t = 0; t < n_tokens; ++t) {
    double largest = 0x1p-100;
    for (int64_t k = 0; k < in; ++k) largest = fmax(largest, fabs(x[t * in + k]));
    for (int64_t r = 0; r < out; ++r) {
      double exact = l.bias[r], step = 0, size = fabs(l.bias[r]), rounded = 0, int8_step = 0;
      for (int64_t k = 0; k < in; ++k) {
        const size_t group = static_cast<size_t>(r * l.n_groups + k / l.is.group_size);
        const double value = x[t * in + k], weight = l.at(r, k);
        exact += value * weight;
        step += fabs(weight);
        size += fabs(value) * (l.codes[static_cast<size_t>(r * in + k)] + l.zeros[group] + 1) *
                (l.scales[group] + 1);
        // Half a step of bf16's 8 bits each; a weight is found as (256 + code) - (256 + zero).
        const double base = fabs(weight - l.outliers[static_cast<size_t>(r * in + k)]);
        double of_weight = 0x1p-8 * base + 0x1p-14 * l.scales[group];
        double of_input = 0x1p-8 * fabs(value) + 0x1p-126;
        if (to == Rounded::kInt8) {
          if (k % 256 == 0) int8_step = reach(l, r, k) / 127;
          // Half, and what sixteen bits lose in between: of a factor's fraction they keep eight bits
          // up to 6-bit codes.
          const double lost = l.is.bits <= 6 ? ((1 << l.is.bits) - 1) / 512.0 : 0;
          of_weight = (0.51 + lost) * int8_step;
          of_input = 0.51 * largest / 127;
        }
        rounded += (fabs(value) + of_input) * of_weight + base * of_input;
        products += pow(value * (base + 0x1p-6 * l.scales[group]), 2);
      }
      const double half_step = 0.51 * largest / largest_activation(bits);
      double bound = (to != Rounded::kNothing ? rounded : half_step * step) +
                     static_cast<double>(in + 32) * 0x1p-24 * size;
      bound += place / 2 * (fabs(exact) + bound + 0x1p-126);
      if (!(fabs(y[t * out + r] - exact) <= bound)) fail(l.is, "linear is off");
      errors += pow(y[t * out + r] - exact, 2);
      products += pow(0x1p-16 * size, 2);
    }
  }
  if (to == Rounded::kBf16 && l.is.values == Values::kUsual && errors > 0x1p-13 * products) {
    fail(l.is, "linear is off on average");
  }
}

// The same inputs in bf16 give the same results, rounded, or those of another way to compute them.
void check_bf16(const Layer& l, const Tiles& tiles, const Exact<float>& x, int64_t n_tokens,
                int bits) {
  const int64_t out = l.is.out_features;
  Exact<uint16_t> narrow(x.size()), y(n_tokens * out), expected(n_tokens * out);
  Exact<float> wide(x.size()), of_wide(n_tokens * out);
  narrow_to_bf16(x.get(), x.size(), narrow.get());
  widen_bf16(narrow.get(), x.size(), wide.get());
  const Outliers& outliers = l.weight.outliers;
  if (!linear(tiles, outliers, l.bias.get(), narrow.get(), n_tokens, bits, 3, y.get()) ||
      !linear(tiles, outliers, l.bias.get(), wide.get(), n_tokens, bits, 1, of_wide.get())) {
    fail(l.is, "linear refused finite inputs");
  }
  const Rounded to = rounded_to(l, n_tokens, bits, true);
  if (to == rounded_to(l, n_tokens, bits, false)) {
    narrow_to_bf16(of_wide.get(), of_wide.size(), expected.get());
    const size_t n_bytes = sizeof(uint16_t) * static_cast<size_t>(y.size());
    if (memcmp(y.get(), expected.get(), n_bytes) != 0) fail(l.is, "bf16 is not rounded float32");
  } else {
    widen_bf16(y.get(), y.size(), of_wide.get());
    check_results(l, wide, of_wide, n_tokens, bits, to, 0x1p-7);
  }
}

void check_linear(const Layer& l, const Tiles& tiles, int64_t n_tokens, int bits, Random& random) {
  const int64_t in = l.is.in_features, out = l.is.out_features;
  Exact<float> x(n_tokens * in), y(n_tokens * out), again(n_tokens * out);
  const float factor = l.is.values == Values::kTiny   ? 1e-41f
                       : l.is.values == Values::kHuge ? 1e27f
                                                      : 1.0f;
  for (int64_t k = 0; k < x.size(); ++k) {
    x[k] = l.is.values == Values::kSaturating ? (k % 2 ? 1.0f : -1.0f) : random.symmetric() * factor;
  }
  if (!linear(tiles, l.weight.outliers, l.bias.get(), x.get(), n_tokens, bits, 1, y.get()) ||
      !linear(tiles, l.weight.outliers, l.bias.get(), x.get(), n_tokens, bits, 3, again.get())) {
    fail(l.is, "linear refused finite inputs");
  }
  if (memcmp(y.get(), again.get(), sizeof(float) * static_cast<size_t>(y.size())) != 0) {
    fail(l.is, "three threads give another result");
  }
  const Rounded to = rounded_to(l, n_tokens, bits, false);
  const bool in_bf16 = to == Rounded::kBf16;
  check_results(l, x, y, n_tokens, bits, to, 0);
  check_bf16(l, tiles, x, n_tokens, bits);
  memset(&x[x.size() - 1], 0xff, sizeof(float));  // NaN of all bits, which adding to them would lose
  const bool took_it = linear(tiles, l.weight.outliers, nullptr, x.get(), n_tokens, bits, 1, y.get());
  if (took_it != in_bf16) fail(l.is, "linear and its rule differ on NaN");
  if (in_bf16 && !isnan(y[y.size() - 1])) fail(l.is, "linear lost NaN");
}

void check(const Case& c, Random& random) {
  const Layer l(c, random);
  Exact<uint8_t> codes(c.in_features);
  for (int64_t r = 0; r < c.out_features; ++r) {
    current_isa().unpack_row(c.bits, l.words.get() + r * l.weight.row_words, c.in_features,
                             codes.get());
    if (memcmp(codes.get(), l.codes.data() + r * c.in_features,
               static_cast<size_t>(c.in_features)) != 0) {
      fail(c, "unpack_row is off");
    }
  }
  Exact<float> dense(c.out_features * c.in_features);
  dequantize(l.weight, 0, c.out_features, 1, dense.get());
  check_dequantized(l, dense.get(), "dequantize is off");
  if (!tiles_fit(l.weight)) return;

  const OwnTiles own(l);
  const Tiles& tiles = own.tiles;
  Exact<int32_t> words(l.words.size());
  Exact<uint8_t> scales(c.scale_bytes ? l.bytes.size() : 2 * l.halves.size());
  Exact<uint8_t> zeros(l.n_groups * c.out_features);
  unmake_tiles(tiles, 1, words.get(), scales.get(), c.zeros == Zeros::kNone ? nullptr : zeros.get());
  const void* stored = c.scale_bytes ? static_cast<const void*>(l.bytes.get()) : l.halves.get();
  if (memcmp(words.get(), l.words.get(), 4 * static_cast<size_t>(words.size())) != 0 ||
      memcmp(scales.get(), stored, static_cast<size_t>(scales.size())) != 0) {
    fail(c, "tiles do not give back the stored layer");
  }
  Exact<float> from_tiles(dense.size());
  dequantize_tiles(tiles, l.weight.outliers, 0, c.out_features, 1, from_tiles.get());
  check_dequantized(l, from_tiles.get(), "dequantize_tiles is off");
  for (const int64_t n_tokens : {1, 2, 3, 4, 5, 8, 67}) {
    if (n_tokens > 8 && c.out_features * c.in_features > 8000) continue;
    for (const int bits : {8, 16}) check_linear(l, tiles, n_tokens, bits, random);
  }
}

// More inputs than bf16 takes at a time, more bytes of them than integer kernels do. It takes
// minutes on an emulated processor.
void check_many_inputs(Random& random) {
  const int64_t shapes[][2] = {{18, 4097}, {18, 9000}, {270, 1100}};  // the last for threads
  for (const auto& shape : shapes) {
    const Case c = {4, shape[0], shape[1], 96, false, Zeros::kWhole, 7, Values::kUsual};
    Layer l(c, random);
    for (const bool int8_weights : {false, true}) {
      l.weight.int8_weights = int8_weights;
      const OwnTiles own(l);
      check_linear(l, own.tiles, 65, 8, random);
    }
  }
}

// Rounding on this instruction set against the portable one: equal, as both do the same steps.
void check_rounding(Random& random) {
  const Case none = {0, 0, 0, 0, false, Zeros::kNone, 0, Values::kUsual};
  for (const int64_t n_rows : {1, 16, 64, 67}) {
    const int64_t n_columns = 1 + random.below(40);
    Exact<float> targets(n_columns * n_rows), same(n_columns * n_rows);
    Exact<float> feedback(n_columns * n_columns), scales(n_columns * n_rows);
    Exact<float> zeros(n_columns * n_rows), errors(n_columns * n_rows), others(n_columns * n_rows);
    for (int64_t k = 0; k < targets.size(); ++k) {
      targets[k] = same[k] = random.symmetric();
      scales[k] = 0.1f + fabsf(random.symmetric()), zeros[k] = static_cast<float>(random.below(8));
    }
    for (int64_t k = 0; k < feedback.size(); ++k) feedback[k] = 0.1f * random.symmetric();
    ColumnBlock block = {targets.get(), feedback.get(), n_columns,    nullptr, scales.get(),
                         zeros.get(),   errors.get(),   7.0f,         n_columns, n_rows};
    current_isa().rounding->round_rows(block, 0, n_rows < kLanes ? n_rows : kLanes);
    if (n_rows > kLanes) current_isa().rounding->round_rows(block, kLanes, n_rows - kLanes);
    block.targets = same.get(), block.errors = others.get();
    kReferenceRounding.round_rows(block, 0, n_rows < kLanes ? n_rows : kLanes);
    if (n_rows > kLanes) kReferenceRounding.round_rows(block, kLanes, n_rows - kLanes);
    int64_t n_different = 0;  // a fused product may tip a value that lies between two codes
    for (int64_t k = 0; k < targets.size(); ++k) n_different += fabsf(targets[k] - same[k]) > 1e-4f;
    if (n_different * 20 > targets.size()) fail(none, "round_rows is off");
  }
}

// A sanitizer sees where it is smaller than asked for.
void check_workspace() {
  for (const size_t size : {size_t{100}, size_t{9} << 20, size_t{1}, size_t{20} << 20}) {
    memset(thread_workspace(size), 1, size);
  }
}

#ifdef LWQUANT_EMULATE_AMX
// Other libraries set AMX's registers up once and use them in later calls.
void check_registers_stay(Random& random) {
  const Case c = {4, 16, 128, 64, false, Zeros::kNone, 0, Values::kUsual};
  const Layer l(c, random);
  const OwnTiles own(l);
  uint8_t others[64] = {1}, after[64];
  others[16] = 32, others[48] = 8;  // one register, 8 rows of 32 bytes
  for (const bool configured : {true, false}) {
    if (!configured) memset(others, 0, sizeof others);
    if (configured) _tile_loadconfig(others);
    for (const int64_t n_tokens : {8, 64}) check_linear(l, own.tiles, n_tokens, 8, random);
    _tile_storeconfig(after);
    if (memcmp(others, after, sizeof after) != 0) fail(c, "linear left other AMX registers");
    _tile_release();
  }
}
#endif

}  // namespace

int main(int n_arguments, char** arguments) {
  check_workspace();
  const int64_t every = n_arguments > 1 ? atoi(arguments[1]) : 1;
  const Isa* isas[8];
  const int n = available_isas(isas, 8);
  for (int i = 0; i < n; ++i) {
    select_isa(isas[i]->name);
    Random random{static_cast<uint64_t>(i)};
    int64_t number = 0;
    const int64_t shapes[][2] = {{1, 1}, {16, 32}, {33, 1000}, {70, 129}, {64, 320}, {5, 576}};
    for (int bits = 2; bits <= 8; ++bits) {
      for (const auto& shape : shapes) {
        const int64_t groups[] = {32, 64, 96, 128, 48, shape[1]};
        for (const int64_t group_size : groups) {
          if (number++ % every) continue;
          const Values values = static_cast<Values>(random.below(4));
          const Zeros zeros = static_cast<Zeros>(random.below(3));
          check({bits, shape[0], shape[1], group_size, random.below(2) == 1, zeros,
                 random.below(3) * 7, values},
                random);
        }
      }
    }
    if (every == 1) check_many_inputs(random);
    check_rounding(random);
#ifdef LWQUANT_EMULATE_AMX
    check_registers_stay(random);
#endif
    printf("%s\n", isas[i]->name);
  }
  return 0;
}
