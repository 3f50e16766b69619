// A block of columns, rounded one after another (csrc/column_block.h). 8 warps share 32 rows of the
// weight, one a lane, and deal the columns out in turn: a column's targets, scales and zeros are in
// the registers of the one warp that rounds it, and only what it missed goes through shared memory.
#pragma once
#include "../column_block.h"
#include "arguments.h"
#include "device.h"

namespace lwquant {
namespace gpu {

// The grid point nearest to the target, as csrc/rounding_loops.inc finds it.
INLINE float on_grid(float target, float scale, float zero, float max_code) {
  float code = quotient(target, scale) + zero;
  code = code > 0.0f ? code : 0.0f;
  code = code < max_code ? code : max_code;
  return product(difference(static_cast<float>(nearest(code)), zero), scale);
}

INLINE void round_block(const ColumnBlock& b) {
  constexpr int kOwn = kRoundingColumns / kRoundingWarps;
  // Two, used in turn: who reads the one has not come to the barrier after which it is written again.
  SHARED float missed[2][kWarp];
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int n_columns = static_cast<int>(b.n_columns);
  const int64_t row = static_cast<int64_t>(block_x()) * kWarp + lane;
  const bool there = row < b.n_rows;
  float targets[kOwn], bases[kOwn], scales[kOwn], zeros[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int column = i * kRoundingWarps + warp;
    const int64_t at = column * b.n_rows + row;
    const bool read = there && column < n_columns;
    targets[i] = read ? b.targets[at] : 0.0f;
    bases[i] = read && b.base ? b.base[at] : 0.0f;
    scales[i] = read ? b.scales[at] : 1.0f;
    zeros[i] = read ? b.zeros[at] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll 1
    for (int turn = 0; turn < kRoundingWarps; ++turn) {
      const int column = i * kRoundingWarps + turn;
      if (column >= n_columns) break;
      float factors[kOwn];  // asked for before the wait for what was missed
#pragma unroll
      for (int k = i; k < kOwn; ++k) {
        const int later = k * kRoundingWarps + warp;
        // What it adds to columns that have been rounded nobody reads.
        factors[k] =
            later < n_columns ? load_float(b.feedback + column * b.stride + later) : 0.0f;
      }
      if (warp == turn) {
        const float got = on_grid(targets[i], scales[i], zeros[i], b.max_code);
        const float error = difference(got, b.base ? bases[i] : targets[i]);
        missed[column % 2][lane] = error;
        if (there) {
          const int64_t at = column * b.n_rows + row;
          b.targets[at] = got;
          b.errors[at] = error;
        }
      }
      barrier();
      const float error = missed[column % 2][lane];
#pragma unroll
      for (int k = i; k < kOwn; ++k) targets[k] = fused(factors[k], error, targets[k]);
    }
  }
}

}  // namespace gpu
}  // namespace lwquant
