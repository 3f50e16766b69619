// The GPU's loop over columns against its definition in float64, replayed from the errors it reports:
// a rounding that goes the other way would make everything after it incomparable.
#pragma once
#include "random_layers.h"

#include "emulated_cuda.h"
#include "emulated_modules.h"

namespace lwquant {

struct RoundingCase {
  int bits;
  int64_t n_columns, n_rows, stride;
  bool own_base;
};

[[noreturn]] inline void fail(const RoundingCase& c, const char* what) {
  fprintf(stderr, "CUDA: %s, %lld columns of %lld rows, stride %lld, %d bits, %s\n", what,
          static_cast<long long>(c.n_columns), static_cast<long long>(c.n_rows),
          static_cast<long long>(c.stride), c.bits, c.own_base ? "own base" : "no base");
  exit(1);
}

inline void check_rounding(const RoundingCase& c, Random& random) {
  const int64_t n = c.n_columns * c.n_rows;
  const float most = static_cast<float>((1 << c.bits) - 1);
  Exact<float> start(n), scales(n), zeros(n), base(n), feedback((c.n_columns - 1) * c.stride + c.n_columns);
  for (int64_t k = 0; k < n; ++k) {
    scales[k] = 0.02f + 0.01f * random.symmetric();
    zeros[k] = most * (0.5f + 0.5f * random.symmetric());
    if (random.below(2)) zeros[k] = floorf(zeros[k]);
    // Some beyond both ends of the grid.
    start[k] = scales[k] * (most * (0.5f + 0.7f * random.symmetric()) - zeros[k]);
    base[k] = start[k] + scales[k] * random.symmetric();
  }
  for (int64_t k = 0; k < feedback.size(); ++k) feedback[k] = 0.2f * random.symmetric();
  gpu::RoundingModule module;
  if (const char* error = gpu::load_rounding(emulated_modules::driver(), 1,
                                             emulated_modules::rounding_module(), &module)) {
    fail(c, error);
  }
  Exact<float> got(n), errors(n), again(n), errors_again(n);
  const auto run = [&](gpu::emulated::Order order, Exact<float>& targets, Exact<float>& missed) {
    gpu::emulated::machine().order = order;
    memcpy(targets.get(), start.get(), static_cast<size_t>(n) * sizeof(float));
    const ColumnBlock block = {targets.get(), feedback.get(), c.stride,
                               c.own_base ? base.get() : nullptr, scales.get(), zeros.get(),
                               missed.get(),  most, c.n_columns, c.n_rows};
    if (const char* error = gpu::round_block(module, block, nullptr)) fail(c, error);
  };
  run(gpu::emulated::Order::kForward, got, errors);
  run(gpu::emulated::Order::kBackward, again, errors_again);
  const size_t n_bytes = static_cast<size_t>(n) * sizeof(float);
  if (memcmp(got.get(), again.get(), n_bytes) || memcmp(errors.get(), errors_again.get(), n_bytes)) {
    fail(c, "the order of threads matters");
  }
  for (int64_t row = 0; row < c.n_rows; ++row) {
    for (int64_t column = 0; column < c.n_columns; ++column) {
      const int64_t at = column * c.n_rows + row;
      double target = start[at], size = fabs(target);
      for (int64_t before = 0; before < column; ++before) {
        const double moved =
            double{errors[before * c.n_rows + row]} * feedback[before * c.stride + column];
        target += moved;
        size += fabs(moved);
      }
      const double scale = scales[at], zero = zeros[at];
      const double additions = static_cast<double>(column) + 8;
      const double rounding = additions * 0x1p-24 * (size + scale * (zero + double{most}));
      const double code = got[at] / scale + zero, whole = nearbyint(code);
      if (fabs(code - whole) > 1e-3 || whole < 0 || whole > most) fail(c, "a weight off its grid");
      const double best = fmin(fmax(nearbyint(target / scale + zero), 0.0), double{most});
      const double nearest = fabs((best - zero) * scale - target);
      if (fabs(got[at] - target) > nearest + rounding) fail(c, "not the nearest grid point");
      const double missed = got[at] - (c.own_base ? double{base[at]} : target);
      if (fabs(errors[at] - missed) > rounding) fail(c, "an error is off");
    }
  }
}

// Shapes that fill blocks of threads and such that do not.
inline void check_rounding(int bits, Random& random) {
  const int64_t shapes[][2] = {{1, 1}, {128, 32}, {100, 33}, {17, 70}, {8, 5}};
  for (const auto& shape : shapes) {
    for (const bool own_base : {false, true}) {
      check_rounding({bits, shape[0], shape[1], shape[0] + random.below(5), own_base}, random);
    }
  }
}

}  // namespace lwquant
