// What a loop over columns that are rounded one after another works on: read by CPUs and GPUs.
#pragma once
#include <stdint.h>

namespace lwquant {

// Columns that are rounded one after another; what a column misses moves the ones after it.
// Every array is (n_columns, n_rows), a column of the weight being contiguous.
struct ColumnBlock {
  float* targets;         // in: where each weight should be; out: the grid point it got
  const float* feedback;  // (n_columns, n_columns), rows `stride` apart: column c adds
  int64_t stride;         //   (got - base) * feedback[c][k] to the targets of column k > c
  const float* base;      // null: the target itself
  const float* scales;
  const float* zeros;
  float* errors;  // out: got - base
  float max_code;
  int64_t n_columns;
  int64_t n_rows;
};

}  // namespace lwquant
