// Many tokens with AMX: weights are unpacked to bf16, scales and zeros in them, and the products of
// all inputs add up in tile registers. With integers the sums of every group would have to be scaled
// by themselves, which takes several times as long as the products.
//
// A tile register of weights holds 32 inputs of 16 rows, as 16 pairs of inputs by 16 rows; one of
// inputs the same of 16 tokens. Rounding takes 2^-8 of a weight and of an input at most.
// Expected limit: unpacking, as long as the products of 50 tokens, and reading both registers' lines
// from the L2 cache.
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

#ifdef LWQUANT_EMULATE_AMX
#include "emulated_amx.h"
#endif

namespace lwquant {
namespace {

#include "vectors_512.inc"

#include "unpack_block.inc"
#include "walk_tiles.inc"
#include "with_width.inc"
#include "amx_registers.inc"
#include "amx_strips.inc"

constexpr int kStepInputs = 32;
static_assert(kStepInputs == kBlockInputs, "a block makes a register of weights");

// The upper halves of two vectors of float32, in pairs.
INLINE Vec pairs(Vec first, Vec second) {
  constexpr __mmask32 kSecond = 0xaaaaaaaa;
  return _mm512_mask_blend_epi16(kSecond, _mm512_srli_epi32(first, 16), second);
}

// Codes of 16 rows, four inputs each, as weights: two rows of a register.
struct Weights {
  Floats scale, below;

  // A code c in the upper bits of a mantissa is 1 + c / 256.
  INLINE Weights(const GroupParams& of_group)
      : scale(multiply(of_group.scales[0], all(256.0f))),
        below(_mm512_add_ps(scale, of_group.below[0])) {}

  INLINE void write(Vec codes, uint8_t* out) const {
    store(out, pairs(one(_mm512_slli_epi32(codes, 15)), one(_mm512_slli_epi32(codes, 7))));
    store(out + kLine, pairs(one(_mm512_srli_epi32(codes, 1)), one(_mm512_srli_epi32(codes, 9))));
  }

 private:
  // Rounded to nearest for the 16 upper bits; ties go away from zero.
  INLINE Vec one(Vec shifted) const {
    const Vec code_bits = _mm512_set1_epi32(0xff << 15), unit = _mm512_set1_epi32(0x3f800000);
    constexpr int kOrAnd = 0xf8;
    const Vec mantissa = _mm512_ternarylogic_epi32(unit, shifted, code_bits, kOrAnd);
    const Floats weight = _mm512_fmsub_ps(_mm512_castsi512_ps(mantissa), scale, below);
    return add(_mm512_castps_si512(weight), _mm512_set1_epi32(0x8000));
  }
};

// The inputs [first, first + n) of a tile, (n / 32, 16, 16, 2) bf16; both are multiples of 32.
template <int BITS>
void unpack_weights(const Tiles& w, int64_t tile, int64_t first, int64_t n, uint8_t* out) {
  Params params;
  params.begin(w, tile);
  params.at += first / w.is.group_size * w.group_bytes;
  GroupParams of_group;
  params.next(w, of_group);
  int64_t group_rest = w.is.group_size - first % w.is.group_size;
  const uint8_t* codes = w.first + tile * w.tile_bytes + w.codes_offset;
  codes += first / kBlockInputs * BITS * kLine;
  while (n > 0) {
    const Weights weights(of_group);
    for (; n > 0 && group_rest > 0; n -= kBlockInputs, group_rest -= kBlockInputs) {
      Vec unpacked[kBlockVectors];
      fetch<kIntoL2>(codes + kFar, BITS);
      fetch<kIntoL1>(codes + kNear, BITS);
      unpack_at<BITS>(codes, unpacked);
      for (Vec four : unpacked) {
        weights.write(four, out);
        out += 2 * kLine;
      }
      codes += BITS * kLine;
    }
    if (n > 0) params.next(w, of_group);
    group_rest = w.is.group_size;
  }
}

// Sums of SETS sets of tokens and TILES tiles.
template <int SETS, int TILES>
struct SetSums {
  alignas(kLine) float of[SETS][TILES][kSetTokens][kTileOutputs];

  // Registers 0 to 3 are the sums, 4 and 5 inputs of the sets, 6 and 7 weights of the tiles.
  __attribute__((noinline)) void multiply(const uint8_t* inputs, const uint8_t* weights,
                                          int64_t n_steps) {
    const uint8_t *second_set = inputs + n_steps * kStepBytes,
                  *second_tile = weights + n_steps * kStepBytes;
    asm volatile("" ::: "memory");  // g++ 12 does not know that registers are loaded from memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t at = 0; at < n_steps * kStepBytes; at += kStepBytes) {
      _tile_loadd(4, inputs + at, kLine);
      _tile_loadd(6, weights + at, kLine);
      _tile_dpbf16ps(0, 4, 6);
      if (TILES == 2) {
        _tile_loadd(7, second_tile + at, kLine);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (SETS == 2) {
        _tile_loadd(5, second_set + at, kLine);
        _tile_dpbf16ps(2, 5, 6);
        if (TILES == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, of[0][0], kLine);
    if (TILES == 2) _tile_stored(1, of[0][TILES - 1], kLine);
    if (SETS == 2) _tile_stored(2, of[SETS - 1][0], kLine);
    if (SETS == 2 && TILES == 2) _tile_stored(3, of[SETS - 1][TILES - 1], kLine);
    asm volatile("" ::: "memory");
  }
};

template <int SETS, int TILES>
void multiply_sets(const PanelInputs& x, int64_t set, const uint8_t* weights, const Results& y) {
  const int64_t n_steps = x.n_inputs / kStepInputs, first = set * kSetTokens;
  const uint8_t* inputs = x.values + set * n_steps * kStepBytes;
  SetSums<SETS, TILES> sums;
  sums.multiply(inputs, weights, n_steps);
  for (int64_t t = 0; t < SETS * kSetTokens && first + t < x.n_tokens; ++t) {
    for (int r = 0; r < TILES; ++r) {
      y.put(first + t, r, load(sums.of[t / kSetTokens][r][t % kSetTokens]));
    }
  }
}

template <int BITS, int TILES>
void multiply_strip(const Tiles& w, const PanelInputs& x, int64_t tile, uint8_t* weights,
                    const Results& y) {
  const int64_t tile_bytes = x.n_inputs / kStepInputs * kStepBytes;
  for (int r = 0; r < TILES; ++r) {
    unpack_weights<BITS>(w, tile + r, x.first_input, x.n_inputs, weights + r * tile_bytes);
  }
  const int64_t n_sets = (x.n_tokens + kSetTokens - 1) / kSetTokens;
  int64_t set = 0;
  for (; set + 2 <= n_sets; set += 2) multiply_sets<2, TILES>(x, set, weights, y);
  if (set < n_sets) multiply_sets<1, TILES>(x, set, weights, y);
}

INLINE __m256i load_rounded(__mmask16 present, const float* from) {
  return to_bf16(_mm512_maskz_loadu_ps(present, from));
}

INLINE __m256i load_rounded(__mmask16 present, const uint16_t* from) {
  return _mm256_maskz_loadu_epi16(present, from);
}

template <typename T>
bool arrange(const T* x, int64_t n_tokens, int64_t stride, int64_t n, int64_t n_padded,
             uint8_t* values, float*) {
  const int64_t n_sets = (n_tokens + kSetTokens - 1) / kSetTokens;
  for (int64_t token = 0; token < n_sets * kSetTokens; ++token) {
    const T* from = x + token * stride;
    uint8_t* set = values + token / kSetTokens * (n_padded / kStepInputs) * kStepBytes;
    uint8_t* to = set + token % kSetTokens * kLine;
    for (int64_t k = 0; k < n_padded; k += kRows) {
      const __mmask16 present = first_of_16(token < n_tokens ? n - k : 0);
      const int64_t place = k / kStepInputs * kStepBytes + k % kStepInputs * 2;
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + place), load_rounded(present, from + k));
    }
  }
  return true;
}

}  // namespace

const PanelKernels kAmxBf16 = {
    "bf16", 2, kStepInputs, arrange<float>, arrange<uint16_t>, multiply_strips, narrow_to_bf16_avx512};

}  // namespace lwquant
