// The host side of a matmul: quantize the activations, cut the rows into tiles, share them out.
#include "kernels.h"
#include "pool.h"

#include <algorithm>
#include <memory>

namespace lwquant {
namespace {

// Below this many products a second thread costs more to wake than it saves.
constexpr int64_t kProductsPerThread = int64_t{1} << 18;

// Not zeroed, unlike std::vector: all of it is written before it is read.
template <typename T>
std::unique_ptr<T[]> buffer(int64_t n) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(n)]);
}

int useful_threads(int n_threads, int64_t products) {
  const int64_t most = std::max<int64_t>(1, products / kProductsPerThread);
  return static_cast<int>(std::min<int64_t>(n_threads, most));
}

bool integer_kernel_fits(const Isa& isa, const Weight& w) {
  return isa.linear_tile && (w.n_groups == 1 || w.group_size % kStep == 0);
}

// The longest span that groups are whole numbers of.
int64_t span_steps(const Weight& w) {
  if (w.n_groups == 1) return kMaxSpanSteps;
  int64_t steps = kMaxSpanSteps;
  while (w.group_size % (steps * kStep) != 0) steps /= 2;
  return steps;
}

// Runs body(first_row, n_rows, seat) for tiles of kTileRows rows.
template <typename Body>
void for_each_tile(int64_t n_rows, int n_threads, Body body) {
  struct Context {
    Body* body;
    int64_t n_rows;
  } context{&body, n_rows};
  const int n_tiles = static_cast<int>((n_rows + kTileRows - 1) / kTileRows);
  run_tasks(
      n_tiles, n_threads,
      [](void* pointer, int index, int seat) {
        const Context& c = *static_cast<Context*>(pointer);
        const int64_t first = static_cast<int64_t>(index) * kTileRows;
        (*c.body)(first, std::min<int64_t>(kTileRows, c.n_rows - first), seat);
      },
      &context);
}

// False when the activations hold NaN or infinity, which integers cannot.
bool linear_integer(const Isa& isa, const Weight& w, const float* x, int64_t n_tokens,
                    int n_threads, float* y) {
  Activations a{};
  a.x = x;
  a.n_tokens = n_tokens;
  a.n_steps = (w.in_features + kStep - 1) / kStep;
  a.span_steps = span_steps(w);
  a.n_spans = (a.n_steps + a.span_steps - 1) / a.span_steps;
  const int64_t group_steps = (w.group_size + kStep - 1) / kStep;
  a.spans_per_group = (group_steps + a.span_steps - 1) / a.span_steps;
  auto q = buffer<int16_t>(n_tokens * a.n_steps * kStep);
  auto span_scale = buffer<float>(n_tokens * a.n_spans);
  auto group_sum = buffer<float>(n_tokens * w.n_groups);
  if (!quantize_activations(w, a, q.get(), span_scale.get(), group_sum.get())) return false;
  a.q = q.get();
  a.span_scale = span_scale.get();
  a.group_sum = group_sum.get();

  const int64_t tile_floats = scratch_floats(w.n_groups);
  auto scratch = buffer<float>(tile_floats * n_threads);
  for_each_tile(w.out_features, n_threads, [&](int64_t row, int64_t n_rows, int seat) {
    isa.linear_tile(w, a, row, n_rows, scratch.get() + seat * tile_floats, y);
    add_outliers(w, x, n_tokens, row, n_rows, y);
  });
  return true;
}

void linear_float(const Isa& isa, const Weight& w, const float* x, int64_t n_tokens,
                  int n_threads, float* y) {
  auto codes = buffer<uint8_t>(w.in_features * n_threads);
  auto floats = buffer<float>(w.in_features * n_threads);
  for_each_tile(w.out_features, n_threads, [&](int64_t first, int64_t n_rows, int seat) {
    float* weights = floats.get() + seat * w.in_features;
    for (int64_t row = first; row < first + n_rows; ++row) {
      dequantize_row(isa, w, row, codes.get() + seat * w.in_features, weights);
      const float bias = w.bias ? w.bias[row] : 0.0f;
      for (int64_t token = 0; token < n_tokens; ++token) {
        const float* input = x + token * w.in_features;
        y[token * w.out_features + row] = dot(weights, input, w.in_features) + bias;
      }
    }
  });
}

}  // namespace

void linear(const Weight& w, const float* x, int64_t n_tokens, int n_threads, float* y) {
  const Isa& isa = current_isa();
  n_threads = useful_threads(n_threads, w.out_features * w.in_features * n_tokens);
  if (integer_kernel_fits(isa, w) && linear_integer(isa, w, x, n_tokens, n_threads, y)) return;
  linear_float(isa, w, x, n_tokens, n_threads, y);
}

void dequantize(const Weight& w, int64_t row, int64_t n_rows, int n_threads, float* out) {
  const Isa& isa = current_isa();
  n_threads = useful_threads(n_threads, n_rows * w.in_features);
  auto codes = buffer<uint8_t>(w.in_features * n_threads);
  for_each_tile(n_rows, n_threads, [&](int64_t first, int64_t n_here, int seat) {
    for (int64_t r = first; r < first + n_here; ++r) {
      dequantize_row(isa, w, row + r, codes.get() + seat * w.in_features, out + r * w.in_features);
    }
  });
}

}  // namespace lwquant
