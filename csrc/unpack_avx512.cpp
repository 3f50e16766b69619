// Unpacking of row streams with AVX-512.
//
// 32 codes are exactly `bits` words: load them, bring to each 128-bit lane the words of its 8 codes
// (vpermd), to each 16-bit slot the two bytes its code lies in (vpshufb), shift, mask.
#include "kernels.h"

#include <immintrin.h>

namespace lwquant {
namespace {

#include "with_width.inc"

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

}  // namespace

void unpack_row_avx512(int bits, const int32_t* words, int64_t n, uint8_t* codes) {
  with_width(bits, [&](auto width) { unpack<width.bits>(words, n, codes); });
}

}  // namespace lwquant
