// Activations as integers with one scale per span of a group: |x - q * scale| <= scale / 2 (and
// rounding of the last place), scale = max|x| / 32639 at 16 bits, max|x| / 127 at 8. The integer
// kernels are exact from there, so this half step is all they lose.
#include "kernels.h"

namespace lwquant {

bool quantize_activations(const Isa& isa, const Tiles& w, const Activations& a, const float* x,
                          uint8_t* quads, float* span_scale, float* group_sum) {
  const int64_t span_inputs = a.span_blocks * kBlockInputs;
  for (int64_t k = 0; k < w.n_groups * a.n_tokens; ++k) group_sum[k] = 0.0f;
  for (int64_t span = 0; span < a.n_spans; ++span) {
    const int64_t first = span * span_inputs;
    const int64_t rest = w.is.in_features - first;
    const int64_t n = rest < span_inputs ? rest : span_inputs;
    float* sums = group_sum + span / a.spans_per_group * a.n_tokens;
    for (int64_t token = 0; token < a.n_tokens; ++token) {
      const int64_t at = span * a.n_tokens + token;
      const Span found = isa.quantize_span(x + token * w.is.in_features + first, n, span_inputs,
                                           a.bits, quads + at * a.span_bytes);
      if (!found.finite) return false;
      span_scale[at] = found.scale;
      sums[token] += found.scale * static_cast<float>(found.sum);
    }
  }
  return true;
}

}  // namespace lwquant
