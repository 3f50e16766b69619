// Unpacking of row streams with AVX2.
//
// 32 codes are exactly `bits` words, loaded once and unpacked in two halves of 16. AVX2 has no 16-bit
// variable right shift, so a code is moved to the top of its slot by a multiplication with a power
// of two, then down by one common shift.
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

namespace lwquant {
namespace {

#include "vectors_256.inc"
#include "with_width.inc"

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

}  // namespace

void unpack_row_avx2(int bits, const int32_t* words, int64_t n, uint8_t* codes) {
  with_width(bits, [&](auto width) { unpack<width.bits>(words, n, codes); });
}

}  // namespace lwquant
