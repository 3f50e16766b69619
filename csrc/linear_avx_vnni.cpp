// The tiles' matmul with AVX-VNNI: `vpdpbusd` where there is no AVX-512.
//
// A vector is four inputs of 8 rows; otherwise as linear_avx512.cpp. AVX-512 has the same instruction
// in another encoding, so tests that define LWQUANT_VNNI_OF_AVX512 run this file on processors that
// have only that one.
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

namespace lwquant {
namespace {

#include "vectors_256.inc"

constexpr bool kSplit = true;

#include "quantize_span.inc"

INLINE void add_products(Vec& sum, Vec codes, Vec four) {
#ifdef LWQUANT_VNNI_OF_AVX512
  sum = _mm256_dpbusd_epi32(sum, codes, four);
#else
  sum = _mm256_dpbusd_avx_epi32(sum, codes, four);
#endif
}

template <int BITS, int BYTES>
struct Products {
  static constexpr int kRun = 1, kParts = BYTES;

  struct Quads {
    Vec of[BYTES];

    INLINE explicit Quads(const uint8_t* at) {
      for (int b = 0; b < BYTES; ++b) {
        int32_t four;
        memcpy(&four, at + b * kQuad, sizeof four);
        of[b] = _mm256_set1_epi32(four);
      }
    }
  };

  static INLINE void add(Vec& high, Vec& low, const Vec* codes, const Quads& quads) {
    if (BYTES == 2) add_products(high, *codes, quads.of[0]);
    add_products(low, *codes, quads.of[BYTES - 1]);
  }

  static INLINE void add_at(Vec& high, Vec& low, const Vec* codes, const uint8_t* quads) {
    add(high, low, codes, Quads(quads));
  }

  static INLINE Floats total(Vec high, Vec low) {
    if (BYTES == 2) low = _mm256_add_epi32(low, _mm256_slli_epi32(high, 8));
    return _mm256_cvtepi32_ps(low);
  }
};

#include "multiply_tiles.inc"

}  // namespace

const Isa kAvxVnni = {"avx_vnni", unpack_row_avx2, quantize_span, multiply_tiles, &kAvx2Rounding};

}  // namespace lwquant
