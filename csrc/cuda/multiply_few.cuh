// One token: a block has one tile, its warps share the inputs out. With more, products of four at a
// time (64 threads' a cycle and multiprocessor) would soon take longer than the tiles' way from
// memory, and tensor cores have them for nothing: multiply_many.cuh.
//
// A lane has one row of 4 blocks of inputs at a time (the other half of its warp the next 4), whose
// words are all under way before the first is unpacked; 16 lanes read a line of 64 bytes. Sums are
// exact in a span and float32 from there on, in an order that depends on the layer alone. Activations
// come through the L1 cache, where every block finds the same ones. Bytes from memory: the tiles,
// once; where they are under 8 bits and tokens few, their bandwidth is the limit.
#pragma once
#include "activations.cuh"
#include "floats.cuh"
#include "tiles.cuh"

namespace lwquant {
namespace gpu {

// Products of a row of one block with the quads of a token: a sum per plane.
template <int PLANES>
INLINE void add_block(const uint32_t (&codes)[kBlockVectors], const uint8_t* quads,
                      int32_t (&sums)[PLANES]) {
#pragma unroll
  for (int plane = 0; plane < PLANES; ++plane) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const Four values = load_four(quads + plane * kBlockInputs + 16 * part);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[plane] = add_products(codes[4 * part + i], values.word[i], sums[plane]);
      }
    }
  }
}

template <int BITS, int PLANES, int SPAN, int TOKENS>
INLINE void multiply_few(const Multiplying& m) {
  constexpr int kSpans = kChunkBlocks / SPAN;
  constexpr int kTokenBytes = PLANES * kBlockInputs;  // of a block
  SHARED float parts[kMostFewWarps][kTileOutputs][TOKENS];
  const DeviceTiles& w = m.w;
  const int warp = thread_index() / kWarp, n_warps = n_threads() / kWarp;
  const int row = thread_index() % kTileOutputs, half = thread_index() / kTileOutputs % 2;
  const uint8_t* tile = w.first + block_x() * w.tile_bytes;
  const uint32_t window = load_window(w, tile, row);
  const int n_chunks = (w.n_blocks + kChunkBlocks - 1) / kChunkBlocks;
  const FewLayout<PLANES, SPAN> layout = {n_chunks * kSpans, TOKENS};
  float totals[TOKENS] = {};
#pragma unroll 1
  for (int chunk = 2 * warp + half; chunk < n_chunks; chunk += 2 * n_warps) {
    uint32_t words[kChunkBlocks][BITS];
    StoredScale stored[kSpans];
#pragma unroll
    for (int b = 0; b < kChunkBlocks; ++b) {
      load_row<BITS>(w, tile, chunk * kChunkBlocks + b, row, words[b]);
    }
    // With 8 bits there are no registers for them yet.
    constexpr bool kScalesEarly = BITS < 8;
#pragma unroll
    for (int s = 0; s < kSpans && kScalesEarly; ++s) {
      stored[s] = load_scale(w, tile, chunk * kSpans + s, row);
    }
    const uint8_t* quads = m.rounded + layout.quad(chunk * kChunkBlocks, 0, 0, 0);
    const uint8_t* scales = m.rounded + layout.scale(chunk * kSpans, 0);
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
      if (!kScalesEarly) stored[s] = load_scale(w, tile, chunk * kSpans + s, row);
      int32_t sums[TOKENS][PLANES] = {};
#pragma unroll
      for (int b = 0; b < SPAN; ++b) {
        uint32_t codes[kBlockVectors];
        Block<BITS>::unpack(words[s * SPAN + b], codes);
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
          const int token = (s * SPAN + b) * TOKENS + t;
          add_block<PLANES>(codes, quads + token * kTokenBytes, sums[t]);
        }
      }
      const float scale = scale_of(w, window, stored[s]), zero = zero_of<BITS>(w, stored[s]);
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        float own_scale, own_sum;
        load_pair(scales + (s * TOKENS + t) * kScaleBytes, own_scale, own_sum);
        const int32_t sum = PLANES == 2 ? 256 * sums[t][0] + sums[t][PLANES - 1] : sums[t][0];
        const float centred = fused(-zero, own_sum, static_cast<float>(sum));
        totals[t] = fused(centred, product(scale, own_scale), totals[t]);
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    totals[t] += float_of(from_lane_xor(bits_of(totals[t]), kTileOutputs));
    if (half == 0) parts[warp][row][t] = totals[t];
  }
  barrier();
  for (int i = thread_index(); i < kTileOutputs * TOKENS; i += n_threads()) {
    const int out = block_x() * kTileOutputs + i % kTileOutputs, t = i / kTileOutputs;
    if (out >= w.out_features || t >= m.n_tokens) continue;
    float total = m.bias ? load_float(m.bias, out, m.bias_type) : 0.0f;
    for (int k = 0; k < n_warps; ++k) total += parts[k][i % kTileOutputs][t];
    store_float(m.y, static_cast<int64_t>(t) * w.out_features + out, m.y_type, total);
  }
}

}  // namespace gpu
}  // namespace lwquant
