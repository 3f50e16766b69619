// The tiles' matmul with AMX: 5 tokens and more on tile registers. Fewer run on AVX-512, and so do
// groups of 32, whose sums take longer to scale than the registers save. Many:
// linear_amx_int8.cpp, linear_amx_bf16.cpp.
//
// A tile register of codes holds 16 vectors as they are unpacked: 64 inputs of 16 rows. One of
// activations holds the same inputs of 16 tokens, as they lie in a span. Their product is 16 x 16 sums,
// which vectors scale and add to the totals as with every instruction set: results are the same to
// the bit. A span may end within the 64 inputs; activations are zero from there on.
// Expected limit: scaling the sums, twice as long as products of 64 inputs.
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

#ifdef LWQUANT_EMULATE_AMX
#include "emulated_amx.h"
#endif

namespace lwquant {
namespace {

#include "vectors_512.inc"

constexpr int kPanelTokens = 128;  // whose totals stay in the L1 cache beside the codes

#include "unpack_block.inc"
#include "walk_tiles.inc"
#include "with_width.inc"
#include "multiply_many.inc"
#include "amx_registers.inc"

constexpr int kStepVectors = 16;
constexpr int kStepInputs = kStepVectors * kQuad;

// Registers 0 to 3 are sums: of part 0 with tile 0, with tile 1, then of part 1. 4 and 5 are
// activations of the parts: high and low bytes of 16 bits, or two sets of tokens. 6 and 7 are codes
// of the tiles.
constexpr int kCodes = 6;

// The same for every width of codes.
template <int TILES, int BYTES>
class RegisterProduct {
 public:
  explicit RegisterProduct(int64_t n_tokens)
      : set_tokens_(n_tokens < kSetTokens ? n_tokens : kSetTokens) {
    configure_registers([&](int i) { return i < kCodes ? set_tokens_ : kStepVectors; });
  }

  __attribute__((noinline)) void add(Panel<TILES>& panel, const Activations& a,
                                     const PanelSpan& at) {
    asm volatile("" ::: "memory");  // g++ 12 does not know that registers are loaded from memory
    int64_t token = 0;
    if (BYTES == 1) {
      for (; token + 2 * kSetTokens <= at.n_tokens; token += 2 * kSetTokens) {
        step<2>(panel, a, at, token);
      }
    }
    for (; token < at.n_tokens; token += kSetTokens) step<BYTES>(panel, a, at, token);
    scale(panel, a, at);
    n_sets_ = 0;
  }

 private:
  // The products of the tokens of a step. While they run, the sums of the step before are scaled.
  template <int PARTS>
  INLINE void step(Panel<TILES>& panel, const Activations& a, const PanelSpan& at, int64_t token) {
    const int64_t row = at.span * a.n_tokens + at.first_token + first_of(token, at);
    const uint8_t* first = a.quads + row * a.span_bytes;
    const uint8_t* second = first + (BYTES == 2 ? a.span_bytes / 2 : kSetTokens * a.span_bytes);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t v = 0; v < at.n_vectors; v += kStepVectors) {
      _tile_loadd(4, first, a.span_bytes);
      _tile_loadd(6, panel.codes[0] + v * kLine, kLine);
      _tile_dpbsud(0, 4, 6);
      if (TILES == 2) {
        _tile_loadd(7, panel.codes[TILES - 1] + v * kLine, kLine);
        _tile_dpbsud(1, 4, 7);
      }
      if (PARTS == 2) {
        _tile_loadd(5, second, a.span_bytes);
        _tile_dpbsud(2, 5, 6);
        if (TILES == 2) _tile_dpbsud(3, 5, 7);
      }
      first += kStepInputs, second += kStepInputs;
    }
    scale(panel, a, at);
    _tile_stored(0, sums_[0][0], kLine);
    if (TILES == 2) _tile_stored(1, sums_[0][TILES - 1], kLine);
    if (PARTS == 2) _tile_stored(2, sums_[1][0], kLine);
    if (PARTS == 2 && TILES == 2) _tile_stored(3, sums_[1][TILES - 1], kLine);
    token_ = token, n_sets_ = PARTS / BYTES;
  }

  // The last tokens of a panel are part of a whole set, whose others have been added before.
  int64_t first_of(int64_t token, const PanelSpan& at) const {
    const int64_t last = at.n_tokens - set_tokens_;
    return token < last ? token : last;
  }

  // Adds the last step's sums to the totals.
  INLINE void scale(Panel<TILES>& panel, const Activations& a, const PanelSpan& at) {
    const float* own = a.span_scale + at.span * a.n_tokens + at.first_token;
    for (int64_t set = 0; set < n_sets_; ++set) {
      const int64_t from = token_ + set * kSetTokens, first = first_of(from, at);
      for (int r = 0; r < TILES; ++r) {
        const int32_t(*high)[kTileOutputs] = sums_[0][r];
        const int32_t(*low)[kTileOutputs] = sums_[BYTES == 1 ? set : 1][r];
        for (int64_t t = from; t < first + set_tokens_; ++t) {
          Vec sum = _mm512_load_si512(low[t - first]);
          if (BYTES == 2) sum = both_bytes(_mm512_load_si512(high[t - first]), sum);
          add_sum(panel, at, t, r, 0, to_floats(sum), own[t]);
        }
      }
    }
  }

  int64_t set_tokens_;
  int64_t token_ = 0;   // the last step's first
  int64_t n_sets_ = 0;  // of tokens whose sums wait to be scaled
  alignas(kLine) int32_t sums_[2][TILES][kSetTokens][kTileOutputs];  // by part
};

template <int BITS, int TILES, int BYTES>
class PanelProduct : public RegisterProduct<TILES, BYTES> {
 public:
  using RegisterProduct<TILES, BYTES>::RegisterProduct;
};

void multiply_tiles(const Tiles& w, const Activations& a, int64_t tile, int64_t n_tiles,
                    const float* bias, float* y) {
  if (a.n_tokens <= kFewTokens || a.span_blocks * kBlockInputs < kStepInputs) {
    return multiply_tiles_avx512(w, a, tile, n_tiles, bias, y);
  }
  const KeptRegisters kept;
  with_widths(w.is.bits, a.bits, [&](auto codes, auto activations) {
    multiply_panels<codes.bits, activations.bits / 8>(w, a, tile, n_tiles, bias, y);
  });
}

}  // namespace

const Isa kAmx = {"amx",          unpack_row_avx512, quantize_span_avx512,
                  multiply_tiles, &kAvx512Rounding,  &kAmxBf16,          &kAmxInt8};

}  // namespace lwquant
