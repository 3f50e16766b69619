// The tiles' matmul with AVX-512 VNNI, for up to 8 tokens at once, and unpacking of row streams.
//
// A vector holds four inputs of 16 rows. `vpdpbusd` multiplies its codes by four activations that
// it broadcasts from memory, once for their high and once for their low bytes: per 64 weights and
// token 2 instructions, beside about 2 to unpack. Both sums of a span are exact. Scales and zeros
// are vectors of 16 rows, so nothing is ever summed across lanes.
// Bytes moved per weight: bits/8 + (scale + zero) / group_size.
// Expected limit: memory at one token, `vpdpbusd` from 2 or 3 on.
//
// In a row stream 32 codes are exactly `bits` words: load them, bring to each 128-bit lane the words
// of its 8 codes (vpermd), to each 16-bit slot the two bytes its code lies in (vpshufb), shift, mask.
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

namespace lwquant {
namespace {

constexpr int kLaneCodes = 8;
constexpr int64_t kAhead = 6144;  // bytes that are fetched ahead of their use

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

// Adds codes * q of one block for TOKENS tokens: with the high bytes of q and with the low ones.
template <int BITS, int TOKENS>
INLINE void multiply_block(const uint8_t* codes, const uint8_t* quads, int64_t token_bytes,
                           __m512i (&high)[2][TOKENS], __m512i (&low)[2][TOKENS]) {
  // One dot product has to wait for the last into the same sum: with few tokens, more sums.
  constexpr int kSets = TOKENS <= 2 ? 2 : 1;
  __m512i packed[BITS], unpacked[kBlockVectors];
  for (int i = 0; i < BITS; ++i) packed[i] = _mm512_load_si512(codes + i * kLine);
  Block<BITS>::unpack(packed, unpacked);
  for (int v = 0; v < kBlockVectors; ++v) {
    for (int t = 0; t < TOKENS; ++t) {
      const uint8_t* quad = quads + v * kQuadBytes + t * token_bytes;
      add_products(high[v % kSets][t], unpacked[v], quad);
      add_products(low[v % kSets][t], unpacked[v], quad + kQuad);
    }
  }
}

// y of one tile for TOKENS tokens from `token` on.
template <int BITS, int TOKENS>
void multiply_tokens(const Tiles& w, const Activations& a, int64_t tile, int64_t token,
                     const float* bias, float* y) {
  const uint8_t* begin = w.first + tile * w.tile_bytes;
  const uint8_t* codes = begin + w.codes_offset;
  Params params = {begin, _mm256_setzero_si256()};
  if (w.is.scale_bytes) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(begin));
    params.windows = _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), kByteExponent);
    params.at += kTileOutputs;
  }
  const uint8_t* quads = a.quads + token * a.token_bytes;
  const float* span_scale = a.span_scale + token * a.n_spans;
  const float* group_sum = a.group_sum + token * w.n_groups;
  __m512 total[TOKENS];
  for (int t = 0; t < TOKENS; ++t) total[t] = _mm512_setzero_ps();
  int64_t span = 0, left = w.padded_inputs / kBlockInputs;
  // The processor does not follow a stream by itself at this pace. What is fetched is as far ahead
  // in its tile, so that nothing between two tiles is left out.
  const int64_t step = w.tile_bytes / left;
  const uint8_t* ahead = begin + kAhead;
  for (int64_t group = 0; group < w.n_groups; ++group, params.at += w.group_bytes) {
    const __m512 scales = load_scales(w, params);
    const __m512 below = _mm512_mul_ps(scales, load_zeros(w, params));
    const int64_t all = span + a.spans_per_group;
    const int64_t stop = all < a.n_spans ? all : a.n_spans;
    for (; span < stop; ++span) {
      __m512i high[2][TOKENS], low[2][TOKENS];
      for (int t = 0; t < TOKENS; ++t) {
        high[0][t] = high[1][t] = low[0][t] = low[1][t] = _mm512_setzero_si512();
      }
      const int64_t n_blocks = left < a.span_blocks ? left : a.span_blocks;
      for (int64_t block = 0; block < n_blocks; ++block) {
        multiply_block<BITS, TOKENS>(codes, quads, a.token_bytes, high, low);
        for (int i = 0; i <= BITS; ++i) {
          _mm_prefetch(reinterpret_cast<const char*>(ahead + i * kLine), _MM_HINT_T0);
        }
        codes += BITS * kLine, quads += kBlockVectors * kQuadBytes, ahead += step;
      }
      left -= n_blocks;
      for (int t = 0; t < TOKENS; ++t) {
        const __m512 both =
            _mm512_mul_ps(scales, _mm512_set1_ps(span_scale[t * a.n_spans + span]));
        const __m512i all_high = _mm512_slli_epi32(_mm512_add_epi32(high[0][t], high[1][t]), 8);
        const __m512i sum = _mm512_add_epi32(all_high, _mm512_add_epi32(low[0][t], low[1][t]));
        total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, total[t]);
      }
    }
    for (int t = 0; t < TOKENS; ++t) {
      const __m512 inputs = _mm512_set1_ps(group_sum[t * w.n_groups + group]);
      total[t] = _mm512_fnmadd_ps(below, inputs, total[t]);
    }
  }
  const int64_t row = tile * kTileOutputs, rest = w.is.out_features - row;
  const __mmask16 present =
      static_cast<__mmask16>(rest < kTileOutputs ? (1u << rest) - 1 : 0xffffu);
  const __m512 shift = bias ? _mm512_maskz_loadu_ps(present, bias + row) : _mm512_setzero_ps();
  for (int t = 0; t < TOKENS; ++t) {
    float* out = y + (token + t) * w.is.out_features + row;
    _mm512_mask_storeu_ps(out, present, _mm512_add_ps(total[t], shift));
  }
}

template <int BITS>
void multiply_width(const Tiles& w, const Activations& a, int64_t tile, const float* bias,
                    float* y) {
  int64_t t = 0;
  for (; t + 8 <= a.n_tokens; t += 8) multiply_tokens<BITS, 8>(w, a, tile, t, bias, y);
  switch (a.n_tokens - t) {
    case 7: return multiply_tokens<BITS, 7>(w, a, tile, t, bias, y);
    case 6: return multiply_tokens<BITS, 6>(w, a, tile, t, bias, y);
    case 5: return multiply_tokens<BITS, 5>(w, a, tile, t, bias, y);
    case 4: return multiply_tokens<BITS, 4>(w, a, tile, t, bias, y);
    case 3: return multiply_tokens<BITS, 3>(w, a, tile, t, bias, y);
    case 2: return multiply_tokens<BITS, 2>(w, a, tile, t, bias, y);
    case 1: return multiply_tokens<BITS, 1>(w, a, tile, t, bias, y);
    default: return;
  }
}

void multiply_tile(const Tiles& w, const Activations& a, int64_t tile, const float* bias,
                   float* y) {
  switch (w.is.bits) {
    case 2: return multiply_width<2>(w, a, tile, bias, y);
    case 3: return multiply_width<3>(w, a, tile, bias, y);
    case 4: return multiply_width<4>(w, a, tile, bias, y);
    case 5: return multiply_width<5>(w, a, tile, bias, y);
    case 6: return multiply_width<6>(w, a, tile, bias, y);
    case 7: return multiply_width<7>(w, a, tile, bias, y);
    default: return multiply_width<8>(w, a, tile, bias, y);
  }
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

const Isa kAvx512Vnni = {"avx512_vnni", unpack_any, true, multiply_tile, &kAvx512Rounding};

}  // namespace lwquant
