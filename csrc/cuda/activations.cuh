// Where rounded activations lie: bytes of 32 inputs ("quads", as they are multiplied), in one plane
// at 8 bits, in planes of high and low bytes at 16, and per span and token a scale and the sum of
// the integers. Two layouts, one for each way of multiplying; both hold a number of tokens that is
// known when kernels are compiled, the last of them zeros.
#pragma once
#include "arguments.h"
#include "device.h"

namespace lwquant {
namespace gpu {

// Scale and sum of a span and token: read by 8 bytes.
struct SpanScale {
  float scale, sum;
};
constexpr int kScaleBytes = static_cast<int>(sizeof(SpanScale));

// For few tokens: quads (n_blocks, n_tokens, PLANES, 32), then scales (n_spans, n_tokens).
template <int PLANES, int SPAN>
struct FewLayout {
  int n_spans;  // whole chunks of them
  int n_tokens;

  INLINE int quad(int block, int token, int plane, int input) const {
    return ((block * n_tokens + token) * PLANES + plane) * kBlockInputs + input;
  }
  INLINE int scale(int span, int token) const {
    return quad(n_spans * SPAN, 0, 0, 0) + (span * n_tokens + token) * kScaleBytes;
  }
};

// For tensor cores: chunks of four blocks, each copied whole to shared memory: the quads of 8 tokens
// at a time, plane by plane and span by span, then the scales of its spans, (spans, n_tokens).
//
// One instruction multiplies 32 inputs, eight held by each of the four threads that share a token;
// which ones is free, as long as the codes are of the same. So a thread keeps to one block as long
// as a span allows: with SPAN blocks in a span thread t has block t % SPAN and of its bytes the part
// t / SPAN, 8 SPAN bytes. These lie at `lane` pieces of 16 bytes (8 where there are no more), as the
// warp reads them.
template <int PLANES, int SPAN>
struct ManyLayout {
  static constexpr int kSpans = kChunkBlocks / SPAN;  // of a chunk
  static constexpr int kThreadBytes = 8 * SPAN;       // of a token, plane and span
  static constexpr int kPiece = kThreadBytes < 16 ? kThreadBytes : 16;
  static constexpr int kSpanBytes = kWarp * kThreadBytes;  // of 8 tokens in a plane
  static constexpr int kPlaneBytes = kSpans * kSpanBytes;
  static constexpr int kColumnsBytes = PLANES * kPlaneBytes;

  static constexpr int scales_offset(int n_tokens) {
    return n_tokens / kColumns * kColumnsBytes;
  }
  static constexpr int chunk_bytes(int n_tokens) {
    return scales_offset(n_tokens) + kSpans * n_tokens * kScaleBytes;
  }

  int n_tokens;  // a multiple of 8

  INLINE int quad(int block, int token, int plane, int input) const {
    const int span = block % kChunkBlocks / SPAN;
    const int thread = input / kThreadBytes * SPAN + block % SPAN;
    const int lane = token % kColumns * 4 + thread, own = input % kThreadBytes;
    return block / kChunkBlocks * chunk_bytes(n_tokens) +
           token / kColumns * kColumnsBytes + plane * kPlaneBytes + span * kSpanBytes +
           own / kPiece * (kWarp * kPiece) + lane * kPiece + own % kPiece;
  }
  INLINE int scale(int span, int token) const {
    return span / kSpans * chunk_bytes(n_tokens) + scales_offset(n_tokens) +
           (span % kSpans * n_tokens + token) * kScaleBytes;
  }
};

}  // namespace gpu
}  // namespace lwquant
