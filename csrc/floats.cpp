// The plain meaning of a stored layer in float32: any group size, any machine.
#include "kernels.h"

#include <string.h>

namespace lwquant {

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  const uint32_t mantissa = half & 0x3ffu;
  uint32_t bits;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in float32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    memcpy(&bits, &magnitude, sizeof bits);
  } else if (exponent == 31) {  // infinity or NaN
    bits = 0x7f800000u | mantissa << 13;
  } else {
    bits = (exponent + 127 - 15) << 23 | mantissa << 13;
  }
  bits |= sign;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

float scale_at(const Weight& w, int64_t row, int64_t group) {
  if (w.scales) return half_to_float(w.scales[row * w.n_groups + group]);
  const uint8_t* bytes = w.scale_bytes + row * (1 + w.n_groups);
  const int pattern = (bytes[0] << kByteExponent) + (bytes[1 + group] << kByteStep);
  return half_to_float(static_cast<uint16_t>(pattern));
}

float zero_at(const Weight& w, int64_t row, int64_t group) {
  if (w.zero_bytes) {
    const uint8_t byte = w.zero_bytes[group * w.out_features + row];
    return static_cast<float>(byte) * byte_zero_step(w.bits);
  }
  if (!w.zeros) return static_cast<float>(1 << (w.bits - 1));
  return static_cast<float>(code_at(w.bits, w.zeros + group * w.zero_words, row));
}

void dequantize_row(const Isa& isa, const Weight& w, int64_t row, uint8_t* codes, float* out) {
  isa.unpack_row(w.bits, w.codes + row * w.row_words, w.in_features, codes);
  for (int64_t group = 0; group < w.n_groups; ++group) {
    const int64_t start = group * w.group_size;
    const int64_t end = start + w.group_size;
    const int64_t stop = end < w.in_features ? end : w.in_features;
    const float scale = scale_at(w, row, group);
    const float zero = zero_at(w, row, group);
    for (int64_t k = start; k < stop; ++k) {
      out[k] = (static_cast<float>(codes[k]) - zero) * scale;
    }
  }
  if (!w.outlier_rows) return;
  for (int32_t k = w.outlier_rows[row]; k < w.outlier_rows[row + 1]; ++k) {
    out[outlier_column(w, k)] += half_to_float(w.outlier_values[k]);
  }
}

int64_t outlier_column(const Weight& w, int64_t index) {
  return w.narrow_columns ? w.narrow_columns[index] : w.wide_columns[index];
}

void add_outliers(const Weight& w, const float* x, int64_t n_tokens, int64_t row, int64_t n_rows,
                  float* y) {
  if (!w.outlier_rows) return;
  for (int64_t r = row; r < row + n_rows; ++r) {
    for (int32_t k = w.outlier_rows[r]; k < w.outlier_rows[r + 1]; ++k) {
      const float value = half_to_float(w.outlier_values[k]);
      const float* input = x + outlier_column(w, k);
      for (int64_t t = 0; t < n_tokens; ++t) {
        y[t * w.out_features + r] += value * input[t * w.in_features];
      }
    }
  }
}

float dot(const float* a, const float* b, int64_t n) {
  constexpr int kLanes = 16;  // separate sums: the compiler may keep them in vectors
  float sums[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[k + lane] * b[k + lane];
  }
  for (int lane = 0; k < n; ++k, ++lane) sums[lane] += a[k] * b[k];
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

const Isa kReference = {"reference", unpack_row, nullptr, &kReferenceRounding};

}  // namespace lwquant
