// y = x Wᵀ with AVX2, straight from the stored row stream; same integers as the AVX-512 kernel.
//
// 32 codes are exactly `bits` words, loaded once (vpmaskmovd reads no word beyond the row) and
// unpacked in two halves of 16. AVX2 has no 16-bit variable right shift, so a code is moved to the
// top of its slot by a multiplication with a power of two, then down by one common shift.
// `vpmaddwd` multiplies by the 16-bit activations: no saturation, unlike `vpmaddubsw`.
// Bytes moved per weight: bits/8 + (2 + bits/8) / group_size. Expected limit: unpacking,
// 4 instructions for 16 codes.
#include "kernels.h"

#include <immintrin.h>

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

__m256 half_everywhere(uint16_t half) {
  return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(half)));
}

float add_lanes(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

void store_floats(__m256i codes, float* out) {
  const __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(codes));
  const __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(codes, 1));
  _mm256_storeu_ps(out, _mm256_cvtepi32_ps(low));
  _mm256_storeu_ps(out + 8, _mm256_cvtepi32_ps(high));
}

// The zeros of a tile as floats, (n_groups, kTileRows).
template <int BITS>
void tile_zeros(const Weight& w, int64_t row, float* zeros) {
  const int64_t first_word = row / kStep * BITS;
  const int64_t rest = w.zero_words - first_word;
  const __m256i present = low_words(rest < BITS ? rest : BITS);
  for (int64_t group = 0; group < w.n_groups; ++group, zeros += kTileRows) {
    __m256i low = _mm256_set1_epi16(1 << (BITS - 1)), high = low;
    if (w.zeros) {
      const int32_t* words = w.zeros + group * w.zero_words + first_word;
      const __m256i packed = _mm256_maskload_epi32(words, present);
      low = unpack_half<BITS, 0>(packed);
      high = unpack_half<BITS, 1>(packed);
    }
    store_floats(low, zeros);
    store_floats(high, zeros + kHalf);
  }
}

template <int BITS, int TOKENS>
void multiply(const Weight& w, const Activations& a, int64_t row, int64_t token,
              const float* zeros, float* y) {
  const int32_t* codes = w.codes + row * w.row_words;
  const uint16_t* scales = w.scales + row * w.n_groups;
  const int64_t q_stride = a.n_steps * kStep;
  const int64_t span_stride = w.n_groups * a.spans_per_group;
  const int16_t* q = a.q + token * q_stride;
  const float* span_scale = a.span_scale + token * span_stride;
  const float* group_sum = a.group_sum + token * w.n_groups;

  const int64_t last = a.n_steps - 1;
  const __m256i all = low_words(BITS);
  const __m256i ending = low_words(w.row_words - last * BITS);
  const int64_t group_steps = (w.group_size + kStep - 1) / kStep;

  __m256 total[TOKENS];
  for (int t = 0; t < TOKENS; ++t) total[t] = _mm256_setzero_ps();
  int64_t step = 0;
  for (int64_t group = 0; group < w.n_groups; ++group) {
    const int64_t group_stop =
        step + group_steps < a.n_steps ? step + group_steps : a.n_steps;
    __m256 sum[TOKENS];
    for (int t = 0; t < TOKENS; ++t) {  // each of 8 lanes carries its part of the zero
      const float part = group_sum[t * w.n_groups + group] * (1.0f / 8);
      sum[t] = _mm256_set1_ps(-zeros[group * kTileRows] * part);
    }
    for (int64_t span = group * a.spans_per_group; step < group_stop; ++span) {
      const int64_t stop = step + kSpanSteps < group_stop ? step + kSpanSteps : group_stop;
      __m256i products[TOKENS];
      for (int t = 0; t < TOKENS; ++t) products[t] = _mm256_setzero_si256();
      for (; step < stop; ++step) {
        const __m256i packed =
            _mm256_maskload_epi32(codes + step * BITS, step == last ? ending : all);
        const __m256i low = unpack_half<BITS, 0>(packed);
        const __m256i high = unpack_half<BITS, 1>(packed);
        for (int t = 0; t < TOKENS; ++t) {
          const int16_t* x = q + t * q_stride + step * kStep;
          const __m256i x_low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
          const __m256i x_high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + kHalf));
          const __m256i pair =
              _mm256_add_epi32(_mm256_madd_epi16(low, x_low), _mm256_madd_epi16(high, x_high));
          products[t] = _mm256_add_epi32(products[t], pair);
        }
      }
      for (int t = 0; t < TOKENS; ++t) {
        const __m256 scale = _mm256_set1_ps(span_scale[t * span_stride + span]);
        sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[t]), scale, sum[t]);
      }
    }
    const __m256 scale = half_everywhere(scales[group]);
    for (int t = 0; t < TOKENS; ++t) total[t] = _mm256_fmadd_ps(sum[t], scale, total[t]);
  }
  const float bias = w.bias ? w.bias[row] : 0.0f;
  for (int t = 0; t < TOKENS; ++t) {
    y[(token + t) * w.out_features + row] = add_lanes(total[t]) + bias;
  }
}

template <int BITS>
void tile(const Weight& w, const Activations& a, int64_t row, int64_t n_rows, float* scratch,
          float* y) {
  tile_zeros<BITS>(w, row, scratch);
  for (int64_t r = 0; r < n_rows; ++r) {
    int64_t t = 0;
    for (; t + 4 <= a.n_tokens; t += 4) multiply<BITS, 4>(w, a, row + r, t, scratch + r, y);
    for (; t < a.n_tokens; ++t) multiply<BITS, 1>(w, a, row + r, t, scratch + r, y);
  }
}

void linear_tile(const Weight& w, const Activations& a, int64_t row, int64_t n_rows,
                 float* scratch, float* y) {
  switch (w.bits) {
    case 2: return tile<2>(w, a, row, n_rows, scratch, y);
    case 3: return tile<3>(w, a, row, n_rows, scratch, y);
    case 4: return tile<4>(w, a, row, n_rows, scratch, y);
    case 5: return tile<5>(w, a, row, n_rows, scratch, y);
    case 6: return tile<6>(w, a, row, n_rows, scratch, y);
    case 7: return tile<7>(w, a, row, n_rows, scratch, y);
    default: return tile<8>(w, a, row, n_rows, scratch, y);
  }
}

template <int BITS>
void unpack(const int32_t* words, int64_t n, uint8_t* codes) {
  for (; n > 0; n -= kStep, words += BITS, codes += kStep) {
    const int64_t n_here = n < kStep ? n : kStep;
    const __m256i present = low_words((n_here * BITS + kWordBits - 1) / kWordBits);
    const __m256i packed = _mm256_maskload_epi32(words, present);
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

const Isa kAvx2 = {"avx2", unpack_any, linear_tile};

}  // namespace lwquant
