#include "launch.h"

#include <algorithm>

namespace lwquant {
namespace gpu {
namespace {

constexpr const char* kRefused = "the driver refused the kernels";

constexpr int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

struct Grid {
  int64_t x, y, z;
};

DeviceTiles device_tiles(const Tiles& t, const uint8_t* tiles) {
  const int64_t span = span_blocks(t), n_blocks = t.padded_inputs / kBlockInputs;
  DeviceTiles w{};
  w.first = tiles + sizeof(TilesHeader);
  w.tile_bytes = t.tile_bytes;
  w.codes_offset = static_cast<int32_t>(t.codes_offset);
  w.group_bytes = static_cast<int32_t>(t.group_bytes);
  w.out_features = static_cast<int32_t>(t.is.out_features);
  w.in_features = static_cast<int32_t>(t.is.in_features);
  w.n_tiles = static_cast<int32_t>(t.n_tiles);
  w.n_blocks = static_cast<int32_t>(n_blocks);
  w.n_spans = static_cast<int32_t>(divided_up(n_blocks, span));
  w.spans_per_group = static_cast<int32_t>(divided_up(t.is.group_size, span * kBlockInputs));
  w.scale_bytes = t.is.scale_bytes;
  w.zeros = t.is.zeros;
  w.zero_step = t.zero_step;
  return w;
}

// Null, or what the driver says of an error.
const char* text_of(const Driver& driver, int error, const char* otherwise) {
  if (!error) return nullptr;
  const char* text = nullptr;  // and stays so for errors that this driver does not know
  driver.error_text(error, &text);
  return text ? text : otherwise;
}

// Makes a GPU's context current for a while. On a thread that has done nothing else yet there is
// none, and what torch calls its current device need not be the one of the tensors.
class InContext {
 public:
  explicit InContext(const Place& place) : driver_(*place.driver) {
    error_ = driver_.get_context(&before_);
    if (error_ || before_ == place.context) return;
    error_ = driver_.set_context(place.context);
    changed_ = !error_;
  }
  ~InContext() {
    if (changed_) driver_.set_context(before_);
  }
  InContext(const InContext&) = delete;
  InContext& operator=(const InContext&) = delete;

  int error() const { return error_; }

 private:
  const Driver& driver_;
  void* before_ = nullptr;
  bool changed_ = false;
  int error_;
};

int find_place(const Driver& driver, int device_index, Place* out) {
  *out = {&driver, nullptr};
  int device = 0;
  const int error = driver.find_device(&device, device_index);
  return error ? error : driver.retain_context(&out->context, device);
}

template <typename Arguments>
const char* launch(const Place& place, void* function, Grid grid, int n_threads, void* stream,
                   Arguments arguments) {
  const Driver& driver = *place.driver;
  const InContext here(place);
  int error = here.error();
  void* list[] = {&arguments};
  if (!error) {
    error = driver.launch(function, static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                          static_cast<unsigned>(grid.z), static_cast<unsigned>(n_threads), 1, 1, 0,
                          stream, list, nullptr);
  }
  return text_of(driver, error, "the driver refused a launch");
}

template <typename Arguments>
const char* launch(const Module& module, Kernel kernel, Grid grid, int n_threads, void* stream,
                   Arguments arguments) {
  return launch(module.place, module.functions[kernel], grid, n_threads, stream, arguments);
}

// Both as large as they can be with every block running at once: a few blocks that are left for a
// second turn take as long as all others, and memory is idle where too few loads are under way.
int few_warps(const Module& module, int64_t n_tiles, int n_chunks) {
  int size = 0;
  while (size + 1 < kFewSizes && n_tiles > module.few_at_a_time[size]) ++size;
  return std::min(kMostFewWarps >> size, static_cast<int>(divided_up(n_chunks, 2)));
}

int splits(int64_t at_a_time, int64_t n_blocks, int n_chunks) {
  const int64_t most = std::min<int64_t>(kMostSplits, n_chunks);
  return static_cast<int>(std::clamp<int64_t>(at_a_time / n_blocks, 1, most));
}

int count_at_a_time(const Module& module, Kernel kernel, int n_warps, int n_multiprocessors,
                    int64_t* out) {
  int each = 0;
  const int error = module.place.driver->count_resident(&each, module.functions[kernel],
                                                        n_warps * kWarp, 0);
  *out = int64_t{each} * n_multiprocessors;
  return error;
}

Kernel kernel_for(const Plan& plan) {
  if (!plan.many) return kMultiplyFew1;
  switch (plan.layout_tokens) {
    case 8:
      return kMultiplyMany8;
    case 16:
      return kMultiplyMany16;
    case kGroupTokens:
      return kMultiplyMany32;
    default:
      return kMultiplyMany64;
  }
}

}  // namespace

const char* load_module(const Driver& driver, int device_index, const void* image, int bits,
                        int activation_bits, int span_blocks, int n_multiprocessors, Module* out) {
  *out = {{}, bits, activation_bits, span_blocks, {}, {}, {}};
  int error = find_place(driver, device_index, &out->place);
  if (error) return text_of(driver, error, kRefused);
  const InContext here(out->place);
  void* module = nullptr;
  error = here.error();
  if (!error) error = driver.load_module(&module, image);
  for (int k = 0; k < kKernels && !error; ++k) {
    error = driver.find_function(&out->functions[k], module, kKernelNames[k]);
  }
  for (int size = 0; size < kFewSizes && !error; ++size) {
    error = count_at_a_time(*out, kMultiplyFew1, kMostFewWarps >> size, n_multiprocessors,
                            &out->few_at_a_time[size]);
  }
  for (int k = kMultiplyMany8; k <= kMultiplyMany64 && !error; ++k) {
    const int n_warps = k == kMultiplyMany64 ? kWideWarps : kManyWarps;
    error = count_at_a_time(*out, static_cast<Kernel>(k), n_warps, n_multiprocessors,
                            &out->many_at_a_time[k]);
  }
  return text_of(driver, error, kRefused);
}

int64_t most_tokens(int activation_bits) {
  return activation_bits == 8 ? kManyTokens8 : kManyTokens16;
}

bool fits_gpu(const Tiles& t) {
  constexpr int64_t kMost = int64_t{1} << 20;  // 65535 blocks of 16 rows or more, offsets in 32 bits
  return t.is.in_features <= kMost && t.is.out_features <= kMost;
}

Plan make_plan(const Module& module, const Tiles& t, int64_t n_tokens) {
  const int64_t planes = module.activation_bits / 8, span = span_blocks(t);
  Plan plan{};
  plan.many = n_tokens > kFewTokens;
  plan.n_chunks = static_cast<int>(divided_up(t.padded_inputs, kChunkBlocks * kBlockInputs));
  plan.n_splits = 1;
  plan.n_layouts = 1;
  plan.layout_tokens = static_cast<int>(n_tokens);
  if (plan.many) {
    const bool wide = n_tokens > kGroupTokens;
    plan.layout_tokens = n_tokens <= 8 ? 8 : n_tokens <= 16 ? 16 : wide ? kWideTokens : kGroupTokens;
    plan.n_layouts = static_cast<int>(divided_up(n_tokens, plan.layout_tokens));
    plan.n_warps = wide ? kWideWarps : kManyWarps;
    const int64_t blocks = plan.n_layouts * divided_up(t.n_tiles, plan.n_warps);
    plan.n_splits = splits(module.many_at_a_time[kernel_for(plan)], blocks, plan.n_chunks);
  } else {
    plan.n_warps = few_warps(module, t.n_tiles, plan.n_chunks);
  }
  const int64_t token_bytes = planes * kChunkBlocks * kBlockInputs + kChunkBlocks / span * 8;
  plan.layout_bytes = plan.n_chunks * plan.layout_tokens * token_bytes;
  plan.parts_offset = divided_up(plan.n_layouts * plan.layout_bytes, kLine) * kLine;
  plan.workspace_bytes = plan.parts_offset;
  if (plan.n_splits > 1) {
    plan.workspace_bytes +=
        plan.n_splits * n_tokens * t.is.out_features * static_cast<int64_t>(sizeof(float));
  }
  return plan;
}

const char* multiply(const Module& module, const Tiles& t, const Plan& plan, const Call& call) {
  const int span = module.span_blocks;
  Quantizing q{};
  q.x = call.x, q.x_type = call.x_type;
  q.in_features = static_cast<int32_t>(t.is.in_features);
  q.n_tokens = static_cast<int32_t>(call.n_tokens);
  q.n_spans = plan.n_chunks * kChunkBlocks / span;
  q.layout_tokens = plan.layout_tokens;
  q.layout_bytes = static_cast<int32_t>(plan.layout_bytes);
  q.rounded = call.workspace;
  const Grid spans = {divided_up(q.n_spans, kQuantizeWarps), plan.layout_tokens, plan.n_layouts};
  const char* error = launch(module, plan.many ? kQuantizeMany : kQuantizeFew, spans,
                             kQuantizeWarps * kWarp, call.stream, q);
  if (error) return error;

  Multiplying m{};
  m.w = device_tiles(t, call.tiles);
  m.rounded = call.workspace;
  m.n_tokens = q.n_tokens;
  m.bias = call.bias, m.bias_type = call.bias_type;
  m.y = call.y, m.y_type = call.y_type;
  m.n_splits = plan.n_splits;
  m.parts = reinterpret_cast<float*>(call.workspace + plan.parts_offset);
  const Grid few = {t.n_tiles, 1, 1};
  const Grid many = {plan.n_layouts, divided_up(t.n_tiles, plan.n_warps), plan.n_splits};
  error = launch(module, kernel_for(plan), plan.many ? many : few, plan.n_warps * kWarp,
                 call.stream, m);
  if (error || plan.n_splits == 1) return error;
  return launch(module, kAddParts, {divided_up(t.is.out_features, kAddThreads), call.n_tokens, 1},
                kAddThreads, call.stream, m);
}

const char* dequantize(const Module& module, const Tiles& t, const uint8_t* tiles,
                       int64_t first_tile, int64_t n_rows, void* out, Float out_type,
                       void* stream) {
  Dequantizing d{};
  d.w = device_tiles(t, tiles);
  d.first_tile = static_cast<int32_t>(first_tile);
  d.n_rows = static_cast<int32_t>(n_rows);
  d.out = out, d.out_type = out_type;
  const int64_t pairs = divided_up(d.w.n_blocks, 2);
  return launch(module, kDequantize,
                {divided_up(n_rows, kTileOutputs), divided_up(pairs, kDequantizeWarps), 1},
                kDequantizeWarps * kWarp, stream, d);
}

const char* load_rounding(const Driver& driver, int device_index, const void* image,
                          RoundingModule* out) {
  *out = {};
  int error = find_place(driver, device_index, &out->place);
  if (error) return text_of(driver, error, kRefused);
  const InContext here(out->place);
  void* module = nullptr;
  error = here.error();
  if (!error) error = driver.load_module(&module, image);
  if (!error) error = driver.find_function(&out->round_block, module, "round_block");
  return text_of(driver, error, kRefused);
}

const char* round_block(const RoundingModule& module, const ColumnBlock& block, void* stream) {
  return launch(module.place, module.round_block, {divided_up(block.n_rows, kWarp), 1, 1},
                kRoundingWarps * kWarp, stream, block);
}

}  // namespace gpu
}  // namespace lwquant
