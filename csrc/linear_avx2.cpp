// The tiles' matmul with AVX2, and unpacking of row streams; the same integers as AVX-512.
//
// `vpmaddwd` multiplies codes by the 16-bit activations: no saturation, unlike `vpmaddubsw`.
//
// In a row stream 32 codes are exactly `bits` words, loaded once and unpacked in two halves of 16.
// AVX2 has no 16-bit variable right shift, so a code is moved to the top of its slot by a
// multiplication with a power of two, then down by one common shift.
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

namespace lwquant {
namespace {

#include "quantize_span.inc"

constexpr int kHalf = 16;
constexpr int kLaneCodes = 8;
constexpr int kMaxWords = 8;

// Where lane j (8 codes, `BITS` bytes) and slot i (one code) of each half find their bits.
template <int BITS>
struct Layout {
  alignas(32) int32_t words[2][8];
  alignas(32) int8_t bytes[2][32];
  alignas(32) int16_t factors[2][16];

  constexpr Layout() : words(), bytes(), factors() {
    for (int lane = 0; lane < 4; ++lane) {
      const int half = lane / 2, place = lane % 2;
      const int first_byte = lane * BITS;
      const int first_word = first_byte / 4;
      for (int i = 0; i < 4; ++i) {  // a window past the last word is never looked at
        words[half][place * 4 + i] = first_word + i < kMaxWords ? first_word + i : kMaxWords - 1;
      }
      for (int i = 0; i < kLaneCodes; ++i) {
        const int bit = (first_byte - first_word * 4) * 8 + i * BITS;
        bytes[half][place * 16 + i * 2] = static_cast<int8_t>(bit / 8);
        bytes[half][place * 16 + i * 2 + 1] = static_cast<int8_t>(bit / 8 + 1);
        factors[half][place * kLaneCodes + i] = static_cast<int16_t>(1 << (16 - BITS - bit % 8));
      }
    }
  }
};

template <int BITS>
constexpr Layout<BITS> kLayout{};

// All ones in the first n of 8 words.
__m256i low_words(int64_t n) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), index);
}

template <typename T>
__m256i table(const T* values) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(values));
}

// The words of one step, never reading beyond the `rest` words left in the row. A masked load that
// crosses a cache line is slow, so it is kept for the end of the row.
template <int BITS>
__m256i load_step(const int32_t* words, int64_t rest) {
  constexpr int kPlainWords = BITS <= 4 ? 4 : 8;
  if (rest < kPlainWords) {
    return _mm256_maskload_epi32(words, low_words(rest < BITS ? rest : BITS));
  }
  if (BITS <= 4) {
    return _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
  }
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
}

// Codes 0-15 or 16-31 of the loaded words as 16-bit integers.
template <int BITS, int HALF>
__m256i unpack_half(__m256i packed) {
  if (BITS == 8) return _mm256_cvtepu8_epi16(_mm256_extracti128_si256(packed, HALF));
  const Layout<BITS>& layout = kLayout<BITS>;
  const __m256i lanes = _mm256_permutevar8x32_epi32(packed, table(layout.words[HALF]));
  const __m256i slots = _mm256_shuffle_epi8(lanes, table(layout.bytes[HALF]));
  const __m256i high = _mm256_mullo_epi16(slots, table(layout.factors[HALF]));
  return _mm256_srli_epi16(high, 16 - BITS);
}

// Sums of four rows, two lanes each, and of the next four -> sums of eight rows.
__m256i add_pairs(__m256i first, __m256i second) {
  return _mm256_permute4x64_epi64(_mm256_hadd_epi32(first, second), 0xd8);
}

struct Params {
  const uint8_t* at;  // of the next group
  __m256i windows;    // with scales in bytes: where each row's start, as float16 patterns
};

void load_scales(const Tiles& w, const Params& p, __m256 (&scales)[2]) {
  __m256i halves;
  if (w.is.scale_bytes) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p.at));
    const __m256i above = _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), kByteStep);
    halves = _mm256_add_epi16(p.windows, above);
  } else {
    halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p.at));
  }
  scales[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  scales[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}

void load_zeros(const Tiles& w, const Params& p, __m256 (&zeros)[2]) {
  const uint8_t* at = p.at + kTileOutputs * (w.is.scale_bytes ? 1 : 2);
  for (int half = 0; half < 2; ++half) {
    zeros[half] = _mm256_set1_ps(static_cast<float>(1 << (w.is.bits - 1)));
    if (!w.is.zeros) continue;
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + 8 * half));
    const __m256 codes = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    zeros[half] = _mm256_mul_ps(codes, _mm256_set1_ps(w.zero_step));
  }
}

using Vec = __m256i;
#define INLINE inline __attribute__((always_inline))

template <int N>
INLINE __m256i shift_right(__m256i v) {
  return _mm256_srli_epi16(v, N);
}
INLINE __m256i keep(__m256i v, int bits) {
  return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(bits)));
}
INLINE __m256i merge(__m256i a, __m256i b, int bits) { return _mm256_or_si256(a, keep(b, bits)); }

#include "unpack_block.inc"

constexpr int kQuad16Bytes = quad_bytes(16, false);  // what 8 bits have here, too

// Adds codes * q of half a block, 8 rows, for TOKENS tokens; a sum of a row is two lanes.
template <int BITS, int TOKENS>
INLINE void multiply_block(const uint8_t* codes, const uint8_t* quads, int64_t span_bytes,
                           __m256i (&sums)[TOKENS][2]) {
  __m256i packed[BITS], unpacked[kBlockVectors];
  for (int i = 0; i < BITS; ++i) {
    packed[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i * kLine));
  }
  Block<BITS>::unpack(packed, unpacked);
  for (int v = 0; v < kBlockVectors; ++v) {
    const __m256i low = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(unpacked[v]));
    const __m256i high = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(unpacked[v], 1));
    for (int t = 0; t < TOKENS; ++t) {
      int64_t four;
      memcpy(&four, quads + v * kQuad16Bytes + t * span_bytes, sizeof four);
      const __m256i q = _mm256_set1_epi64x(four);
      sums[t][0] = _mm256_add_epi32(sums[t][0], _mm256_madd_epi16(low, q));
      sums[t][1] = _mm256_add_epi32(sums[t][1], _mm256_madd_epi16(high, q));
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
  const uint8_t* quads = a.quads + token * a.span_bytes;
  __m256 total[TOKENS][2];
  for (int t = 0; t < TOKENS; ++t) total[t][0] = total[t][1] = _mm256_setzero_ps();
  int64_t span = 0, left = w.padded_inputs / kBlockInputs;
  for (int64_t group = 0; group < w.n_groups; ++group, params.at += w.group_bytes) {
    __m256 scales[2], zeros[2];
    load_scales(w, params, scales);
    load_zeros(w, params, zeros);
    const int64_t all = span + a.spans_per_group;
    const int64_t stop = all < a.n_spans ? all : a.n_spans;
    for (; span < stop; ++span) {
      const int64_t n_blocks = left < a.span_blocks ? left : a.span_blocks;
      for (int half = 0; half < 2; ++half) {
        __m256i sums[TOKENS][2];
        for (int t = 0; t < TOKENS; ++t) sums[t][0] = sums[t][1] = _mm256_setzero_si256();
        for (int64_t block = 0; block < n_blocks; ++block) {
          multiply_block<BITS, TOKENS>(codes + block * BITS * kLine + half * kLine / 2,
                                       quads + block * kBlockVectors * kQuad16Bytes, a.span_bytes,
                                       sums);
        }
        for (int t = 0; t < TOKENS; ++t) {
          const __m256i rows = add_pairs(sums[t][0], sums[t][1]);
          const __m256 own = _mm256_set1_ps(a.span_scale[span * a.n_tokens + token + t]);
          const __m256 both = _mm256_mul_ps(scales[half], own);
          total[t][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(rows), both, total[t][half]);
        }
      }
      codes += n_blocks * BITS * kLine, quads += a.n_tokens * a.span_bytes;
      left -= n_blocks;
    }
    for (int t = 0; t < TOKENS; ++t) {
      const __m256 inputs = _mm256_set1_ps(a.group_sum[group * a.n_tokens + token + t]);
      for (int half = 0; half < 2; ++half) {
        const __m256 below = _mm256_mul_ps(scales[half], zeros[half]);
        total[t][half] = _mm256_fnmadd_ps(below, inputs, total[t][half]);
      }
    }
  }
  const int64_t row = tile * kTileOutputs, rest = w.is.out_features - row;
  for (int t = 0; t < TOKENS; ++t) {
    float rows[kTileOutputs];
    _mm256_storeu_ps(rows, total[t][0]);
    _mm256_storeu_ps(rows + 8, total[t][1]);
    float* out = y + (token + t) * w.is.out_features + row;
    for (int64_t r = 0; r < kTileOutputs && r < rest; ++r) {
      out[r] = rows[r] + (bias ? bias[row + r] : 0.0f);
    }
  }
}

template <int BITS>
void multiply_width(const Tiles& w, const Activations& a, int64_t tile, const float* bias,
                    float* y) {
  int64_t t = 0;
  for (; t + 2 <= a.n_tokens; t += 2) multiply_tokens<BITS, 2>(w, a, tile, t, bias, y);
  if (t < a.n_tokens) multiply_tokens<BITS, 1>(w, a, tile, t, bias, y);
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

void multiply_tiles(const Tiles& w, const Activations& a, int64_t tile, int64_t n_tiles,
                    const float* bias, float* y) {
  for (; n_tiles; --n_tiles, ++tile) multiply_tile(w, a, tile, bias, y);
}

template <int BITS>
void unpack(const int32_t* words, int64_t n, uint8_t* codes) {
  int64_t rest = (n * BITS + kWordBits - 1) / kWordBits;
  for (; n > 0; n -= kStep, words += BITS, rest -= BITS, codes += kStep) {
    const int64_t n_here = n < kStep ? n : kStep;
    const __m256i packed = load_step<BITS>(words, rest);
    const __m256i mixed =
        _mm256_packus_epi16(unpack_half<BITS, 0>(packed), unpack_half<BITS, 1>(packed));
    const __m256i step = _mm256_permute4x64_epi64(mixed, 0xd8);  // packus works lane by lane
    if (n_here == kStep) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), step);
    } else {
      alignas(32) uint8_t all[kStep];
      _mm256_store_si256(reinterpret_cast<__m256i*>(all), step);
      for (int64_t k = 0; k < n_here; ++k) codes[k] = all[k];
    }
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

const Isa kAvx2 = {"avx2", unpack_any, false, quantize_span, multiply_tiles, &kAvx2Rounding};

}  // namespace lwquant
