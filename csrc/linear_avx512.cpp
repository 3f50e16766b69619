// y = x Wᵀ with AVX-512 VNNI, straight from the stored row stream, 2 rows x up to 4 tokens at once.
//
// 32 codes are exactly `bits` words: load them, bring to each 128-bit lane the words of its 8
// codes (vpermd), to each 16-bit slot the two bytes its code lies in (vpshufb), shift, mask.
// `vpdpwssd` multiplies them by the 16-bit activations; the sum over a span is exact. The zero-point
// is folded: sum((code - zero) q) = sum(code q) - zero * sum(q), the last known per group.
// Per 32 weights and token: 1 load, 1 dot; per span: 1 convert, 1 multiply-add; per group: 2.
// Bytes moved per weight: bits/8 + (2 + bits/8) / group_size. Expected limit: at M=1 memory above
// about 4 bits, unpacking (5 instructions for 32 codes) below.
#include "kernels.h"

#include <immintrin.h>

namespace lwquant {
namespace {

constexpr int kLaneCodes = 8;

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

constexpr __mmask16 low_words(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

// 32 codes as 16-bit integers; only the words in `present` are read, the others count as zero.
template <int BITS>
__m512i unpack_step(const int32_t* words, __mmask16 present) {
  const __m512i packed = _mm512_maskz_loadu_epi32(present, words);
  if (BITS == 8) return _mm512_cvtepu8_epi16(_mm512_castsi512_si256(packed));
  const Layout<BITS>& layout = kLayout<BITS>;
  const __m512i lanes = _mm512_permutexvar_epi32(_mm512_load_si512(layout.words), packed);
  const __m512i slots = _mm512_shuffle_epi8(lanes, _mm512_load_si512(layout.bytes));
  const __m512i codes = _mm512_srlv_epi16(slots, _mm512_load_si512(layout.shifts));
  return _mm512_and_si512(codes, _mm512_set1_epi16((1 << BITS) - 1));
}

__m512 half_everywhere(uint16_t half) {
  return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(half)));
}

// The zeros of a tile as floats, (n_groups, kTileRows).
template <int BITS>
void tile_zeros(const Weight& w, int64_t row, float* zeros) {
  const int64_t first_word = row / kStep * BITS;
  const int64_t rest = w.zero_words - first_word;
  const __mmask16 present = low_words(rest < BITS ? rest : BITS);
  for (int64_t group = 0; group < w.n_groups; ++group, zeros += kTileRows) {
    __m512i codes = _mm512_set1_epi16(1 << (BITS - 1));
    if (w.zeros) {
      codes = unpack_step<BITS>(w.zeros + group * w.zero_words + first_word, present);
    }
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(codes));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(codes, 1));
    _mm512_storeu_ps(zeros, _mm512_cvtepi32_ps(low));
    _mm512_storeu_ps(zeros + 16, _mm512_cvtepi32_ps(high));
  }
}

template <int BITS, int ROWS, int TOKENS>
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
  const __mmask16 all = low_words(BITS);
  const __mmask16 ending = low_words(w.row_words - last * BITS);
  const int64_t group_steps = (w.group_size + kStep - 1) / kStep;
  const __m512 share = _mm512_set1_ps(1.0f / 16);  // each of 16 lanes carries its part of the zero

  __m512 total[ROWS][TOKENS];
  for (int r = 0; r < ROWS; ++r) {
    for (int t = 0; t < TOKENS; ++t) total[r][t] = _mm512_setzero_ps();
  }
  int64_t step = 0;
  for (int64_t group = 0; group < w.n_groups; ++group) {
    const int64_t group_stop =
        step + group_steps < a.n_steps ? step + group_steps : a.n_steps;
    __m512 sum[ROWS][TOKENS];
    for (int t = 0; t < TOKENS; ++t) {
      const __m512 part = _mm512_mul_ps(share, _mm512_set1_ps(group_sum[t * w.n_groups + group]));
      for (int r = 0; r < ROWS; ++r) {
        sum[r][t] = _mm512_mul_ps(part, _mm512_set1_ps(-zeros[group * kTileRows + r]));
      }
    }
    for (int64_t span = group * a.spans_per_group; step < group_stop; ++span) {
      const int64_t stop = step + kSpanSteps < group_stop ? step + kSpanSteps : group_stop;
      __m512i products[ROWS][TOKENS];
      for (int r = 0; r < ROWS; ++r) {
        for (int t = 0; t < TOKENS; ++t) products[r][t] = _mm512_setzero_si512();
      }
      for (; step < stop; ++step) {
        const __mmask16 present = step == last ? ending : all;
        __m512i weights[ROWS];
        for (int r = 0; r < ROWS; ++r) {
          weights[r] = unpack_step<BITS>(codes + r * w.row_words + step * BITS, present);
        }
        for (int t = 0; t < TOKENS; ++t) {
          const __m512i x = _mm512_loadu_si512(q + t * q_stride + step * kStep);
          for (int r = 0; r < ROWS; ++r) {
            products[r][t] = _mm512_dpwssd_epi32(products[r][t], weights[r], x);
          }
        }
      }
      for (int t = 0; t < TOKENS; ++t) {
        const __m512 scale = _mm512_set1_ps(span_scale[t * span_stride + span]);
        for (int r = 0; r < ROWS; ++r) {
          sum[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[r][t]), scale, sum[r][t]);
        }
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      const __m512 scale = half_everywhere(scales[r * w.n_groups + group]);
      for (int t = 0; t < TOKENS; ++t) {
        total[r][t] = _mm512_fmadd_ps(sum[r][t], scale, total[r][t]);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    const float bias = w.bias ? w.bias[row + r] : 0.0f;
    for (int t = 0; t < TOKENS; ++t) {
      y[(token + t) * w.out_features + row + r] = _mm512_reduce_add_ps(total[r][t]) + bias;
    }
  }
}

template <int BITS, int ROWS>
void multiply_tokens(const Weight& w, const Activations& a, int64_t row, const float* zeros,
                     float* y) {
  int64_t token = 0;
  for (; token + 4 <= a.n_tokens; token += 4) multiply<BITS, ROWS, 4>(w, a, row, token, zeros, y);
  for (; token + 2 <= a.n_tokens; token += 2) multiply<BITS, ROWS, 2>(w, a, row, token, zeros, y);
  for (; token < a.n_tokens; ++token) multiply<BITS, ROWS, 1>(w, a, row, token, zeros, y);
}

template <int BITS>
void tile(const Weight& w, const Activations& a, int64_t row, int64_t n_rows, float* scratch,
          float* y) {
  tile_zeros<BITS>(w, row, scratch);
  int64_t r = 0;
  for (; r + 2 <= n_rows; r += 2) multiply_tokens<BITS, 2>(w, a, row + r, scratch + r, y);
  for (; r < n_rows; ++r) multiply_tokens<BITS, 1>(w, a, row + r, scratch + r, y);
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
  for (; n >= kStep; n -= kStep, words += BITS, codes += kStep) {
    const __m512i step = unpack_step<BITS>(words, low_words(BITS));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm512_cvtepi16_epi8(step));
  }
  if (n > 0) {
    const int64_t n_words = (n * BITS + kWordBits - 1) / kWordBits;
    const __m512i step = unpack_step<BITS>(words, low_words(n_words));
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

const Isa kAvx512Vnni = {"avx512_vnni", unpack_any, linear_tile};

}  // namespace lwquant
