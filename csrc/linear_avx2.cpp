// The tiles' matmul with AVX2.
//
// A vector is four inputs of 8 rows. 8-bit activations: `vpmaddubsw` adds products two by two in
// 16 bits, as many vectors of them as 16 bits hold, and `vpmaddwd` adds the pairs up. It would
// saturate with codes of 8 bits, and 16-bit activations do not fit: those take `vpmaddwd` alone.
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

namespace lwquant {
namespace {

#include "vectors_256.inc"

constexpr bool kSplit = false;

#include "quantize_span.inc"

// Vectors whose products, two by two, add up to less than 2^15.
constexpr int run_length(int bits) {
  int n = kBlockVectors;
  while (n * 2 * largest_activation(8) * ((1 << bits) - 1) > 0x7fff) n /= 2;
  return n;
}

template <int BITS, int BYTES, bool PAIRS = BYTES == 1 && BITS < 8>
struct Products {
  static constexpr int kRun = run_length(BITS), kParts = 1, kQuadBytes = kQuad;

  struct Quads {
    Vec of[kRun];

    INLINE Quads(const uint8_t* at, int64_t) {
      for (int i = 0; i < kRun; ++i) of[i] = broadcast(at + i * kQuad);
    }
  };

  static INLINE void add(Vec& sum, Vec&, const Vec* codes, const Quads& quads) {
    Vec pairs = _mm256_maddubs_epi16(codes[0], quads.of[0]);
    for (int i = 1; i < kRun; ++i) {
      pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes[i], quads.of[i]));
    }
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }

  static INLINE void add_at(Vec& sum, Vec& same, const Vec* codes, const uint8_t* quads,
                            int64_t) {
    add(sum, same, codes, Quads(quads, 0));
  }

  static INLINE Floats total(Vec sum, Vec) { return to_floats(sum); }
};

// Rows 0, 1, 4, 5 and rows 2, 3, 6, 7 apart, each the sum of two neighbours.
template <int BITS, int BYTES>
struct Products<BITS, BYTES, false> {
  static constexpr int kRun = 1, kParts = 2, kQuadBytes = BYTES * kQuad;

  struct Quads {
    Vec four;

    INLINE Quads(const uint8_t* at, int64_t) {
      if (BYTES == 1) {
        four = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(broadcast(at)));
      } else {
        int64_t words;
        memcpy(&words, at, sizeof words);
        four = _mm256_set1_epi64x(words);
      }
    }
  };

  static INLINE void add(Vec& first, Vec& second, const Vec* codes, const Quads& quads) {
    const Vec low = _mm256_unpacklo_epi8(*codes, _mm256_setzero_si256());
    const Vec high = _mm256_unpackhi_epi8(*codes, _mm256_setzero_si256());
    first = _mm256_add_epi32(first, _mm256_madd_epi16(low, quads.four));
    second = _mm256_add_epi32(second, _mm256_madd_epi16(high, quads.four));
  }

  static INLINE void add_at(Vec& first, Vec& second, const Vec* codes, const uint8_t* quads,
                            int64_t) {
    add(first, second, codes, Quads(quads, 0));
  }

  static INLINE Floats total(Vec first, Vec second) {
    return to_floats(_mm256_hadd_epi32(first, second));
  }
};

#include "multiply_tiles.inc"

}  // namespace

const Isa kAvx2 = {"avx2", unpack_row_avx2, quantize_span, multiply_tiles, &kAvx2Rounding};

}  // namespace lwquant
