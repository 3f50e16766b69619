// The tiles' matmul with AVX-512 VNNI.
//
// A vector is four inputs of 16 rows, multiplied by four activations as products_vnni.inc says.
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

namespace lwquant {
namespace {

#include "vectors_512.inc"

constexpr int kPanelSums = 16;  // of the 32 registers

// Adds the products of 64 codes and four int8 activations, the same for every row. In assembly,
// since g++ 12 copies every sum before it adds to it.
INLINE void add_products(Vec& sum, Vec codes, const uint8_t* four) {
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(codes), "m"(*reinterpret_cast<const int32_t*>(four)));
}

INLINE void add_products(Vec& sum, Vec codes, Vec four) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(four));
}

#include "products_vnni.inc"
#include "multiply_tiles.inc"

constexpr int kFloats = 16;  // of a vector

// The low bytes of 16 integers.
INLINE void store_bytes(__m512i q, uint8_t* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(q));
}

}  // namespace

Span quantize_span_avx512(const float* x, int64_t n, int64_t n_padded, int bits, uint8_t* quads) {
  __m512 inputs[kMaxSpanBlocks * kBlockInputs / kFloats];
  const int64_t n_vectors = n_padded / kFloats;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t v = 0; v < n_vectors; ++v) {
    inputs[v] = _mm512_maskz_loadu_ps(first_of_16(n - v * kFloats), x + v * kFloats);
    const __m512i own = _mm512_and_si512(_mm512_castps_si512(inputs[v]), magnitude);
    largest = _mm512_max_epu32(largest, own);
  }
  const uint32_t pattern = _mm512_reduce_max_epu32(largest);
  if (pattern >= kInfinityBits) return {0.0f, 0, false};
  float range;
  memcpy(&range, &pattern, sizeof range);
  range = range < kSmallestRange ? kSmallestRange : range;
  const float steps = static_cast<float>(largest_activation(bits));
  const __m512 inverse = _mm512_set1_ps(steps / range);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t v = 0; v < n_vectors; ++v) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(inputs[v], inverse));  // to nearest
    sum = _mm512_add_epi32(sum, q);
    uint8_t* out = quads + v * kFloats;
    if (bits == 16) {
      const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(q, 24), 24);
      store_bytes(_mm512_srai_epi32(_mm512_sub_epi32(q, low), 8), out);
      out += n_padded;
    }
    store_bytes(q, out);
  }
  return {range / steps, _mm512_reduce_add_epi32(sum), true};
}

// To nearest even; NaN stays NaN, which adding to its bits could lose.
void narrow_to_bf16_avx512(const float* from, int64_t n, uint16_t* to) {
  for (int64_t k = 0; k < n; k += kFloats) {
    const __mmask16 present = first_of_16(n - k);
    const __m512 values = _mm512_maskz_loadu_ps(present, from + k);
    _mm256_mask_storeu_epi16(to + k, present, to_bf16(values));
  }
}

void multiply_tiles_avx512(const Tiles& w, const Activations& a, int64_t tile, int64_t n_tiles,
                           const float* bias, float* y) {
  multiply_tiles(w, a, tile, n_tiles, bias, y);
}

const Isa kAvx512Vnni = {"avx512_vnni", unpack_row_avx512, quantize_span_avx512,
                         multiply_tiles_avx512, &kAvx512Rounding};

}  // namespace lwquant
