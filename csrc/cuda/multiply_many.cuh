// From 2 tokens on, on tensor cores: a block has 4 tiles, a warp each, a part of the inputs, and up to
// 32 tokens, or 8 tiles and 64 tokens, so that what is unpacked once, and what is fetched from the L2
// cache, serves more products. With more tokens still, blocks of the same tiles and other tokens run
// side by side, and find the tiles there.
//
// The warps share the activations, which are copied ahead to shared memory a chunk of 128 inputs at a
// time. A thread (g = lane / 4, t = lane % 4) has rows g and g + 8 of block t of the chunk in
// registers, those of the next chunk under way. Where a span is the whole chunk, it unpacks its own
// words and multiplies them as they lie, see ManyLayout. With spans of SPAN < 4 blocks the four
// threads need parts of the same blocks: packed words go round by shuffles, 2 BITS for a span, and
// every block is unpacked by 4 / SPAN threads. Unpacking so costs twice as much in groups of 64 and
// four times as much in groups of 32; memory and tensor cores have the same to do.
//
// Where there are too few tiles for the GPU the inputs are split between blocks, and
// add_parts() adds in a fixed order.
#pragma once
#include "activations.cuh"
#include "floats.cuh"
#include "tiles.cuh"

namespace lwquant {
namespace gpu {

// What a thread holds of a chunk: two rows of its block.
template <int BITS>
struct OwnRows {
  uint32_t words[2][BITS];
  StoredScale scales[2];
};

template <int BITS, int SPAN>
INLINE void load_rows(const DeviceTiles& w, const uint8_t* tile, int chunk, int row, int block,
                      OwnRows<BITS>& own) {
  const int index = chunk * kChunkBlocks + block;
  for (int i = 0; i < 2; ++i) {
    load_row<BITS>(w, tile, index, row + 8 * i, own.words[i]);
    own.scales[i] = load_scale(w, tile, index / SPAN, row + 8 * i);
  }
}

// The two rows that the thread in `lane` holds.
template <int BITS>
INLINE OwnRows<BITS> rows_of(const OwnRows<BITS>& own, int lane) {
  OwnRows<BITS> other;
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < BITS; ++k) other.words[i][k] = from_lane(own.words[i][k], lane);
    other.scales[i].scale = from_lane(own.scales[i].scale, lane);
    other.scales[i].zero = from_lane(own.scales[i].zero, lane);
  }
  return other;
}

// The 2 SPAN words of four codes that are part `part` of a row of a block.
template <int BITS, int SPAN>
INLINE void unpack_part(const uint32_t (&words)[BITS], int part, uint32_t (&codes)[2 * SPAN]) {
  uint32_t all[kBlockVectors];
  Block<BITS>::unpack(words, all);
#pragma unroll
  for (int i = 0; i < 2 * SPAN; ++i) {
    codes[i] = all[i];
#pragma unroll
    for (int p = 1; p < kChunkBlocks / SPAN; ++p) {
      if (part == p) codes[i] = all[p * 2 * SPAN + i];
    }
  }
}

// A thread's 8 SPAN bytes of a token: see ManyLayout.
template <int SPAN>
INLINE void read_values(const uint8_t* span, int lane, uint32_t (&values)[2 * SPAN]) {
  if constexpr (SPAN == 1) {
    read_two(span + lane * 8, values);
  } else {
    for (int i = 0; i < SPAN / 2; ++i) {
      const Four four = read_four(span + i * (kWarp * 16) + lane * 16);
      for (int k = 0; k < 4; ++k) values[4 * i + k] = four.word[k];
    }
  }
}

template <int BITS, int PLANES, int SPAN, int TOKENS, int WARPS>
INLINE void multiply_many(const Multiplying& m) {
  using Layout = ManyLayout<PLANES, SPAN>;
  constexpr int kChunkBytes = Layout::chunk_bytes(TOKENS);
  struct alignas(16) Stage {
    uint8_t bytes[kChunkBytes];
  };
  SHARED Stage stages[2];
  const DeviceTiles& w = m.w;
  const int lane = thread_index() % kWarp, g = lane / 4, t = lane % 4;
  const int tile = block_y() * WARPS + thread_index() / kWarp;
  // A warp without a tile works with its neighbours on the last one, and stores nothing.
  const uint8_t* own_tile = w.first + (tile < w.n_tiles ? tile : w.n_tiles - 1) * w.tile_bytes;
  const uint32_t windows[2] = {load_window(w, own_tile, g), load_window(w, own_tile, g + 8)};
  const int n_chunks = (w.n_blocks + kChunkBlocks - 1) / kChunkBlocks;
  const int first = n_chunks * block_z() / m.n_splits;
  const int last = n_chunks * (block_z() + 1) / m.n_splits;
  const uint8_t* rounded = m.rounded + static_cast<int64_t>(block_x()) * n_chunks * kChunkBytes;

  const auto copy = [&](int chunk) {
    const uint8_t* from = rounded + chunk * kChunkBytes;
    uint8_t* to = stages[chunk % 2].bytes;
#pragma unroll 1
    for (int i = thread_index() * 16; i < kChunkBytes; i += WARPS * kWarp * 16) {
      start_copy(to + i, from + i);
    }
  };
  OwnRows<BITS> next;
  copy(first);
  end_copies();
  load_rows<BITS, SPAN>(w, own_tile, first, g, t, next);
  float totals[TOKENS / kColumns][4] = {};
#pragma unroll 1
  for (int chunk = first; chunk < last; ++chunk) {
    const OwnRows<BITS> own = next;
    if (chunk + 1 < last) {
      copy(chunk + 1);
      load_rows<BITS, SPAN>(w, own_tile, chunk + 1, g, t, next);
    }
    end_copies();
    wait_copies<1>();
    barrier();
    const uint8_t* stage = stages[chunk % 2].bytes;
#pragma unroll 1
    for (int span = 0; span < Layout::kSpans; ++span) {
      const OwnRows<BITS> rows =
          SPAN == kChunkBlocks ? own : rows_of(own, lane - t + span * SPAN + t % SPAN);
      uint32_t codes[2][2 * SPAN];
      float scales[2], zeros[2];
      for (int i = 0; i < 2; ++i) {
        unpack_part<BITS, SPAN>(rows.words[i], t / SPAN, codes[i]);
        scales[i] = scale_of(w, windows[i], rows.scales[i]);
        zeros[i] = zero_of<BITS>(w, rows.scales[i]);
      }
#pragma unroll
      for (int n = 0; n < TOKENS / kColumns; ++n) {
        int32_t sums[4] = {};
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) {
          uint32_t values[2 * SPAN];
          read_values<SPAN>(stage + n * Layout::kColumnsBytes + plane * Layout::kPlaneBytes +
                                span * Layout::kSpanBytes,
                            lane, values);
          if (plane == 1) {
            for (int i = 0; i < 4; ++i) sums[i] *= 256;
          }
#pragma unroll
          for (int s = 0; s < SPAN; ++s) {
            add_matrix_products(sums, codes[0][2 * s], codes[1][2 * s], codes[0][2 * s + 1],
                                codes[1][2 * s + 1], values[2 * s], values[2 * s + 1]);
          }
        }
        const int token = span * TOKENS + n * kColumns + 2 * t;
        const Four both = read_four(stage + Layout::scales_offset(TOKENS) +
                                    token * kScaleBytes);
        for (int i = 0; i < 4; ++i) {
          const float token_scale = float_of(both.word[i % 2 * 2]);
          const float token_sum = float_of(both.word[i % 2 * 2 + 1]);
          const float centred = fused(-zeros[i / 2], token_sum, static_cast<float>(sums[i]));
          totals[n][i] = fused(centred, product(scales[i / 2], token_scale), totals[n][i]);
        }
      }
    }
    barrier();  // before the next copy goes where this chunk lies
  }
  if (tile >= w.n_tiles) return;
#pragma unroll
  for (int n = 0; n < TOKENS / kColumns; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int out = tile * kTileOutputs + g + i / 2 * 8;
      const int token = block_x() * TOKENS + n * kColumns + 2 * t + i % 2;
      if (out >= w.out_features || token >= m.n_tokens) continue;
      const int64_t index = static_cast<int64_t>(token) * w.out_features + out;
      if (m.n_splits > 1) {
        m.parts[static_cast<int64_t>(block_z()) * m.n_tokens * w.out_features + index] =
            totals[n][i];
      } else {
        const float bias = m.bias ? load_float(m.bias, out, m.bias_type) : 0.0f;
        store_float(m.y, index, m.y_type, totals[n][i] + bias);
      }
    }
  }
}

// y from the sums of parts of the inputs: a thread per output.
INLINE void add_parts(const Multiplying& m) {
  const int out = block_x() * kAddThreads + thread_index();
  if (out >= m.w.out_features) return;
  const int64_t size = static_cast<int64_t>(m.n_tokens) * m.w.out_features;
  const int64_t index = static_cast<int64_t>(block_y()) * m.w.out_features + out;
  float total = 0.0f;
  for (int split = 0; split < m.n_splits; ++split) total += m.parts[split * size + index];
  store_float(m.y, index, m.y_type,
              total + (m.bias ? load_float(m.bias, out, m.bias_type) : 0.0f));
}

}  // namespace gpu
}  // namespace lwquant
