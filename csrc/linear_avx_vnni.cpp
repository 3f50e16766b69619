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

INLINE void add_products(Vec& sum, Vec codes, const uint8_t* four) {
  add_products(sum, codes, broadcast(four));
}

#include "products_vnni.inc"
#include "multiply_tiles.inc"

}  // namespace

const Isa kAvxVnni = {"avx_vnni", unpack_row_avx2, quantize_span, multiply_tiles, &kAvx2Rounding};

}  // namespace lwquant
