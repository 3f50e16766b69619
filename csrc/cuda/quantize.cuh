// Activations as integers: a warp per span and token, a lane per input of each block.
//
// The same integers and scales as on the CPU (csrc/quantize_span.inc). NaN and infinity have no
// integer: a span that holds one gets the scale NaN, which makes every output of its token NaN. The
// host need not know.
#pragma once
#include "../activation_steps.h"
#include "activations.cuh"
#include "floats.cuh"

namespace lwquant {
namespace gpu {

template <int PLANES, int SPAN, typename Layout>
INLINE void quantize(const Quantizing& q, const Layout& layout) {
  const int lane = thread_index() % kWarp, token = block_z() * layout.n_tokens + block_y();
  const int own = block_y();  // among those of a layout
  const int span = block_x() * kQuantizeWarps + thread_index() / kWarp;
  if (span >= q.n_spans) return;
  uint8_t* rounded = q.rounded + static_cast<int64_t>(block_z()) * q.layout_bytes;
  float x[SPAN];
  uint32_t largest = 0;  // without the sign, floats order as integers, NaN above infinity
  for (int b = 0; b < SPAN; ++b) {
    const int input = (span * SPAN + b) * kBlockInputs + lane;
    const bool inside = token < q.n_tokens && input < q.in_features;
    const int64_t index = static_cast<int64_t>(token) * q.in_features + input;
    x[b] = inside ? load_float(q.x, index, q.x_type) : 0.0f;
    const uint32_t magnitude = bits_of(x[b]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  for (int bits = kWarp / 2; bits; bits /= 2) {
    const uint32_t other = from_lane_xor(largest, bits);
    largest = other > largest ? other : largest;
  }
  const bool finite = largest < kInfinityBits;
  const float found = finite ? float_of(largest) : 0.0f;
  const float range = found < kSmallestRange ? kSmallestRange : found;
  const float steps = static_cast<float>(largest_activation(8 * PLANES));
  const float inverse = quotient(steps, range);
  int32_t sum = 0;
  for (int b = 0; b < SPAN; ++b) {
    const int32_t integer = finite ? nearest(product(x[b], inverse)) : 0;
    const int32_t low = static_cast<int8_t>(integer);
    sum += integer;
    const int block = span * SPAN + b;
    if (PLANES == 2) {
      rounded[layout.quad(block, own, 0, lane)] = static_cast<uint8_t>((integer - low) >> 8);
    }
    rounded[layout.quad(block, own, PLANES - 1, lane)] = static_cast<uint8_t>(low);
  }
  for (int bits = kWarp / 2; bits; bits /= 2) {
    sum += static_cast<int32_t>(from_lane_xor(static_cast<uint32_t>(sum), bits));
  }
  if (lane != 0) return;
  SpanScale* to = reinterpret_cast<SpanScale*>(rounded + layout.scale(span, own));
  const float not_a_number = float_of(0x7fc00000u);
  *to = {finite ? quotient(range, steps) : not_a_number, static_cast<float>(sum)};
}

}  // namespace gpu
}  // namespace lwquant
