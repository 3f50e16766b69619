// The tiles' matmul with AVX-512 VNNI, and unpacking of row streams.
//
// A vector holds four inputs of 16 rows. `vpdpbusd` multiplies its codes by four activations that
// are the same for all rows: once where they are 8 bits, else once by their high and once by their
// low bytes. The sums of a span are exact. Scales and zeros are vectors of 16 rows, so nothing is
// ever summed across lanes.
// Few tokens: codes are unpacked into registers, about 2 instructions for 64 codes.
// Many: those of a span of two tiles are unpacked into the L1 cache, and each broadcast of four
// activations serves both tiles.
// Bytes moved per weight: bits/8 + (scale + zero) / group_size.
// Expected limit: memory at one token, `vpdpbusd` from some 4 on.
//
// In a row stream 32 codes are exactly `bits` words: load them, bring to each 128-bit lane the words
// of its 8 codes (vpermd), to each 16-bit slot the two bytes its code lies in (vpshufb), shift, mask.
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

namespace lwquant {
namespace {

constexpr int kLaneCodes = 8;
constexpr int64_t kAhead = 6144;  // bytes of a stream that are fetched ahead of their use
constexpr int kStreams = 4;        // tiles that are read in turns

// Where lane j (8 codes, `BITS` bytes) and slot i (one code) find their bits.
template <int BITS>
struct Layout {
  alignas(64) int32_t words[16];
  alignas(64) int8_t bytes[64];
  alignas(64) int16_t shifts[32];

  constexpr Layout() : words(), bytes(), shifts() {
    for (int lane = 0; lane < 4; ++lane) {
      const int first_byte = lane * BITS;
      const int first_word = first_byte / 4;
      for (int i = 0; i < 4; ++i) words[lane * 4 + i] = first_word + i;
      for (int i = 0; i < kLaneCodes; ++i) {
        const int bit = (first_byte - first_word * 4) * 8 + i * BITS;
        bytes[lane * 16 + i * 2] = static_cast<int8_t>(bit / 8);
        bytes[lane * 16 + i * 2 + 1] = static_cast<int8_t>(bit / 8 + 1);
        shifts[lane * kLaneCodes + i] = static_cast<int16_t>(bit % 8);
      }
    }
  }
};

template <int BITS>
constexpr Layout<BITS> kLayout{};

// The words of one step, never reading beyond the `rest` words left in the row. A masked load that
// crosses a cache line is slow, so it is kept for the end of the row.
template <int BITS>
__m512i load_step(const int32_t* words, int64_t rest) {
  constexpr int kPlainWords = BITS <= 4 ? 4 : 8;
  if (rest < kPlainWords) {
    const __mmask8 present = static_cast<__mmask8>((1u << (rest < BITS ? rest : BITS)) - 1);
    return _mm512_castsi256_si512(_mm256_maskz_loadu_epi32(present, words));
  }
  if (BITS <= 4) {
    return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
  }
  return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)));
}

// 32 codes as 16-bit integers; those beyond the end of the row are anything up to 2^bits - 1.
template <int BITS>
__m512i unpack_step(const int32_t* words, int64_t rest) {
  const __m512i packed = load_step<BITS>(words, rest);
  if (BITS == 8) return _mm512_cvtepu8_epi16(_mm512_castsi512_si256(packed));
  const Layout<BITS>& layout = kLayout<BITS>;
  const __m512i lanes = _mm512_permutexvar_epi32(_mm512_load_si512(layout.words), packed);
  const __m512i slots = _mm512_shuffle_epi8(lanes, _mm512_load_si512(layout.bytes));
  const __m512i codes = _mm512_srlv_epi16(slots, _mm512_load_si512(layout.shifts));
  return _mm512_and_si512(codes, _mm512_set1_epi16((1 << BITS) - 1));
}

using Vec = __m512i;
#define INLINE inline __attribute__((always_inline))

template <int N>
INLINE __m512i shift_right(__m512i v) {
  return _mm512_srli_epi16(v, N);
}
INLINE __m512i keep(__m512i v, int bits) {
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(bits)));
}
INLINE __m512i merge(__m512i a, __m512i b, int bits) {
  constexpr int kOrAnd = 0xf8;  // a | (b & c)
  return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi8(static_cast<char>(bits)), kOrAnd);
}

#include "unpack_block.inc"

struct Params {
  const uint8_t* at;  // of the next group
  __m256i windows;    // with scales in bytes: where each row's start, as float16 patterns
};

INLINE __m512 load_scales(const Tiles& w, const Params& p) {
  __m256i halves;
  if (w.is.scale_bytes) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p.at));
    const __m256i above = _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), kByteStep);
    halves = _mm256_add_epi16(p.windows, above);
  } else {
    halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p.at));
  }
  return _mm512_cvtph_ps(halves);
}

INLINE __m512 load_zeros(const Tiles& w, const Params& p) {
  if (!w.is.zeros) return _mm512_set1_ps(static_cast<float>(1 << (w.is.bits - 1)));
  const uint8_t* zeros = p.at + kTileOutputs * (w.is.scale_bytes ? 1 : 2);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros));
  const __m512 codes = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
  return _mm512_mul_ps(codes, _mm512_set1_ps(w.zero_step));
}

// Adds the products of 64 codes and four int8 activations, the same for every row. In assembly,
// since g++ 12 copies every sum before it adds to it.
INLINE void add_products(__m512i& sum, __m512i codes, const uint8_t* four) {
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(codes), "m"(*reinterpret_cast<const int32_t*>(four)));
}

INLINE void add_products(__m512i& sum, __m512i codes, __m512i four) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(four));
}

// What TOKENS tokens and TILES tiles (or as many sets of sums for one tile) add up in one span: with
// BYTES 2 the high bytes of activations and the low ones apart.
template <int TOKENS, int TILES, int BYTES>
struct Sums {
  __m512i of[BYTES][TILES][TOKENS];

  INLINE void clear() {
    for (auto& part : of) {
      for (auto& row : part) {
        for (__m512i& sum : row) sum = _mm512_setzero_si512();
      }
    }
  }

  INLINE __m512 total(int row, int token) const {
    __m512i sum = of[BYTES - 1][row][token];
    if (BYTES == 2) sum = _mm512_add_epi32(sum, _mm512_slli_epi32(of[0][row][token], 8));
    return _mm512_cvtepi32_ps(sum);
  }
};

// Scales of one tile, group by group, and scales times zeros.
struct GroupParams {
  __m512 scales, below;

  INLINE void load(const Tiles& w, const Params& p) {
    scales = load_scales(w, p);
    below = _mm512_mul_ps(scales, load_zeros(w, p));
  }
};

INLINE Params first_params(const Tiles& w, int64_t tile) {
  const uint8_t* begin = w.first + tile * w.tile_bytes;
  if (!w.is.scale_bytes) return {begin, _mm256_setzero_si256()};
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(begin));
  return {begin + kTileOutputs, _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), kByteExponent)};
}

// The spans of a layer, group by group.
struct Walk {
  int64_t span, blocks_left;

  // Where the spans of the group end that begins with the present one.
  INLINE int64_t group_stop(const Activations& a) const {
    const int64_t all = span + a.spans_per_group;
    return all < a.n_spans ? all : a.n_spans;
  }
  INLINE int64_t blocks(const Activations& a) const {
    return blocks_left < a.span_blocks ? blocks_left : a.span_blocks;
  }
};

INLINE void prefetch_lines(const uint8_t* at, int n) {
  for (int i = 0; i < n; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(at + i * kLine), _MM_HINT_T0);
  }
}

INLINE void store_rows(const Tiles& w, int64_t tile, const float* bias, __m512 total, float* y) {
  const int64_t row = tile * kTileOutputs, rest = w.is.out_features - row;
  const __mmask16 present =
      static_cast<__mmask16>(rest < kTileOutputs ? (1u << rest) - 1 : 0xffffu);
  const __m512 shift = bias ? _mm512_maskz_loadu_ps(present, bias + row) : _mm512_setzero_ps();
  _mm512_mask_storeu_ps(y + row, present, _mm512_add_ps(total, shift));
}

// Few tokens: y of TILES tiles for all of the TOKENS tokens, codes unpacked into registers.
// The tiles take turns span by span: several streams come from memory faster than one.
template <int BITS, int TILES, int TOKENS, int BYTES>
void multiply_few(const Tiles& w, const Activations& a, int64_t tile, const float* bias, float* y) {
  // One dot product has to wait for the last into the same sum: with few tokens, more sums.
  constexpr int kSets = TOKENS <= 2 ? 2 : 1;
  constexpr int kBytes = BYTES * kQuad;
  Walk walk = {0, w.padded_inputs / kBlockInputs};
  // The processor does not follow a stream by itself at this pace. What is fetched is as far ahead
  // in its tile, then in the tile that comes after these, so that nothing is left out.
  const int64_t step = w.tile_bytes / walk.blocks_left;
  const uint8_t* const never = w.first + 2 * w.n_tiles * w.tile_bytes;
  const uint8_t *codes[TILES], *ahead[TILES], *end[TILES];
  Params params[TILES];
  __m512 total[TILES][TOKENS];
  for (int r = 0; r < TILES; ++r) {
    const uint8_t* begin = w.first + (tile + r) * w.tile_bytes;
    codes[r] = begin + w.codes_offset, ahead[r] = begin + kAhead, end[r] = begin + w.tile_bytes;
    params[r] = first_params(w, tile + r);
    for (__m512& each : total[r]) each = _mm512_setzero_ps();
  }
  for (int64_t group = 0; group < w.n_groups; ++group) {
    GroupParams of_group[TILES];
    for (int r = 0; r < TILES; ++r) {
      of_group[r].load(w, params[r]);
      params[r].at += w.group_bytes;
    }
    for (const int64_t stop = walk.group_stop(a); walk.span < stop; ++walk.span) {
      const int64_t n_blocks = walk.blocks(a), first = walk.span * a.n_tokens;
      for (int r = 0; r < TILES; ++r) {
        const uint8_t* quads = a.quads + first * a.span_bytes;
        Sums<TOKENS, kSets, BYTES> sums;
        sums.clear();
        for (int64_t block = 0; block < n_blocks; ++block) {
          __m512i packed[BITS], unpacked[kBlockVectors];
          for (int i = 0; i < BITS; ++i) packed[i] = _mm512_load_si512(codes[r] + i * kLine);
          Block<BITS>::unpack(packed, unpacked);
          for (int v = 0; v < kBlockVectors; ++v) {
            for (int t = 0; t < TOKENS; ++t) {
              const uint8_t* quad = quads + v * kBytes + t * a.span_bytes;
              for (int b = 0; b < BYTES; ++b) {
                add_products(sums.of[b][v % kSets][t], unpacked[v], quad + b * kQuad);
              }
            }
          }
          if (ahead[r] >= end[r]) ahead[r] += (TILES - 1) * w.tile_bytes, end[r] = never;
          prefetch_lines(ahead[r], BITS + 1);
          codes[r] += BITS * kLine, quads += kBlockVectors * kBytes, ahead[r] += step;
        }
        for (int t = 0; t < TOKENS; ++t) {
          const __m512 own = _mm512_set1_ps(a.span_scale[first + t]);
          if (kSets == 2) {
            for (int b = 0; b < BYTES; ++b) {
              sums.of[b][0][t] = _mm512_add_epi32(sums.of[b][0][t], sums.of[b][kSets - 1][t]);
            }
          }
          const __m512 both = _mm512_mul_ps(of_group[r].scales, own);
          total[r][t] = _mm512_fmadd_ps(sums.total(0, t), both, total[r][t]);
        }
      }
      walk.blocks_left -= n_blocks;
    }
    for (int t = 0; t < TOKENS; ++t) {
      const __m512 inputs = _mm512_set1_ps(a.group_sum[group * a.n_tokens + t]);
      for (int r = 0; r < TILES; ++r) {
        total[r][t] = _mm512_fnmadd_ps(of_group[r].below, inputs, total[r][t]);
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    for (int r = 0; r < TILES; ++r) {
      store_rows(w, tile + r, bias, total[r][t], y + t * w.is.out_features);
    }
  }
}

// Many tokens: the codes of a span of TILES tiles, unpacked once for all of them.
constexpr int kPanelTokens = 64;  // whose totals stay in the L1 cache beside the codes
constexpr int kPanelTiles = 2;     // unpacked together

template <int TILES>
struct Panel {
  alignas(kLine) uint8_t codes[TILES][kMaxSpanBlocks * kBlockVectors * kLine];
  alignas(kLine) float totals[kPanelTokens][TILES][kTileOutputs];
  GroupParams of_group[TILES];
};

// One span of a panel: where it is in the layer, and the sums of its group's inputs, by token, once
// it is the group's last.
struct PanelSpan {
  int64_t span, n_vectors, first_token, n_tokens;
  const float* group_sum;  // or null
};

// Adds what one span makes of TOKENS tokens to their totals.
template <int TILES, int TOKENS, int BYTES>
INLINE void add_span(Panel<TILES>& panel, const Activations& a, const PanelSpan& s, int64_t token) {
  constexpr int kBytes = BYTES * kQuad;
  const int64_t at = s.span * a.n_tokens + s.first_token + token;
  const uint8_t* quads = a.quads + at * a.span_bytes;
  Sums<TOKENS, TILES, BYTES> sums;
  sums.clear();
  for (int64_t v = 0; v < s.n_vectors; ++v, quads += kBytes) {
    __m512i codes[TILES];
    for (int r = 0; r < TILES; ++r) codes[r] = _mm512_load_si512(panel.codes[r] + v * kLine);
    for (int t = 0; t < TOKENS; ++t) {
      for (int b = 0; b < BYTES; ++b) {
        const uint8_t* four = quads + t * a.span_bytes + b * kQuad;
        const __m512i q = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(four));
        for (int r = 0; r < TILES; ++r) add_products(sums.of[b][r][t], codes[r], q);
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    const __m512 own = _mm512_set1_ps(a.span_scale[at + t]);
    for (int r = 0; r < TILES; ++r) {
      float* totals = panel.totals[token + t][r];
      const __m512 both = _mm512_mul_ps(panel.of_group[r].scales, own);
      __m512 total = _mm512_fmadd_ps(sums.total(r, t), both, _mm512_load_ps(totals));
      if (s.group_sum) {
        const __m512 inputs = _mm512_set1_ps(s.group_sum[token + t]);
        total = _mm512_fnmadd_ps(panel.of_group[r].below, inputs, total);
      }
      _mm512_store_ps(totals, total);
    }
  }
}

template <int TILES, int BYTES>
INLINE void add_span_of_all(Panel<TILES>& panel, const Activations& a, const PanelSpan& s) {
  constexpr int kAtOnce = BYTES == 1 ? 8 : 4;  // 16 sums, each of which is added to in turn
  int64_t t = 0;
  for (; t + kAtOnce <= s.n_tokens; t += kAtOnce) add_span<TILES, kAtOnce, BYTES>(panel, a, s, t);
  for (; t + 2 <= s.n_tokens; t += 2) add_span<TILES, 2, BYTES>(panel, a, s, t);
  if (t < s.n_tokens) add_span<TILES, 1, BYTES>(panel, a, s, t);
}

template <int BITS, int TILES, int BYTES>
void multiply_many(const Tiles& w, const Activations& a, int64_t tile, const float* bias,
                   float* y) {
  Panel<TILES> panel;
  for (int64_t first = 0; first < a.n_tokens; first += kPanelTokens) {
    const int64_t rest = a.n_tokens - first;
    const int64_t n_tokens = rest < kPanelTokens ? rest : kPanelTokens;
    for (int64_t t = 0; t < n_tokens; ++t) {
      for (int r = 0; r < TILES; ++r) _mm512_store_ps(panel.totals[t][r], _mm512_setzero_ps());
    }
    Params params[TILES];
    const uint8_t* codes[TILES];
    for (int r = 0; r < TILES; ++r) {
      params[r] = first_params(w, tile + r);
      codes[r] = w.first + (tile + r) * w.tile_bytes + w.codes_offset;
    }
    Walk walk = {0, w.padded_inputs / kBlockInputs};
    for (int64_t group = 0; group < w.n_groups; ++group) {
      for (int r = 0; r < TILES; ++r) {
        panel.of_group[r].load(w, params[r]);
        params[r].at += w.group_bytes;
      }
      for (const int64_t stop = walk.group_stop(a); walk.span < stop; ++walk.span) {
        const int64_t n_blocks = walk.blocks(a);
        for (int r = 0; r < TILES; ++r) {
          for (int64_t block = 0; block < n_blocks; ++block, codes[r] += BITS * kLine) {
            __m512i packed[BITS], unpacked[kBlockVectors];
            for (int i = 0; i < BITS; ++i) packed[i] = _mm512_load_si512(codes[r] + i * kLine);
            Block<BITS>::unpack(packed, unpacked);
            uint8_t* out = panel.codes[r] + block * kBlockVectors * kLine;
            for (int v = 0; v < kBlockVectors; ++v) _mm512_store_si512(out + v * kLine, unpacked[v]);
            prefetch_lines(codes[r] + kAhead, BITS);
          }
        }
        walk.blocks_left -= n_blocks;
        const bool last = walk.span + 1 == stop;
        const float* group_sum = a.group_sum + group * a.n_tokens + first;
        add_span_of_all<TILES, BYTES>(panel, a,
                                     {walk.span, n_blocks * kBlockVectors, first, n_tokens,
                                      last ? group_sum : nullptr});
      }
    }
    for (int64_t t = 0; t < n_tokens; ++t) {
      for (int r = 0; r < TILES; ++r) {
        float* out = y + (first + t) * w.is.out_features;
        store_rows(w, tile + r, bias, _mm512_load_ps(panel.totals[t][r]), out);
      }
    }
  }
}

constexpr int kFewTokens = 4;

template <int BITS, int TILES, int BYTES>
void multiply_rows(const Tiles& w, const Activations& a, int64_t tile, const float* bias,
                   float* y) {
  switch (a.n_tokens) {
    case 1: return multiply_few<BITS, TILES, 1, BYTES>(w, a, tile, bias, y);
    case 2: return multiply_few<BITS, TILES, 2, BYTES>(w, a, tile, bias, y);
    case 3: return multiply_few<BITS, TILES, 3, BYTES>(w, a, tile, bias, y);
    default: return multiply_few<BITS, TILES, 4, BYTES>(w, a, tile, bias, y);
  }
}

template <int BITS, int BYTES>
void multiply_width(const Tiles& w, const Activations& a, int64_t tile, int64_t n_tiles,
                    const float* bias, float* y) {
  if (a.n_tokens > kFewTokens) {
    for (; n_tiles >= kPanelTiles; n_tiles -= kPanelTiles, tile += kPanelTiles) {
      multiply_many<BITS, kPanelTiles, BYTES>(w, a, tile, bias, y);
    }
    if (n_tiles) multiply_many<BITS, 1, BYTES>(w, a, tile, bias, y);
    return;
  }
  for (; n_tiles >= kStreams; n_tiles -= kStreams, tile += kStreams) {
    multiply_rows<BITS, kStreams, BYTES>(w, a, tile, bias, y);
  }
  for (; n_tiles; --n_tiles, ++tile) multiply_rows<BITS, 1, BYTES>(w, a, tile, bias, y);
}

template <int BYTES>
void multiply_any(const Tiles& w, const Activations& a, int64_t tile, int64_t n_tiles,
                  const float* bias, float* y) {
  switch (w.is.bits) {
    case 2: return multiply_width<2, BYTES>(w, a, tile, n_tiles, bias, y);
    case 3: return multiply_width<3, BYTES>(w, a, tile, n_tiles, bias, y);
    case 4: return multiply_width<4, BYTES>(w, a, tile, n_tiles, bias, y);
    case 5: return multiply_width<5, BYTES>(w, a, tile, n_tiles, bias, y);
    case 6: return multiply_width<6, BYTES>(w, a, tile, n_tiles, bias, y);
    case 7: return multiply_width<7, BYTES>(w, a, tile, n_tiles, bias, y);
    default: return multiply_width<8, BYTES>(w, a, tile, n_tiles, bias, y);
  }
}

void multiply_tiles(const Tiles& w, const Activations& a, int64_t tile, int64_t n_tiles,
                    const float* bias, float* y) {
  if (a.bits == 8) return multiply_any<1>(w, a, tile, n_tiles, bias, y);
  multiply_any<2>(w, a, tile, n_tiles, bias, y);
}

constexpr int kFloats = 16;  // of a vector

// 16 of q as quads of int8: high bytes and low ones in turns.
INLINE void store_wide(__m512i q, uint8_t* quads) {
  const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(q, 24), 24);
  const __m128i high_bytes = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_sub_epi32(q, low), 8));
  const __m128i low_bytes = _mm512_cvtepi32_epi8(low);
  __m128i* out = reinterpret_cast<__m128i*>(quads);
  _mm_storeu_si128(out, _mm_unpacklo_epi32(high_bytes, low_bytes));
  _mm_storeu_si128(out + 1, _mm_unpackhi_epi32(high_bytes, low_bytes));
}

Span quantize_span(const float* x, int64_t n, int64_t n_padded, int bits, uint8_t* quads) {
  __m512 inputs[kMaxSpanBlocks * kBlockInputs / kFloats];
  const int64_t n_vectors = n_padded / kFloats;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t v = 0; v < n_vectors; ++v) {
    const int64_t rest = n - v * kFloats;
    const __mmask16 present = static_cast<__mmask16>(
        rest >= kFloats ? 0xffffu : rest > 0 ? (1u << rest) - 1 : 0);
    inputs[v] = _mm512_maskz_loadu_ps(present, x + v * kFloats);
    const __m512i own = _mm512_and_si512(_mm512_castps_si512(inputs[v]), magnitude);
    largest = _mm512_max_epu32(largest, own);
  }
  const uint32_t pattern = _mm512_reduce_max_epu32(largest);
  if (pattern >= kInfinityBits) return {0.0f, 0, false};
  float range;
  memcpy(&range, &pattern, sizeof range);
  range = range < kSmallestRange ? kSmallestRange : range;
  const float steps = static_cast<float>(largest_activation(bits));
  const __m512 inverse = _mm512_set1_ps(steps / range);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t v = 0; v < n_vectors; ++v) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(inputs[v], inverse));  // to nearest
    sum = _mm512_add_epi32(sum, q);
    if (bits == 8) {
      __m128i* out = reinterpret_cast<__m128i*>(quads) + v;
      _mm_storeu_si128(out, _mm512_cvtepi32_epi8(q));
    } else {
      store_wide(q, quads + v * 2 * kFloats);
    }
  }
  return {range / steps, _mm512_reduce_add_epi32(sum), true};
}

template <int BITS>
void unpack(const int32_t* words, int64_t n, uint8_t* codes) {
  int64_t rest = (n * BITS + kWordBits - 1) / kWordBits;
  for (; n >= kStep; n -= kStep, words += BITS, rest -= BITS, codes += kStep) {
    const __m512i step = unpack_step<BITS>(words, rest);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm512_cvtepi16_epi8(step));
  }
  if (n > 0) {
    const __m512i step = unpack_step<BITS>(words, rest);
    const __mmask32 present = static_cast<__mmask32>((1ull << n) - 1);
    _mm256_mask_storeu_epi8(codes, present, _mm512_cvtepi16_epi8(step));
  }
}

void unpack_any(int bits, const int32_t* words, int64_t n, uint8_t* codes) {
  switch (bits) {
    case 2: return unpack<2>(words, n, codes);
    case 3: return unpack<3>(words, n, codes);
    case 4: return unpack<4>(words, n, codes);
    case 5: return unpack<5>(words, n, codes);
    case 6: return unpack<6>(words, n, codes);
    case 7: return unpack<7>(words, n, codes);
    default: return unpack<8>(words, n, codes);
  }
}

}  // namespace

const Isa kAvx512Vnni = {"avx512_vnni", unpack_any, true, quantize_span, multiply_tiles, &kAvx512Rounding};

}  // namespace lwquant
