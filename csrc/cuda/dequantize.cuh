// The weight in the caller's type, for products by cuBLAS: (code - zero) * scale in float32, rounded
// once. A warp has two blocks of 32 inputs of a tile, goes through shared memory and writes rows of 64
// inputs, whatever the alignment of rows is.
#pragma once
#include "floats.cuh"
#include "tiles.cuh"

namespace lwquant {
namespace gpu {

template <int BITS, int SPAN>
INLINE void dequantize(const Dequantizing& d) {
  constexpr int kInputs = 2 * kBlockInputs;
  // By half of the warp, and a word more than a row holds: 32 lanes with a row each meet no bank
  // twice, as they are row + 16 * half apart.
  SHARED float rows[kDequantizeWarps][2][kTileOutputs][kBlockInputs + 1];
  const DeviceTiles& w = d.w;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int row = lane % kTileOutputs, half = lane / kTileOutputs;
  const int pair = block_y() * kDequantizeWarps + warp, block = 2 * pair + half;
  const uint8_t* tile = w.first + (d.first_tile + block_x()) * w.tile_bytes;
  uint32_t words[BITS], codes[kBlockVectors];
  load_row<BITS>(w, tile, block, row, words);
  const StoredScale stored = load_scale(w, tile, block / SPAN, row);
  Block<BITS>::unpack(words, codes);
  const float scale = scale_of(w, load_window(w, tile, row), stored), zero = zero_of<BITS>(w, stored);
  for (int v = 0; v < kBlockVectors; ++v) {
    for (int i = 0; i < kQuad; ++i) {
      const float code = static_cast<float>(codes[v] >> (8 * i) & 255);
      rows[warp][half][row][v * kQuad + i] = product(difference(code, zero), scale);
    }
  }
  barrier();
  for (int r = 0; r < kTileOutputs; ++r) {
    const int out = block_x() * kTileOutputs + r;
    for (int i = lane; i < kInputs; i += kWarp) {
      const int input = pair * kInputs + i;
      if (out >= d.n_rows || input >= w.in_features) continue;
      store_float(d.out, static_cast<int64_t>(out) * w.in_features + input, d.out_type,
                  rows[warp][i / kBlockInputs][r][i % kBlockInputs]);
    }
  }
}

}  // namespace gpu
}  // namespace lwquant
