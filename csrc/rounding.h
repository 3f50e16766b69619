// What rounding a weight needs often enough to be compiled: a block of GPTQ's columns, and the
// search for the range of each group. Records and declarations only, as in kernels.h.
#pragma once
#include <stdint.h>

#include "column_block.h"

namespace lwquant {

constexpr int kMaxBlockColumns = 256;  // of a ColumnBlock
constexpr int kLanes = 64;  // output rows of one task: columns of them fit in cache together

// Groups of `size` weights, each to get the scale and zero of least weighted squared error.
struct GroupFit {
  const float* weights;     // (n, size)
  const float* importance;  // (n_groups, size): row r has those of group r % n_groups
  const float* shrinks;     // (n_shrinks): fractions of the full range to try, the first one 1,
                            // evenly spaced
  float* scales;            // out (n): values of float16 with `scale_mantissa` bits at most
  float* zeros;             // out (n)
  int64_t n_groups;
  int64_t size;
  int64_t n_shrinks;
  int bits;
  bool symmetric;
  int scale_mantissa;  // 10 for all that float16 has
  bool fine_zeros;     // zeros in steps of 2^(bits-8), both ends of the range shrink by themselves
  int64_t n_halvings;  // of the distance between shrinks, to look around the best pair
};

// One instruction set's compilation of rounding_loops.inc.
struct RoundingLoops {
  void (*round_rows)(const ColumnBlock&, int64_t row, int64_t n_rows);  // n_rows <= kLanes
  void (*fit_groups)(const GroupFit&, int64_t first, int64_t n);
};

extern const RoundingLoops kReferenceRounding;
#ifdef LWQUANT_X86
extern const RoundingLoops kAvx2Rounding;
extern const RoundingLoops kAvx512Rounding;
#endif

// rounding.cpp: the host functions; sizes have been checked
void round_block(const ColumnBlock&, int n_threads);
void fit_groups(const GroupFit&, int64_t n, int n_threads);

}  // namespace lwquant
