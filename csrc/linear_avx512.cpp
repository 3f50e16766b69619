// The tiles' matmul with AVX-512 VNNI.
//
// A vector is four inputs of 16 rows, multiplied by four activations as products_vnni.inc says.
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

namespace lwquant {
namespace {

#define INLINE inline __attribute__((always_inline))

using Vec = __m512i;
using Floats = __m512;
using Halves = __m256i;

constexpr int kRows = 16;
constexpr int kPanelSums = 16;  // of the 32 registers

INLINE Vec load(const uint8_t* p) { return _mm512_load_si512(p); }
INLINE void store(uint8_t* p, Vec v) { _mm512_store_si512(p, v); }
INLINE Vec none() { return _mm512_setzero_si512(); }
INLINE Vec add(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
INLINE Vec broadcast(const uint8_t* at) {
  int32_t four;
  memcpy(&four, at, sizeof four);
  return _mm512_set1_epi32(four);
}

template <int N>
INLINE Vec shift_right(Vec v) {
  return _mm512_srli_epi16(v, N);
}
INLINE Vec keep(Vec v, int bits) {
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(bits)));
}
INLINE Vec merge(Vec a, Vec b, int bits) {
  constexpr int kOrAnd = 0xf8;  // a | (b & c)
  return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi8(static_cast<char>(bits)), kOrAnd);
}

INLINE Floats load(const float* p) { return _mm512_load_ps(p); }
INLINE void store(float* p, Floats v) { _mm512_store_ps(p, v); }
INLINE Floats all(float value) { return _mm512_set1_ps(value); }
INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }

INLINE __m128i load_bytes(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
INLINE Halves widen(const uint8_t* p) { return _mm256_cvtepu8_epi16(load_bytes(p)); }
INLINE Halves load_halves(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
template <int N>
INLINE Halves shift_left(Halves v) {
  return _mm256_slli_epi16(v, N);
}
INLINE Halves add(Halves a, Halves b) { return _mm256_add_epi16(a, b); }
INLINE Floats to_floats(Vec v) { return _mm512_cvtepi32_ps(v); }
INLINE Floats to_floats(Halves v) { return _mm512_cvtph_ps(v); }
INLINE Floats bytes_to_floats(const uint8_t* p) {
  return to_floats(_mm512_cvtepu8_epi32(load_bytes(p)));
}

INLINE void store_rows(float* out, Floats rows, const float* bias, int64_t n) {
  const __mmask16 present = static_cast<__mmask16>((1u << n) - 1);
  const Floats shift = bias ? _mm512_maskz_loadu_ps(present, bias) : _mm512_setzero_ps();
  _mm512_mask_storeu_ps(out, present, _mm512_add_ps(rows, shift));
}

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

INLINE Vec both_bytes(Vec high, Vec low) { return add(low, _mm512_slli_epi32(high, 8)); }

#include "products_vnni.inc"
#include "multiply_tiles.inc"

constexpr int kFloats = 16;  // of a vector

// 16 of q as quads of int8: high bytes and low ones in turns.
INLINE void store_wide(__m512i q, uint8_t* quads) {
  const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(q, 24), 24);
  const __m128i high_bytes = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_sub_epi32(q, low), 8));
  const __m128i low_bytes = _mm512_cvtepi32_epi8(low);
  __m128i* out = reinterpret_cast<__m128i*>(quads);
  _mm_storeu_si128(out, _mm_unpacklo_epi32(high_bytes, low_bytes));
  _mm_storeu_si128(out + 1, _mm_unpackhi_epi32(high_bytes, low_bytes));
}

Span quantize_span(const float* x, int64_t n, int64_t n_padded, int bits, uint8_t* quads) {
  __m512 inputs[kMaxSpanBlocks * kBlockInputs / kFloats];
  const int64_t n_vectors = n_padded / kFloats;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t v = 0; v < n_vectors; ++v) {
    const int64_t rest = n - v * kFloats;
    const __mmask16 present = static_cast<__mmask16>(
        rest >= kFloats ? 0xffffu : rest > 0 ? (1u << rest) - 1 : 0);
    inputs[v] = _mm512_maskz_loadu_ps(present, x + v * kFloats);
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
    if (bits == 8) {
      __m128i* out = reinterpret_cast<__m128i*>(quads) + v;
      _mm_storeu_si128(out, _mm512_cvtepi32_epi8(q));
    } else {
      store_wide(q, quads + v * 2 * kFloats);
    }
  }
  return {range / steps, _mm512_reduce_add_epi32(sum), true};
}

}  // namespace

const Isa kAvx512Vnni = {"avx512_vnni", unpack_row_avx512, quantize_span, multiply_tiles, &kAvx512Rounding};

}  // namespace lwquant
