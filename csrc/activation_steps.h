// How activations become integers, on every processor: x = q * scale, one scale per span and token.
// Included by every instruction set and by the GPU kernels: constants only, see kernels.h.
#pragma once
#include <stdint.h>

namespace lwquant {

constexpr int kMaxSpanBlocks = 4;
// At 16 bits q = 256 * high + low, and the low byte is signed, too.
constexpr int largest_activation(int bits) { return bits == 8 ? 127 : 127 * 256 + 127; }

// A span whose largest value is below this is measured with this instead, so that the scale and
// its inverse stay normal numbers; the error is then at most 2^-108 an input.
constexpr float kSmallestRange = 0x1p-100f;
constexpr uint32_t kInfinityBits = 0x7f800000u;

}  // namespace lwquant
