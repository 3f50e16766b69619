// The host side: quantize the activations of a block of tokens, share the rows out.
#include "kernels.h"
#include "pool.h"
#include "workspace.h"

#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>

namespace lwquant {
namespace {

// Below this many products a second thread costs more to wake than it saves.
constexpr int64_t kProductsPerThread = int64_t{1} << 19;
constexpr int64_t kBlockRows = 4 * kTileOutputs;  // of one task
constexpr int64_t kBlockBytes = int64_t{1} << 19;  // of activations
constexpr int64_t kMinBlockTokens = 16;
// What panels take at a time: that many inputs stay in the L2 cache beside the weights of a strip,
// and weights serve that many tokens at least.
constexpr int64_t kPanelBytes = int64_t{1} << 20, kPanelTokens = 128;

// Not zeroed, unlike std::vector: all of it is written before it is read.
template <typename T>
std::unique_ptr<T[]> buffer(int64_t n) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(n)]);
}

// Inputs and results of a call are float32 or bf16. Kernels read and write float32: bf16 is
// converted in a buffer, a panel of tokens at a time.
template <typename T>
constexpr bool kIsBf16 = std::is_same_v<T, uint16_t>;

template <typename T>
std::unique_ptr<float[]> room_for(int64_t n) {
  return buffer<float>(kIsBf16<T> ? n : 0);
}

const float* widened(const float* from, int64_t, float*) { return from; }

const float* widened(const uint16_t* from, int64_t n, float* room) {
  widen_bf16(from, n, room);
  return room;
}

float* as_floats(float* to, float*) { return to; }
float* as_floats(uint16_t*, float* room) { return room; }

int useful_threads(int n_threads, int64_t products) {
  const int64_t most = std::max<int64_t>(1, products / kProductsPerThread);
  return static_cast<int>(std::min<int64_t>(n_threads, most));
}

// The index-th block to begin of those that `n_threads` take in turns: each goes through a part of
// its own, since what a kernel fetches ahead is what comes next in memory.
int64_t in_parts(int64_t index, int64_t n_blocks, int64_t n_threads) {
  const int64_t part = index % n_threads, whole = n_blocks / n_threads;
  return part * whole + std::min(part, n_blocks % n_threads) + index / n_threads;
}

// Runs body(first_row, n_rows, seat) for blocks of kBlockRows rows.
template <typename Body>
void for_each_block(int64_t n_rows, int n_threads, Body body) {
  struct Context {
    Body* body;
    int64_t n_rows;
    int n_blocks, n_threads;
  } context{&body, n_rows, static_cast<int>((n_rows + kBlockRows - 1) / kBlockRows), n_threads};
  run_tasks(
      context.n_blocks, n_threads,
      [](void* pointer, int index, int seat) {
        const Context& c = *static_cast<Context*>(pointer);
        const int64_t first = in_parts(index, c.n_blocks, c.n_threads) * kBlockRows;
        (*c.body)(first, std::min<int64_t>(kBlockRows, c.n_rows - first), seat);
      },
      &context);
}

bool arrange(const PanelKernels& kernels, const float* x, int64_t n_tokens, int64_t stride,
             int64_t n, int64_t n_padded, uint8_t* values, float* scales) {
  return kernels.arrange(x, n_tokens, stride, n, n_padded, values, scales);
}

bool arrange(const PanelKernels& kernels, const uint16_t* x, int64_t n_tokens, int64_t stride,
             int64_t n, int64_t n_padded, uint8_t* values, float* scales) {
  return kernels.arrange_bf16(x, n_tokens, stride, n, n_padded, values, scales);
}

// How a call goes through its tokens and inputs: panels of tokens, each in parts of their inputs.
struct Panels {
  int64_t part_inputs, part_spans, n_parts;
  int64_t tokens;  // whole pairs of sets

  Panels(const PanelKernels& kernels, int64_t n_inputs) {
    const int64_t span = kernels.span_inputs, n_spans = (n_inputs + span - 1) / span;
    const int64_t most = kPanelBytes / kPanelTokens / kernels.value_bytes;
    n_parts = (n_spans * span + most - 1) / most;
    part_spans = (n_spans + n_parts - 1) / n_parts;
    part_inputs = part_spans * span;
    n_parts = (n_spans + part_spans - 1) / part_spans;
    tokens = kPanelBytes / (part_inputs * kernels.value_bytes) / kPairTokens * kPairTokens;
  }
};

template <typename T>
bool linear_panels(const PanelKernels& kernels, const Tiles& w, const Outliers& outliers,
                   const float* bias, const T* x, int64_t n_tokens, int n_threads, T* y) {
  const int64_t in_features = w.is.in_features, out_features = w.is.out_features;
  const Panels panels(kernels, w.padded_inputs);
  const int64_t n_most = std::min(n_tokens, panels.tokens);
  const int64_t n_places = (n_most + kPairTokens - 1) / kPairTokens * kPairTokens;
  // Results in float32 are their own sums. For bf16 each thread has sums of one block, which stay
  // in its cache; only where blocks come again for other inputs there are sums of all.
  const bool sums_of_all = panels.n_parts > 1;
  const int64_t stride = kIsBf16<T> && !sums_of_all ? kBlockRows : out_features;
  const auto room = room_for<T>(n_most * (sums_of_all ? out_features : n_threads * kBlockRows));
  const int64_t strip_bytes =
      kStripRows * (panels.part_inputs * kernels.value_bytes +
                    panels.part_spans * static_cast<int64_t>(sizeof(float)));
  uint8_t *values = nullptr, *rooms = nullptr;
  float* scales = nullptr;
  const auto carve = [&](uint8_t* memory) {
    Carver carver(memory);
    values = carver.take<uint8_t>(n_places * panels.part_inputs * kernels.value_bytes);
    rooms = carver.take<uint8_t>(n_threads * strip_bytes);
    scales = carver.take<float>(n_places * panels.part_spans);
    return carver.taken();
  };
  carve(thread_workspace(carve(nullptr)));
  const auto wide_inputs = room_for<T>(outliers.rows ? n_most * in_features : 0);
  for (int64_t token = 0; token < n_tokens; token += panels.tokens) {
    const T* inputs = x + token * in_features;
    T* outputs = y + token * out_features;
    const int64_t n_here = std::min(panels.tokens, n_tokens - token);
    const float* of_outliers =
        outliers.rows ? widened(inputs, n_here * in_features, wide_inputs.get()) : nullptr;
    for (int64_t first = 0; first < w.padded_inputs; first += panels.part_inputs) {
      const int64_t n_padded = std::min(panels.part_inputs, w.padded_inputs - first);
      const int64_t n = std::min(n_padded, in_features - first);
      if (!arrange(kernels, inputs + first, n_here, in_features, n, n_padded, values, scales)) {
        return false;
      }
      const PanelInputs panel = {values, scales, n_here, first, n_padded};
      for_each_block(out_features, n_threads, [&](int64_t row, int64_t n_rows, int seat) {
        const int64_t n_tiles = (n_rows + kTileOutputs - 1) / kTileOutputs;
        float* in_room = room.get() + (sums_of_all ? row : seat * n_most * kBlockRows);
        float* sums = as_floats(outputs + row, in_room);
        kernels.multiply(w, panel, row / kTileOutputs, n_tiles, bias, rooms + seat * strip_bytes,
                         stride, sums);
        if (first + n_padded < w.padded_inputs) return;
        add_outliers(outliers, of_outliers, n_here, in_features, row, n_rows, stride, sums);
        if constexpr (kIsBf16<T>) {
          for (int64_t t = 0; t < n_here; ++t) {
            kernels.narrow(sums + t * stride, n_rows, outputs + t * out_features + row);
          }
        }
      });
    }
  }
  return true;
}

template <typename T>
bool linear_of(const Tiles& w, const Outliers& outliers, const float* bias, const T* x,
               int64_t n_tokens, int activation_bits, int n_threads, T* y) {
  const Isa& isa = current_isa();
  const int64_t in_features = w.is.in_features, out_features = w.is.out_features;
  n_threads = useful_threads(n_threads, out_features * in_features * n_tokens);
  const PanelKernels* panels = panel_kernels(
      w.is.bits, w.is.int8_weights, n_tokens, activation_bits, kIsBf16<T>);
  if (panels) return linear_panels(*panels, w, outliers, bias, x, n_tokens, n_threads, y);
  Activations a{};
  a.bits = activation_bits;
  a.span_blocks = span_blocks(w);
  const int64_t span_inputs = a.span_blocks * kBlockInputs;
  a.span_bytes = span_inputs * a.bits / 8;
  a.n_spans = (w.padded_inputs + span_inputs - 1) / span_inputs;
  a.spans_per_group = (w.is.group_size + span_inputs - 1) / span_inputs;
  // All tokens of a block stay in the L2 cache beside the tile that reads them.
  const int64_t token_bytes = a.n_spans * a.span_bytes;
  const int64_t block = std::max<int64_t>(kMinBlockTokens, kBlockBytes / token_bytes);
  const int64_t n_most = std::min(n_tokens, block);
  auto quads = buffer<uint8_t>(n_most * token_bytes + kLine);
  auto span_scale = buffer<float>(n_most * a.n_spans);
  auto group_sum = buffer<float>(n_most * w.n_groups);
  const auto wide_inputs = room_for<T>(n_most * in_features);
  const auto wide_outputs = room_for<T>(n_most * out_features);
  a.quads = quads.get(), a.span_scale = span_scale.get(), a.group_sum = group_sum.get();
  for (int64_t first = 0; first < n_tokens; first += block) {
    a.n_tokens = std::min(block, n_tokens - first);
    const float* inputs =
        widened(x + first * in_features, a.n_tokens * in_features, wide_inputs.get());
    float* outputs = as_floats(y + first * out_features, wide_outputs.get());
    if (!quantize_activations(isa, w, a, inputs, quads.get(), span_scale.get(),
                              group_sum.get())) {
      return false;
    }
    for_each_block(out_features, n_threads, [&](int64_t row, int64_t n_rows, int) {
      const int64_t n_tiles = (n_rows + kTileOutputs - 1) / kTileOutputs;
      isa.multiply_tiles(w, a, row / kTileOutputs, n_tiles, bias, outputs);
      add_outliers(outliers, inputs, a.n_tokens, in_features, row, n_rows, out_features,
                   outputs + row);
      if constexpr (kIsBf16<T>) {
        for (int64_t t = 0; t < a.n_tokens; ++t) {
          const int64_t at = t * out_features + row;
          narrow_to_bf16(outputs + at, n_rows, y + first * out_features + at);
        }
      }
    });
  }
  return true;
}

}  // namespace

const PanelKernels* panel_kernels(int bits, bool int8_weights, int64_t n_tokens,
                                  int activation_bits, bool bf16_inputs) {
  const Isa& isa = current_isa();
  constexpr int64_t kFewestInt8 = 32;  // fewer are faster with the codes as they are
  if (isa.int8 && int8_weights && activation_bits == 8) {
    return n_tokens >= kFewestInt8 ? isa.int8 : nullptr;
  }
  // Rounding to bf16 loses less than 8-bit activations do. Beside 16-bit ones it adds 1 % to the
  // squared error that 6-bit weights have in groups of 64, but 19 % to that of 8-bit weights. Of
  // inputs that are bf16 only weights are rounded, by as much as the results are.
  constexpr int kWidestBf16 = 6;
  const bool invisible = bits <= kWidestBf16 || activation_bits == 8 || bf16_inputs;
  const int64_t fewest = activation_bits == 16 ? 48 : 64;
  return n_tokens >= fewest && invisible ? isa.bf16 : nullptr;
}

bool linear(const Tiles& w, const Outliers& outliers, const float* bias, const float* x,
            int64_t n_tokens, int activation_bits, int n_threads, float* y) {
  return linear_of(w, outliers, bias, x, n_tokens, activation_bits, n_threads, y);
}

bool linear(const Tiles& w, const Outliers& outliers, const float* bias, const uint16_t* x,
            int64_t n_tokens, int activation_bits, int n_threads, uint16_t* y) {
  return linear_of(w, outliers, bias, x, n_tokens, activation_bits, n_threads, y);
}

void dequantize(const Weight& w, int64_t row, int64_t n_rows, int n_threads, float* out) {
  const Isa& isa = current_isa();
  n_threads = useful_threads(n_threads, n_rows * w.in_features);
  auto codes = buffer<uint8_t>(w.in_features * n_threads);
  for_each_block(n_rows, n_threads, [&](int64_t first, int64_t n_here, int seat) {
    for (int64_t r = first; r < first + n_here; ++r) {
      dequantize_row(isa, w, row + r, codes.get() + seat * w.in_features, out + r * w.in_features);
    }
  });
}

}  // namespace lwquant
