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

void widen_bf16(const uint16_t* from, int64_t n, float* to) {
  for (int64_t k = 0; k < n; ++k) {
    const uint32_t bits = static_cast<uint32_t>(from[k]) << 16;
    memcpy(to + k, &bits, sizeof bits);
  }
}

void narrow_to_bf16(const float* from, int64_t n, uint16_t* to) {
  for (int64_t k = 0; k < n; ++k) {
    uint32_t bits;
    memcpy(&bits, from + k, sizeof bits);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    to[k] = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
  }
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
  place_outliers(w.outliers, row, 1, w.in_features, out);
}

int64_t outlier_column(const Outliers& o, int64_t index) {
  return o.narrow_columns ? o.narrow_columns[index] : o.wide_columns[index];
}

void place_outliers(const Outliers& o, int64_t row, int64_t n_rows, int64_t in_features,
                    float* weights) {
  if (!o.rows) return;
  for (int64_t r = row; r < row + n_rows; ++r, weights += in_features) {
    for (int32_t k = o.rows[r]; k < o.rows[r + 1]; ++k) {
      weights[outlier_column(o, k)] += half_to_float(o.values[k]);
    }
  }
}

void add_outliers(const Outliers& o, const float* x, int64_t n_tokens, int64_t in_features,
                  int64_t row, int64_t n_rows, int64_t stride, float* y) {
  if (!o.rows) return;
  for (int64_t r = 0; r < n_rows; ++r) {
    for (int32_t k = o.rows[row + r]; k < o.rows[row + r + 1]; ++k) {
      const float value = half_to_float(o.values[k]);
      const float* input = x + outlier_column(o, k);
      for (int64_t t = 0; t < n_tokens; ++t) {
        y[t * stride + r] += value * input[t * in_features];
      }
    }
  }
}

}  // namespace lwquant
