// y = x Wᵀ with AVX2, straight from the stored row stream; same integers as the AVX-512 kernel.
//
// 32 codes are exactly `bits` words, loaded once and unpacked in two halves of 16. AVX2 has no 16-bit variable right shift, so a code is moved to the
// top of its slot by a multiplication with a power of two, then down by one common shift.
// `vpmaddwd` multiplies by the 16-bit activations: no saturation, unlike `vpmaddubsw`.
// Bytes moved per weight: bits/8 + (2 + bits/8) / group_size. Expected limit: unpacking,
// 4 instructions for 16 codes.
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

namespace lwquant {
namespace {

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

float add_lanes(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

void store_shares(__m256i codes, float step, float* out) {
  const __m256 share = _mm256_set1_ps(-step / 8);
  const __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(codes));
  const __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(codes, 1));
  _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(low), share));
  _mm256_storeu_ps(out + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(high), share));
}

// The zeros of a tile, negated and divided among the 8 lanes of a sum: (n_groups, kTileRows).
template <int BITS>
void tile_zeros(const Weight& w, int64_t row, float* zeros) {
  const int64_t first_word = row / kStep * BITS;
  const float step = w.zero_bytes ? byte_zero_step(BITS) : 1.0f;
  for (int64_t group = 0; group < w.n_groups; ++group, zeros += kTileRows) {
    __m256i low = _mm256_set1_epi16(1 << (BITS - 1)), high = low;
    if (w.zeros) {
      const int32_t* words = w.zeros + group * w.zero_words + first_word;
      const __m256i packed = load_step<BITS>(words, w.zero_words - first_word);
      low = unpack_half<BITS, 0>(packed);
      high = unpack_half<BITS, 1>(packed);
    } else if (w.zero_bytes) {
      const int64_t rest = w.out_features - row;
      const uint8_t* first = w.zero_bytes + group * w.out_features + row;
      uint8_t bytes[kTileRows] = {};
      memcpy(bytes, first, static_cast<size_t>(rest < kTileRows ? rest : kTileRows));
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
      low = unpack_half<8, 0>(packed);
      high = unpack_half<8, 1>(packed);
    }
    store_shares(low, step, zeros);
    store_shares(high, step, zeros + kHalf);
  }
}

void row_halves(const uint16_t* halves, int64_t n_groups, float* scales) {
  int64_t group = 0;
  for (; group + 8 <= n_groups; group += 8) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + group));
    _mm256_storeu_ps(scales + group, _mm256_cvtph_ps(eight));
  }
  for (; group < n_groups; ++group) scales[group] = _cvtsh_ss(halves[group]);
}

void row_bytes(const uint8_t* bytes, int64_t n_groups, float* scales) {
  const int start = *bytes++ << kByteExponent;
  int64_t group = 0;
  for (; group + 8 <= n_groups; group += 8) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + group));
    const __m128i above = _mm_slli_epi16(_mm_cvtepu8_epi16(eight), kByteStep);
    const __m128i halves = _mm_add_epi16(_mm_set1_epi16(static_cast<int16_t>(start)), above);
    _mm256_storeu_ps(scales + group, _mm256_cvtph_ps(halves));
  }
  for (; group < n_groups; ++group) {
    scales[group] = _cvtsh_ss(static_cast<uint16_t>(start + (bytes[group] << kByteStep)));
  }
}

void row_scales(const Weight& w, int64_t row, float* scales) {
  if (w.scales) return row_halves(w.scales + row * w.n_groups, w.n_groups, scales);
  row_bytes(w.scale_bytes + row * (1 + w.n_groups), w.n_groups, scales);
}

// One step of 32 inputs: exact integer sums of code * q. `rest`: words left in the row.
template <int BITS, int TOKENS>
inline __attribute__((always_inline)) void add_step(const int32_t* words, int64_t rest,
                                                    const int16_t* q, int64_t q_stride,
                                                    __m256i (&products)[TOKENS]) {
  const __m256i packed = load_step<BITS>(words, rest);
  const __m256i low = unpack_half<BITS, 0>(packed);
  const __m256i high = unpack_half<BITS, 1>(packed);
  for (int t = 0; t < TOKENS; ++t) {
    const int16_t* x = q + t * q_stride;
    const __m256i x_low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    const __m256i x_high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + kHalf));
    products[t] = _mm256_add_epi32(products[t], _mm256_madd_epi16(low, x_low));
    products[t] = _mm256_add_epi32(products[t], _mm256_madd_epi16(high, x_high));
  }
}

// y for one row and TOKENS tokens. `zeros` has stride kTileRows over groups, `scales` 1.
template <int BITS, int STEPS, int TOKENS>
void multiply(const Weight& w, const Activations& a, int64_t row, int64_t token,
              const float* zeros, const float* scales, float* y) {
  const int32_t* codes = w.codes + row * w.row_words;
  const int64_t q_stride = a.n_steps * kStep;
  const int16_t* q = a.q + token * q_stride;
  const float* span_scale = a.span_scale + token * a.n_spans;
  const float* group_sum = a.group_sum + token * w.n_groups;
  // Spans that end this many words before the row does need no care in loading.
  const int64_t careful = w.row_words - STEPS * BITS - 8;

  __m256 total[TOKENS];
  for (int t = 0; t < TOKENS; ++t) total[t] = _mm256_setzero_ps();
  int64_t span = 0;
  int64_t word = 0;
  for (int64_t group = 0; group < w.n_groups; ++group) {
    const __m256 zero = _mm256_set1_ps(zeros[group * kTileRows]);
    __m256 sum[TOKENS];
    for (int t = 0; t < TOKENS; ++t) {
      sum[t] = _mm256_mul_ps(zero, _mm256_set1_ps(group_sum[t * w.n_groups + group]));
    }
    const int64_t all = span + a.spans_per_group;
    const int64_t stop = all < a.n_spans ? all : a.n_spans;
    for (; span < stop; ++span) {
      __m256i products[TOKENS];
      for (int t = 0; t < TOKENS; ++t) products[t] = _mm256_setzero_si256();
      if (word <= careful) {
#pragma GCC unroll 4
        for (int step = 0; step < STEPS; ++step, word += BITS, q += kStep) {
          add_step<BITS, TOKENS>(codes + word, kWordBits, q, q_stride, products);
        }
      } else {
        for (int step = 0; step < STEPS && word < w.row_words; ++step, word += BITS, q += kStep) {
          add_step<BITS, TOKENS>(codes + word, w.row_words - word, q, q_stride, products);
        }
      }
      for (int t = 0; t < TOKENS; ++t) {
        const __m256 scale = _mm256_set1_ps(span_scale[t * a.n_spans + span]);
        sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[t]), scale, sum[t]);
      }
    }
    const __m256 scale = _mm256_set1_ps(scales[group]);
    for (int t = 0; t < TOKENS; ++t) total[t] = _mm256_fmadd_ps(sum[t], scale, total[t]);
  }
  const float bias = w.bias ? w.bias[row] : 0.0f;
  for (int t = 0; t < TOKENS; ++t) {
    y[(token + t) * w.out_features + row] = add_lanes(total[t]) + bias;
  }
}

template <int BITS, int STEPS>
void tile(const Weight& w, const Activations& a, int64_t first_row, int64_t n_rows,
          float* scratch, float* y) {
  float* scales = scratch + w.n_groups * kTileRows;
  tile_zeros<BITS>(w, first_row, scratch);
  for (int64_t place = 0; place < n_rows; ++place) {
    const int64_t row = first_row + place;
    const float* zeros = scratch + place;
    row_scales(w, row, scales);
    int64_t t = 0;
    for (; t + 4 <= a.n_tokens; t += 4) multiply<BITS, STEPS, 4>(w, a, row, t, zeros, scales, y);
    for (; t < a.n_tokens; ++t) multiply<BITS, STEPS, 1>(w, a, row, t, zeros, scales, y);
  }
}

template <int BITS>
void tile_of(const Weight& w, const Activations& a, int64_t row, int64_t n_rows, float* scratch,
             float* y) {
  switch (a.span_steps) {
    case 1: return tile<BITS, 1>(w, a, row, n_rows, scratch, y);
    case 2: return tile<BITS, 2>(w, a, row, n_rows, scratch, y);
    default: return tile<BITS, 4>(w, a, row, n_rows, scratch, y);
  }
}

void linear_tile(const Weight& w, const Activations& a, int64_t row, int64_t n_rows,
                 float* scratch, float* y) {
  switch (w.bits) {
    case 2: return tile_of<2>(w, a, row, n_rows, scratch, y);
    case 3: return tile_of<3>(w, a, row, n_rows, scratch, y);
    case 4: return tile_of<4>(w, a, row, n_rows, scratch, y);
    case 5: return tile_of<5>(w, a, row, n_rows, scratch, y);
    case 6: return tile_of<6>(w, a, row, n_rows, scratch, y);
    case 7: return tile_of<7>(w, a, row, n_rows, scratch, y);
    default: return tile_of<8>(w, a, row, n_rows, scratch, y);
  }
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

const Isa kAvx2 = {"avx2", unpack_any, linear_tile, &kAvx2Rounding};

}  // namespace lwquant
