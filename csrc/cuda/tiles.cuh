// Reading tiles: a thread has a row of a block, `BITS` words that unpack to 8 words of four codes.
#pragma once
#include "arguments.h"
#include "device.h"

namespace lwquant {
namespace gpu {

using Vec = uint32_t;
template <int N>
INLINE uint32_t shift_right(uint32_t v) {
  return v >> N;
}
INLINE uint32_t keep(uint32_t v, int bits) { return v & (0x01010101u * static_cast<uint32_t>(bits)); }
INLINE uint32_t merge(uint32_t a, uint32_t b, int bits) { return a | keep(b, bits); }

#include "../unpack_block.inc"

// One row of a block, zeros where the block is none of the layer's.
template <int BITS>
INLINE void load_row(const DeviceTiles& w, const uint8_t* tile, int block, int row,
                     uint32_t (&words)[BITS]) {
  const bool inside = block < w.n_blocks;
  const uint8_t* first =
      tile + w.codes_offset + static_cast<int64_t>(block) * (BITS * kLine) + row * kQuad;
  for (int i = 0; i < BITS; ++i) words[i] = inside ? load_word_once(first + i * kLine) : 0;
}

// Scale and zero of a row in a span as they are stored: their conversion waits for them to arrive,
// so it comes when the words of the next blocks are under way, too.
struct StoredScale {
  uint32_t scale, zero;
};

INLINE StoredScale load_scale(const DeviceTiles& w, const uint8_t* tile, int span, int row) {
  if (span >= w.n_spans) return {0, 0};
  const int group = w.spans_per_group == 1 ? span : span / w.spans_per_group;
  const int width = w.scale_bytes ? 1 : 2;
  const uint8_t* scales = tile + (w.scale_bytes ? kTileOutputs : 0) + group * w.group_bytes;
  const uint8_t* own = scales + row * width;
  return {w.scale_bytes ? load_byte(own) : load_half(own),
          w.zeros ? load_byte(scales + kTileOutputs * width + row) : 0};
}

// The first byte of a row's scales, moved to where it counts; 0 with scales in float16.
INLINE uint32_t load_window(const DeviceTiles& w, const uint8_t* tile, int row) {
  return w.scale_bytes ? load_byte(tile + row) << kByteExponent : 0;
}

INLINE float scale_of(const DeviceTiles& w, uint32_t window, StoredScale stored) {
  return half_as_float(window + (w.scale_bytes ? stored.scale << kByteStep : stored.scale));
}

template <int BITS>
INLINE float zero_of(const DeviceTiles& w, StoredScale stored) {
  return w.zeros ? product(static_cast<float>(stored.zero), w.zero_step)
                 : static_cast<float>(1 << (BITS - 1));
}

}  // namespace gpu
}  // namespace lwquant
