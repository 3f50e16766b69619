// y = x Wᵀ with AVX-512 VNNI, straight from the stored row stream, 2 rows x up to 4 tokens at once.
//
// 32 codes are exactly `bits` words: load them, bring to each 128-bit lane the words of its 8
// codes (vpermd), to each 16-bit slot the two bytes its code lies in (vpshufb), shift, mask.
// `vpdpwssd` multiplies them by the 16-bit activations; the sum over a span is exact. The zero-point
// is folded: sum((code - zero) q) = sum(code q) - zero * sum(q), the last known per group.
// Per 32 weights and token: 1 load, 1 dot; per span: 1 convert, 1 multiply-add; per group: 2 more.
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

// The zeros of a tile, negated and divided among the 16 lanes of a sum: (n_groups, kTileRows).
template <int BITS>
void tile_zeros(const Weight& w, int64_t row, float* zeros) {
  const int64_t first_word = row / kStep * BITS;
  const __m512 share = _mm512_set1_ps(-(w.zero_bytes ? byte_zero_step(BITS) : 1.0f) / 16);
  const int64_t rest = w.out_features - row;
  const __mmask32 present = static_cast<__mmask32>((1ull << (rest < kStep ? rest : kStep)) - 1);
  for (int64_t group = 0; group < w.n_groups; ++group, zeros += kTileRows) {
    __m512i codes = _mm512_set1_epi16(1 << (BITS - 1));
    if (w.zeros) {
      const int32_t* words = w.zeros + group * w.zero_words + first_word;
      codes = unpack_step<BITS>(words, w.zero_words - first_word);
    } else if (w.zero_bytes) {
      const uint8_t* bytes = w.zero_bytes + group * w.out_features + row;
      codes = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(present, bytes));
    }
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(codes));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(codes, 1));
    _mm512_storeu_ps(zeros, _mm512_mul_ps(_mm512_cvtepi32_ps(low), share));
    _mm512_storeu_ps(zeros + 16, _mm512_mul_ps(_mm512_cvtepi32_ps(high), share));
  }
}

void row_scales(const Weight& w, int64_t row, float* scales) {
  const uint8_t* bytes = w.scales ? nullptr : w.scale_bytes + row * (1 + w.n_groups);
  const int first = bytes ? *bytes << kByteExponent : 0;
  const __m256i start = _mm256_set1_epi16(static_cast<int16_t>(first));
  for (int64_t group = 0; group < w.n_groups; group += 16) {
    const int64_t rest = w.n_groups - group;
    const __mmask16 present = static_cast<__mmask16>((1u << (rest < 16 ? rest : 16)) - 1);
    __m256i halves;
    if (!bytes) {
      halves = _mm256_maskz_loadu_epi16(present, w.scales + row * w.n_groups + group);
    } else {
      const __m128i sixteen = _mm_maskz_loadu_epi8(present, bytes + 1 + group);
      const __m256i above = _mm256_slli_epi16(_mm256_cvtepu8_epi16(sixteen), kByteStep);
      halves = _mm256_add_epi16(start, above);
    }
    _mm512_storeu_ps(scales + group, _mm512_cvtph_ps(halves));
  }
}

// Two rows, which may be the same one; what a row needs, at hand.
struct Rows {
  const int32_t* codes[2];
  const float* zeros[2];   // stride kTileRows over groups
  const float* scales[2];  // stride 1 over groups
};

// One step of 32 inputs: exact integer sums of code * q. `rest`: words left in the row.
template <int BITS, int TOKENS>
inline __attribute__((always_inline)) void add_step(const Rows& rows, int64_t word, int64_t rest,
                                                    const int16_t* q, int64_t q_stride,
                                                    __m512i (&products)[2][TOKENS]) {
  const __m512i first = unpack_step<BITS>(rows.codes[0] + word, rest);
  const __m512i second = unpack_step<BITS>(rows.codes[1] + word, rest);
  for (int t = 0; t < TOKENS; ++t) {
    const __m512i x = _mm512_loadu_si512(q + t * q_stride);
    products[0][t] = _mm512_dpwssd_epi32(products[0][t], first, x);
    products[1][t] = _mm512_dpwssd_epi32(products[1][t], second, x);
  }
}

template <int BITS, int STEPS, int TOKENS>
void multiply(const Weight& w, const Activations& a, const Rows& given, int64_t token,
              __m512 (&total)[2][TOKENS]) {
  const Rows rows = given;  // a copy the stores below cannot alias
  const int64_t q_stride = a.n_steps * kStep;
  const int16_t* q = a.q + token * q_stride;
  const float* span_scale = a.span_scale + token * a.n_spans;
  const float* group_sum = a.group_sum + token * w.n_groups;
  // Spans that end this many words before the row does need no care in loading.
  const int64_t careful = w.row_words - STEPS * BITS - 8;

  for (int r = 0; r < 2; ++r) {
    for (int t = 0; t < TOKENS; ++t) total[r][t] = _mm512_setzero_ps();
  }
  int64_t span = 0;
  int64_t word = 0;
  for (int64_t group = 0; group < w.n_groups; ++group) {
    __m512 sum[2][TOKENS];
    for (int t = 0; t < TOKENS; ++t) {
      const __m512 inputs = _mm512_set1_ps(group_sum[t * w.n_groups + group]);
      for (int r = 0; r < 2; ++r) {
        sum[r][t] = _mm512_mul_ps(inputs, _mm512_set1_ps(rows.zeros[r][group * kTileRows]));
      }
    }
    const int64_t all = span + a.spans_per_group;
    const int64_t stop = all < a.n_spans ? all : a.n_spans;
    for (; span < stop; ++span) {
      __m512i products[2][TOKENS];
      for (int r = 0; r < 2; ++r) {
        for (int t = 0; t < TOKENS; ++t) products[r][t] = _mm512_setzero_si512();
      }
      if (word <= careful) {
        // The next two rows: the hardware follows two interleaved rows badly, and stops at pages.
        // Beyond the end of the weight a prefetch does nothing.
        for (int ahead = 0; ahead < STEPS * BITS; ahead += 16) {
          for (int r = 0; r < 2; ++r) {
            const int32_t* next = rows.codes[r] + 2 * w.row_words + word + ahead;
            _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
          }
        }
#pragma GCC unroll 4
        for (int step = 0; step < STEPS; ++step, word += BITS, q += kStep) {
          add_step<BITS, TOKENS>(rows, word, kWordBits, q, q_stride, products);
        }
      } else {
        for (int step = 0; step < STEPS && word < w.row_words; ++step, word += BITS, q += kStep) {
          add_step<BITS, TOKENS>(rows, word, w.row_words - word, q, q_stride, products);
        }
      }
      for (int t = 0; t < TOKENS; ++t) {
        const __m512 scale = _mm512_set1_ps(span_scale[t * a.n_spans + span]);
        for (int r = 0; r < 2; ++r) {
          sum[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[r][t]), scale, sum[r][t]);
        }
      }
    }
    for (int r = 0; r < 2; ++r) {
      const __m512 scale = _mm512_set1_ps(rows.scales[r][group]);
      for (int t = 0; t < TOKENS; ++t) {
        total[r][t] = _mm512_fmadd_ps(sum[r][t], scale, total[r][t]);
      }
    }
  }
}

// y for two rows (the same one twice: the second result overwrites the first) and TOKENS tokens.
template <int BITS, int STEPS, int TOKENS>
void store(const Weight& w, const Activations& a, const Rows& rows, const int64_t (&row)[2],
           int64_t token, float* y) {
  __m512 total[2][TOKENS];
  multiply<BITS, STEPS, TOKENS>(w, a, rows, token, total);
  for (int r = 0; r < 2; ++r) {
    const float bias = w.bias ? w.bias[row[r]] : 0.0f;
    for (int t = 0; t < TOKENS; ++t) {
      y[(token + t) * w.out_features + row[r]] = _mm512_reduce_add_ps(total[r][t]) + bias;
    }
  }
}

template <int BITS, int STEPS>
void tile(const Weight& w, const Activations& a, int64_t first_row, int64_t n_rows,
          float* scratch, float* y) {
  float* zeros = scratch;
  float* scales = scratch + w.n_groups * kTileRows;
  tile_zeros<BITS>(w, first_row, zeros);
  for (int64_t place = 0; place < n_rows; place += 2) {
    Rows rows;
    int64_t row[2];
    for (int r = 0; r < 2; ++r) {
      const int64_t here = place + r < n_rows ? place + r : place;
      row[r] = first_row + here;
      float* row_scale = scales + r * (w.n_groups + 16);
      row_scales(w, row[r], row_scale);
      rows.codes[r] = w.codes + row[r] * w.row_words;
      rows.zeros[r] = zeros + here;
      rows.scales[r] = row_scale;
    }
    int64_t t = 0;
    for (; t + 4 <= a.n_tokens; t += 4) store<BITS, STEPS, 4>(w, a, rows, row, t, y);
    for (; t + 2 <= a.n_tokens; t += 2) store<BITS, STEPS, 2>(w, a, rows, row, t, y);
    for (; t < a.n_tokens; ++t) store<BITS, STEPS, 1>(w, a, rows, row, t, y);
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

const Isa kAvx512Vnni = {"avx512_vnni", unpack_any, linear_tile, &kAvx512Rounding};

}  // namespace lwquant
