// Activations as 16-bit integers with one scale per span of a group: |x - q * scale| <= scale / 2
// (and rounding of the last place), scale = max|x| / 32639. The integer kernels are exact from
// there, so this half step, 2^-16 of the span's largest activation, is all they lose.
#include "kernels.h"

#include <string.h>

namespace lwquant {
namespace {

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
  int32_t sum = 0;  // at most 128 * 32639
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

// Four of q in the order of Activations::quads.
void store_quad(const int16_t* q, bool split, uint8_t* out) {
  if (!split) {
    memcpy(out, q, kQuadBytes);
    return;
  }
  for (int k = 0; k < kQuad; ++k) {
    const int low = static_cast<int8_t>(q[k] & 0xff);
    out[k] = static_cast<uint8_t>((q[k] - low) >> 8);
    out[kQuad + k] = static_cast<uint8_t>(low);
  }
}

}  // namespace

bool quantize_activations(const Tiles& w, const Activations& a, const float* x, bool split,
                          uint8_t* quads, float* span_scale, float* group_sum) {
  const int64_t span_inputs = a.span_blocks * kBlockInputs;
  int16_t q[kMaxSpanBlocks * kBlockInputs];
  for (int64_t token = 0; token < a.n_tokens; ++token) {
    const float* input = x + token * w.is.in_features;
    uint8_t* out = quads + token * a.token_bytes;
    float* sums = group_sum + token * w.n_groups;
    for (int64_t group = 0; group < w.n_groups; ++group) sums[group] = 0.0f;
    for (int64_t span = 0; span < a.n_spans; ++span) {
      const int64_t first = span * span_inputs;
      const int64_t rest = w.is.in_features - first;
      const int64_t n = rest < span_inputs ? rest : span_inputs;
      const uint32_t bits = largest_magnitude_bits(input + first, n);
      if (bits >= kInfinityBits) return false;
      float range;
      memcpy(&range, &bits, sizeof range);
      range = range < kSmallestRange ? kSmallestRange : range;
      const float scale = range / kLargestActivation;
      const int32_t total = round_span(input + first, n, kLargestActivation / range, q);
      span_scale[token * a.n_spans + span] = scale;
      sums[span / a.spans_per_group] += scale * static_cast<float>(total);
      const int64_t padded = w.padded_inputs - first;
      const int64_t n_quads = (padded < span_inputs ? padded : span_inputs) / kQuad;
      memset(q + n, 0, sizeof(int16_t) * static_cast<size_t>(n_quads * kQuad - n));
      for (int64_t quad = 0; quad < n_quads; ++quad, out += kQuadBytes) {
        store_quad(q + quad * kQuad, split, out);
      }
    }
  }
  return true;
}

}  // namespace lwquant
