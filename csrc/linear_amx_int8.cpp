// Many tokens with AMX where 8-bit activations do: weights are unpacked to int8, too, scales and
// zeros in them, so that the products of a whole span of 256 inputs add up in tile registers before
// anything has to be scaled. A weight is then off by up to 1/254 of the largest in its row's span,
// as an input is of its token's.
//
// A tile register of weights holds 64 inputs of 16 rows, as 16 fours of inputs by 16 rows; one of
// inputs the same of 16 tokens.
// Expected limit: the products, and reading the inputs' registers from the L2 cache.
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

constexpr int kSpanInputs = 256;
constexpr int kStepInputs = 64;
constexpr int kSpanSteps = kSpanInputs / kStepInputs;
constexpr int kSpanBytes = kSpanSteps * kStepBytes;  // of a set, or of a tile
constexpr int kScaledAtOnce = kPairTokens / kSpanSteps;  // tokens, between the products of a step
constexpr int kTotalPairs = 4;  // whose totals stay in the L1 cache
constexpr float kLargest = 127;

constexpr int64_t steps_of(int64_t n_inputs) { return (n_inputs + kStepInputs - 1) / kStepInputs; }

INLINE Floats magnitude(Floats v) { return _mm512_abs_ps(v); }

// Of magnitudes, by their bits: NaN is the largest, so that it is not lost.
INLINE Floats larger(Floats a, Floats b) {
  return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}

// The largest weight that a row's codes of a group may stand for.
template <int BITS>
INLINE Floats reach(const GroupParams& of_group) {
  const Floats top = all(static_cast<float>((1 << BITS) - 1));
  const Floats highest = _mm512_fmsub_ps(of_group.scales[0], top, of_group.below[0]);
  return larger(magnitude(of_group.below[0]), magnitude(highest));
}

// One value of sixteen bits for each row, for its two pairs of inputs. What is larger is the largest.
INLINE Vec in_halves(Floats values) {
  const Vec integers = _mm512_cvtepi16_epi32(_mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(values)));
  return _mm512_mask_blend_epi16(0xaaaaaaaa, integers, _mm512_slli_epi32(integers, 16));
}

INLINE Vec upper_bytes(Vec even, Vec odd) {
  constexpr int kOrAnd = 0xf8;
  return _mm512_ternarylogic_epi32(_mm512_srli_epi16(even, 8), odd,
                                   _mm512_set1_epi16(static_cast<int16_t>(0xff00)), kOrAnd);
}

// Codes of 16 rows, four inputs each, to int8: in sixteen bits, of which the upper eight remain.
template <int BITS, bool WIDE = (BITS > 6)>
class Requantized {
 public:
  INLINE Requantized(const GroupParams& of_group, Floats per_step)
      : factor_(in_halves(multiply(of_group.scales[0], per_step))),
        shift_(in_halves(fnma(of_group.below[0], per_step, all(128.0f)))) {}

  // Eight bits of fraction in the factor leave a weight off by an eighth of a step at most.
  INLINE Vec of(Vec codes) const {
    return upper_bytes(scaled(_mm512_and_si512(codes, _mm512_set1_epi16(0xff))),
                       scaled(_mm512_srli_epi16(codes, 8)));
  }

 private:
  INLINE Vec scaled(Vec codes) const {
    return _mm512_add_epi16(_mm512_mullo_epi16(codes, factor_), shift_);
  }

  Vec factor_, shift_;
};

// Of 7 and 8 bits it would be half a step. So these begin at the top of sixteen bits, their middle
// at 0, and meet a factor of fifteen bits, of which eight remain.
template <int BITS>
class Requantized<BITS, true> {
 public:
  INLINE Requantized(const GroupParams& of_group, Floats per_step) {
    const Floats scales = multiply(of_group.scales[0], per_step);
    const Floats below = fnma(of_group.scales[0], all(kMiddle), of_group.below[0]);
    factor_ = in_halves(multiply(scales, all(kFactor)));
    shift_ = in_halves(fnma(below, per_step, all(128.0f)));
  }

  INLINE Vec of(Vec codes) const {
    codes = _mm512_xor_si512(codes, _mm512_set1_epi8(static_cast<int8_t>(1 << (BITS - 1))));
    Vec odd = BITS < 8 ? _mm512_slli_epi16(codes, 8 - BITS) : codes;
    odd = _mm512_and_si512(odd, _mm512_set1_epi16(static_cast<int16_t>(0xff00)));
    return upper_bytes(scaled(_mm512_slli_epi16(codes, 16 - BITS)), scaled(odd));
  }

 private:
  static constexpr float kMiddle = 1 << (BITS - 1);
  static constexpr float kFactor = 1 << (BITS - 1);

  INLINE Vec scaled(Vec codes) const {
    return _mm512_add_epi16(_mm512_mulhrs_epi16(codes, factor_), shift_);
  }

  Vec factor_, shift_;
};

// The inputs [first, first + n) of a tile: spans, `span_stride` bytes apart, and the scale of every
// row of each, `scale_stride` apart.
template <int BITS>
void unpack_weights(const Tiles& w, int64_t tile, int64_t first, int64_t n, int64_t span_stride,
                    uint8_t* out, int64_t scale_stride, float* scales) {
  const int64_t group_inputs =
      (w.is.group_size + kBlockInputs - 1) / kBlockInputs * kBlockInputs;
  Params params;
  params.begin(w, tile);
  params.at += first / group_inputs * w.group_bytes;
  GroupParams of_group;
  params.next(w, of_group);
  int64_t group_rest = group_inputs - first % group_inputs;
  const uint8_t* codes = w.first + tile * w.tile_bytes + w.codes_offset;
  codes += first / kBlockInputs * BITS * kLine;
  for (; n > 0; n -= kSpanInputs, out += span_stride, scales += scale_stride) {
    int64_t rest = n < kSpanInputs ? n : kSpanInputs;
    if (group_rest == 0) {
      params.next(w, of_group);
      group_rest = group_inputs;
    }
    Floats range = reach<BITS>(of_group);
    Params ahead = params;
    for (int64_t seen = group_rest; seen < rest; seen += group_inputs) {
      GroupParams next;
      ahead.next(w, next);
      range = larger(range, reach<BITS>(next));
    }
    const __mmask16 some = _mm512_cmp_ps_mask(range, _mm512_setzero_ps(), _CMP_GT_OQ);
    const Floats per_step = _mm512_maskz_div_ps(some, all(256 * kLargest), range);
    store(scales, multiply(range, all(1 / kLargest)));
    uint8_t* to = out;
    while (rest > 0) {
      if (group_rest == 0) {
        params.next(w, of_group);
        group_rest = group_inputs;
      }
      const Requantized<BITS> weights(of_group, per_step);
      for (; rest > 0 && group_rest > 0; rest -= kBlockInputs, group_rest -= kBlockInputs) {
        Vec unpacked[kBlockVectors];
        fetch<kIntoL2>(codes + kFar, BITS);
        fetch<kIntoL1>(codes + kNear, BITS);
        unpack_at<BITS>(codes, unpacked);
        for (Vec four : unpacked) {
          store(to, weights.of(four));
          to += kLine;
        }
        codes += BITS * kLine;
      }
    }
  }
}

// Products of some pairs of sets of tokens with a strip's weights, and what they add up to.
template <int TILES>
class Totals {
 public:
  void add(const PanelInputs& x, int64_t first_pair, int64_t n_pairs, const uint8_t* weights,
           const float* row_scales) {
    const int64_t all_pairs = (x.n_tokens + kPairTokens - 1) / kPairTokens;
    memset(of_, 0, sizeof of_);
    for (int64_t k = 0; k < x.n_inputs; k += kSpanInputs) {
      const int64_t at = k / kSpanInputs * all_pairs + first_pair;
      for (int64_t pair = 0; pair < n_pairs; ++pair) {
        const uint8_t* inputs = x.values + (at + pair) * 2 * kSpanBytes;
        switch (steps_of(x.n_inputs - k)) {
          case 1: products<1>(inputs, weights); break;
          case 2: products<2>(inputs, weights); break;
          case 3: products<3>(inputs, weights); break;
          default: products<kSpanSteps>(inputs, weights);
        }
        waiting_ = {of_ + pair * kPairTokens, x.scales + (at + pair) * kPairTokens, row_scales};
      }
      weights += TILES * kSpanBytes, row_scales += kStripRows;
    }
    scale<kPairTokens>(waiting_, 0);
    waiting_ = {of_, kNothing, row_scales_of_nothing_};
  }

  Floats at(int64_t token, int tile) const { return load(of_[token][tile]); }

 private:
  // Where the last sums go, and what they are worth.
  struct Waiting {
    float (*totals)[TILES][kTileOutputs];
    const float *scales, *row_scales;
  };

  // Products of a span. Between them the sums of the span before are scaled, some in each step.
  template <int STEPS>
  __attribute__((noinline)) void products(const uint8_t* inputs, const uint8_t* weights) {
    const Waiting waiting = waiting_;
    asm volatile("" ::: "memory");  // g++ 12 does not know that registers are loaded from memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
#pragma GCC unroll 4
    for (int step = 0; step < STEPS; ++step) {
      _tile_loadd(6, weights + step * kStepBytes, kLine);
      _tile_loadd(4, inputs + step * kStepBytes, kLine);
      _tile_dpbssd(0, 4, 6);
      if (TILES == 2) {
        _tile_loadd(7, weights + kSpanBytes + step * kStepBytes, kLine);
        _tile_dpbssd(1, 4, 7);
      }
      _tile_loadd(5, inputs + kSpanBytes + step * kStepBytes, kLine);
      _tile_dpbssd(2, 5, 6);
      if (TILES == 2) _tile_dpbssd(3, 5, 7);
      scale<kScaledAtOnce>(waiting, step * kScaledAtOnce);
    }
    scale<kPairTokens - STEPS * kScaledAtOnce>(waiting, STEPS * kScaledAtOnce);
    _tile_stored(0, sums_[0][0], kLine);
    if (TILES == 2) _tile_stored(1, sums_[0][TILES - 1], kLine);
    _tile_stored(2, sums_[1][0], kLine);
    if (TILES == 2) _tile_stored(3, sums_[1][TILES - 1], kLine);
    asm volatile("" ::: "memory");
  }

  // Of some tokens, from `first` on.
  template <int TOKENS>
  INLINE void scale(const Waiting& waiting, int64_t first) {
    Floats rows[TILES];
    for (int r = 0; r < TILES; ++r) rows[r] = load(waiting.row_scales + r * kTileOutputs);
    for (int64_t from = first; from < first + TOKENS; from += kScaledAtOnce) {
      const auto& sums = sums_[from / kSetTokens];
#pragma GCC unroll 8
      for (int t = 0; t < kScaledAtOnce; ++t) {
        const Floats own = all(waiting.scales[from + t]);
        for (int r = 0; r < TILES; ++r) {
          const Vec sum = _mm512_load_si512(sums[r][from % kSetTokens + t]);
          float* total = waiting.totals[from + t][r];
          store(total, fma(to_floats(sum), multiply(rows[r], own), load(total)));
        }
      }
    }
  }

  static constexpr float kNothing[kPairTokens] = {};
  alignas(kLine) float row_scales_of_nothing_[TILES * kTileOutputs] = {};
  Waiting waiting_ = {of_, kNothing, row_scales_of_nothing_};
  alignas(kLine) int32_t sums_[2][TILES][kSetTokens][kTileOutputs] = {};
  alignas(kLine) float of_[kTotalPairs * kPairTokens][TILES][kTileOutputs];
};

template <int BITS, int TILES>
void multiply_strip(const Tiles& w, const PanelInputs& x, int64_t tile, uint8_t* room,
                    const Results& y) {
  const int64_t n_spans = (x.n_inputs + kSpanInputs - 1) / kSpanInputs;
  float* scales = reinterpret_cast<float*>(room);
  uint8_t* weights = room + n_spans * kStripRows * static_cast<int64_t>(sizeof(float));
  for (int r = 0; r < TILES; ++r) {
    unpack_weights<BITS>(w, tile + r, x.first_input, x.n_inputs, TILES * kSpanBytes,
                         weights + r * kSpanBytes, kStripRows, scales + r * kTileOutputs);
  }
  const int64_t n_pairs = (x.n_tokens + kPairTokens - 1) / kPairTokens;
  Totals<TILES> totals;
  for (int64_t pair = 0; pair < n_pairs; pair += kTotalPairs) {
    const int64_t n = n_pairs - pair < kTotalPairs ? n_pairs - pair : kTotalPairs;
    totals.add(x, pair, n, weights, scales);
    const int64_t first = pair * kPairTokens;
    for (int64_t t = 0; t < n * kPairTokens && first + t < x.n_tokens; ++t) {
      for (int r = 0; r < TILES; ++r) y.put(first + t, r, totals.at(t, r));
    }
  }
}

INLINE Floats load_some(__mmask16 present, const float* from) {
  return _mm512_maskz_loadu_ps(present, from);
}

INLINE Floats load_some(__mmask16 present, const uint16_t* from) {
  const __m256i halves = _mm256_maskz_loadu_epi16(present, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// One span of one token: 64 inputs a line, the lines of a token kStepBytes apart.
template <typename T>
INLINE bool quantize_span(const T* x, int64_t n, uint8_t* out, float* scale) {
  constexpr int kVectors = kSpanInputs / kRows;
  Floats inputs[kVectors];
  Vec largest = none();
  for (int v = 0; v < kVectors; ++v) {
    inputs[v] = load_some(first_of_16(n - v * kRows), x + v * kRows);
    largest = _mm512_max_epu32(largest, _mm512_castps_si512(magnitude(inputs[v])));
  }
  const uint32_t pattern = _mm512_reduce_max_epu32(largest);
  if (pattern >= kInfinityBits) return false;
  float range;
  memcpy(&range, &pattern, sizeof range);
  range = range < kSmallestRange ? kSmallestRange : range;
  const Floats inverse = all(kLargest / range);
  for (int v = 0; v < kVectors; ++v) {
    const Vec q = _mm512_cvtps_epi32(multiply(inputs[v], inverse));  // to nearest
    uint8_t* to = out + v * kRows / kStepInputs * kStepBytes + v * kRows % kStepInputs;
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(q));
  }
  *scale = range / kLargest;
  return true;
}

template <typename T>
bool arrange(const T* x, int64_t n_tokens, int64_t stride, int64_t n, int64_t n_padded,
             uint8_t* out, float* scales) {
  const int64_t n_places = (n_tokens + kPairTokens - 1) / kPairTokens * kPairTokens;
  for (int64_t k = 0; k < n_padded; k += kSpanInputs) {
    for (int64_t token = 0; token < n_places; ++token) {
      uint8_t* to = out + token / kSetTokens * kSpanBytes + token % kSetTokens * kLine;
      const int64_t present = token < n_tokens ? n - k : 0;
      const T* from = present > 0 ? x + token * stride + k : x;
      if (!quantize_span(from, present, to, scales + token)) return false;
    }
    out += n_places * kSpanInputs, scales += n_places;
  }
  return true;
}

}  // namespace

const PanelKernels kAmxInt8 = {
    "int8", 1, kSpanInputs, arrange<float>, arrange<uint16_t>, multiply_strips, narrow_to_bf16_avx512};

}  // namespace lwquant
