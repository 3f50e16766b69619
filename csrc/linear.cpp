// The host side: quantize the activations of a block of tokens, share the rows out.
#include "kernels.h"
#include "pool.h"

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
// What bf16 takes at a time: that many values stay in the L2 cache beside the weights of a strip.
constexpr int64_t kPanelInputs = 4096, kPanelValues = 128 * kPanelInputs;

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

struct Free {
  void operator()(void* data) const { free(data); }
};

void arrange(const Bf16Kernels& kernels, const float* x, int64_t n_tokens, int64_t stride,
             int64_t n, int64_t n_padded, uint16_t* out) {
  kernels.round_inputs(x, n_tokens, stride, n, n_padded, out);
}

void arrange(const Bf16Kernels& kernels, const uint16_t* x, int64_t n_tokens, int64_t stride,
             int64_t n, int64_t n_padded, uint16_t* out) {
  kernels.arrange_inputs(x, n_tokens, stride, n, n_padded, out);
}

template <typename T>
void linear_bf16(const Bf16Kernels& kernels, const Tiles& w, const Outliers& outliers,
                 const float* bias, const T* x, int64_t n_tokens, int n_threads, T* y) {
  const int64_t in_features = w.is.in_features, out_features = w.is.out_features;
  const int64_t n_parts = (w.padded_inputs + kPanelInputs - 1) / kPanelInputs;
  const int64_t n_blocks = w.padded_inputs / kBlockInputs;
  const int64_t part = (n_blocks + n_parts - 1) / n_parts * kBlockInputs;
  const int64_t panel = kPanelValues / part / (2 * kSetTokens) * (2 * kSetTokens);
  const int64_t n_most = std::min(n_tokens, panel);
  const int64_t n_sets = (n_most + kSetTokens - 1) / kSetTokens;
  auto values = buffer<uint16_t>(n_sets * kSetTokens * part);
  const size_t strip_bytes = static_cast<size_t>(kStripRows * part) * sizeof(uint16_t);
  const std::unique_ptr<uint8_t, Free> strips(static_cast<uint8_t*>(
      aligned_alloc(kLine, static_cast<size_t>(n_threads) * strip_bytes)));
  if (!strips) throw std::bad_alloc();
  const auto wide_inputs = room_for<T>(outliers.rows ? n_most * in_features : 0);
  // Results in float32 are their own sums. For bf16 each thread has sums of one block, which stay
  // in its cache; only where blocks come again for other inputs there are sums of all.
  const bool sums_of_all = n_parts > 1;
  const int64_t stride = kIsBf16<T> && !sums_of_all ? kBlockRows : out_features;
  const auto room = room_for<T>(n_most * (sums_of_all ? out_features : n_threads * kBlockRows));
  for (int64_t token = 0; token < n_tokens; token += panel) {
    const T* inputs = x + token * in_features;
    T* outputs = y + token * out_features;
    const int64_t n_here = std::min(panel, n_tokens - token);
    const float* of_outliers =
        outliers.rows ? widened(inputs, n_here * in_features, wide_inputs.get()) : nullptr;
    for (int64_t first = 0; first < w.padded_inputs; first += part) {
      const int64_t n_padded = std::min(part, w.padded_inputs - first);
      const int64_t n = std::min(n_padded, in_features - first);
      arrange(kernels, inputs + first, n_here, in_features, n, n_padded, values.get());
      const Bf16Inputs rounded = {values.get(), n_here, first, n_padded};
      for_each_block(out_features, n_threads, [&](int64_t row, int64_t n_rows, int seat) {
        const int64_t n_tiles = (n_rows + kTileOutputs - 1) / kTileOutputs;
        uint8_t* weights = strips.get() + static_cast<size_t>(seat) * strip_bytes;
        float* in_room = room.get() + (sums_of_all ? row : seat * n_most * kBlockRows);
        float* sums = as_floats(outputs + row, in_room);
        kernels.multiply(w, rounded, row / kTileOutputs, n_tiles, bias, weights, stride, sums);
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
}

template <typename T>
bool linear_of(const Tiles& w, const Outliers& outliers, const float* bias, const T* x,
               int64_t n_tokens, int activation_bits, int n_threads, T* y) {
  const Isa& isa = current_isa();
  const int64_t in_features = w.is.in_features, out_features = w.is.out_features;
  n_threads = useful_threads(n_threads, out_features * in_features * n_tokens);
  if (runs_in_bf16(w.is.bits, n_tokens, activation_bits, kIsBf16<T>)) {
    linear_bf16(*isa.bf16, w, outliers, bias, x, n_tokens, n_threads, y);
    return true;
  }
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

bool runs_in_bf16(int bits, int64_t n_tokens, int activation_bits, bool bf16_inputs) {
  const int64_t fewest = activation_bits == 16 ? 48 : 64;  // fewer are faster with integers
  // Rounding to bf16 loses less than 8-bit activations do. Beside 16-bit ones it adds 1 % to the
  // squared error that 6-bit weights have in groups of 64, but 19 % to that of 8-bit weights. Of
  // inputs that are bf16 only weights are rounded, by as much as the results are.
  constexpr int kWidest = 6;
  const bool invisible = bits <= kWidest || activation_bits == 8 || bf16_inputs;
  return current_isa().bf16 && n_tokens >= fewest && invisible;
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
