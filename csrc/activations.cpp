// Activations as 16-bit integers with one scale per span of a group: |x - q * scale| <= scale / 2
// (and rounding of the last place), scale = max|x| / 32767. The integer kernels are exact from
// there, so this half step, 2^-16 of the span's largest activation, is all they lose.
//
// 16 bits are the "hi + lo int8" split written as one number: `vpdpwssd` takes 32 products per
// instruction, `vpdpbusd` 64 but needs hi and lo, so the rate is the same and nothing is recombined.
#include "kernels.h"

#include <string.h>

namespace lwquant {
namespace {

constexpr float kLargest = 32767.0f;
// A span whose largest value is below this is measured with this instead, so that the scale and
// its inverse stay normal numbers; the error is then at most 2^-116 an input.
constexpr float kSmallestRange = 0x1p-100f;
constexpr uint32_t kInfinityBits = 0x7f800000u;

uint32_t largest_magnitude_bits(const float* x, int64_t n) {
  uint32_t largest = 0;  // without the sign, floats order as integers, NaN above infinity
  for (int64_t k = 0; k < n; ++k) {
    uint32_t bits;
    memcpy(&bits, x + k, sizeof bits);
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Rounds to nearest by adding 1.5 * 2^23, after which the mantissa is the integer.
int32_t round_span(const float* x, int64_t n, float inverse, int16_t* q) {
  constexpr float kMagic = 12582912.0f;
  int32_t sum = 0;  // at most 128 * 32767
  for (int64_t k = 0; k < n; ++k) {
    const float shifted = x[k] * inverse + kMagic;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    const int32_t value = bits - 0x4b400000;
    q[k] = static_cast<int16_t>(value);
    sum += value;
  }
  return sum;
}

}  // namespace

bool quantize_activations(const Weight& w, const Activations& a, int16_t* q, float* span_scale,
                          float* group_sum) {
  const int64_t span_inputs = a.span_steps * kStep;
  const int64_t padded = a.n_steps * kStep;
  for (int64_t token = 0; token < a.n_tokens; ++token) {
    const float* x = a.x + token * w.in_features;
    int16_t* out = q + token * padded;
    memset(out + w.in_features, 0, sizeof(int16_t) * (padded - w.in_features));
    float* sums = group_sum + token * w.n_groups;
    for (int64_t group = 0; group < w.n_groups; ++group) sums[group] = 0.0f;
    for (int64_t span = 0; span < a.n_spans; ++span) {
      const int64_t first = span * span_inputs;
      const int64_t rest = w.in_features - first;
      const int64_t n = rest < span_inputs ? rest : span_inputs;
      const uint32_t bits = largest_magnitude_bits(x + first, n);
      if (bits >= kInfinityBits) return false;
      float range;
      memcpy(&range, &bits, sizeof range);
      range = range < kSmallestRange ? kSmallestRange : range;
      const float scale = range / kLargest;
      const int32_t total = round_span(x + first, n, kLargest / range, out + first);
      span_scale[token * a.n_spans + span] = scale;
      sums[span / a.spans_per_group] += scale * static_cast<float>(total);
    }
  }
  return true;
}

}  // namespace lwquant
