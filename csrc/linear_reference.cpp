// The tiles' matmul in plain C++: what every instruction set computes, sum by sum.
#include "kernels.h"

#include <math.h>
#include <string.h>

#include <vector>

namespace lwquant {
namespace {

constexpr bool kSplit = false;

#include "quantize_span.inc"

void multiply_tile(const Tiles& w, const Activations& a, int64_t tile, const float* bias,
                   float* y) {
  std::vector<uint8_t> codes(static_cast<size_t>(kTileOutputs * w.padded_inputs));
  tile_codes(w, tile, codes.data());
  for (int64_t row = 0; row < kTileOutputs; ++row) {
    const int64_t out = tile * kTileOutputs + row;
    if (out >= w.is.out_features) break;
    for (int64_t token = 0; token < a.n_tokens; ++token) {
      float total = 0.0f;
      int64_t span = 0, k = 0;
      for (int64_t group = 0; group < w.n_groups; ++group) {
        const float scale = tile_scale(w, tile, row, group);
        for (int64_t s = 0; s < a.spans_per_group && span < a.n_spans; ++s, ++span) {
          int32_t sum = 0;
          const uint8_t* quads = a.quads + (span * a.n_tokens + token) * a.span_bytes;
          const int64_t all = k + a.span_blocks * kBlockInputs;
          for (const int64_t stop = all < w.padded_inputs ? all : w.padded_inputs; k < stop; ++k) {
            int16_t q = static_cast<int8_t>(*quads);
            if (a.bits == 16) memcpy(&q, quads, sizeof q);
            quads += a.bits / 8;
            sum += codes[static_cast<size_t>(row * w.padded_inputs + k)] * q;
          }
          const float both = scale * a.span_scale[span * a.n_tokens + token];
          total = fmaf(static_cast<float>(sum), both, total);
        }
        const float below = scale * tile_zero(w, tile, row, group);
        total = fmaf(-below, a.group_sum[group * a.n_tokens + token], total);
      }
      y[token * w.is.out_features + out] = total + (bias ? bias[out] : 0.0f);
    }
  }
}

void multiply_tiles(const Tiles& w, const Activations& a, int64_t tile, int64_t n_tiles,
                    const float* bias, float* y) {
  for (; n_tiles; --n_tiles, ++tile) multiply_tile(w, a, tile, bias, y);
}

}  // namespace

const Isa kReference = {"reference", unpack_row, quantize_span, multiply_tiles, &kReferenceRounding};

}  // namespace lwquant
