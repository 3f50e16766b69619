// What a launch hands to a kernel, by value: read by the host and by the GPU.
#pragma once
#include <stdint.h>

#include "../tiles.h"

namespace lwquant {
namespace gpu {

enum Float : int32_t { kFloat32, kFloat16, kBfloat16 };

constexpr int kWarp = 32;
constexpr int kFewTokens = 1;    // up to which no tensor cores are used
// Up to which tensor cores multiply integers, by the bits of activations. By arithmetic, not yet by
// measurement: where unpacking the weight and cuBLAS take as long as one int8 product, or two.
constexpr int kManyTokens8 = 512, kManyTokens16 = 256;
constexpr int kGroupTokens = 32;  // of them that a block of threads has
constexpr int kWideTokens = 64;   // that it has where there are more
constexpr int kColumns = 8;      // tokens of one tensor-core instruction
constexpr int kChunkBlocks = 4;  // blocks of 32 inputs that a thread, or a warp, has under way
constexpr int kMostFewWarps = 16;
constexpr int kManyWarps = 4;  // of a block, each with a tile of its own
constexpr int kWideWarps = 8;  // of one with kWideTokens
constexpr int kQuantizeWarps = 4;
constexpr int kDequantizeWarps = 4;
constexpr int kAddThreads = 128;
constexpr int kMostSplits = 16;
constexpr int kRoundingWarps = 8;     // of a block: 32 rows, each warp with every eighth column
constexpr int kRoundingColumns = 128;  // of a ColumnBlock, at most

// Tiles (csrc/tiles.h) in the GPU's memory, and what a walk over them needs. A span is as many
// blocks as share a scale of activations.
struct DeviceTiles {
  const uint8_t* first;  // of tile 0
  int64_t tile_bytes;
  int32_t codes_offset;
  int32_t group_bytes;
  int32_t out_features;
  int32_t in_features;
  int32_t n_tiles;
  int32_t n_blocks;
  int32_t n_spans;
  int32_t spans_per_group;
  int32_t scale_bytes;
  int32_t zeros;
  float zero_step;
};

// x (n_tokens, in_features) -> `rounded`, laid out as activations.cuh says, one layout after another
// of `layout_tokens` each; what is beyond n_tokens are zeros.
struct Quantizing {
  const void* x;
  Float x_type;
  int32_t in_features;
  int32_t n_tokens;
  int32_t n_spans;  // that are written: whole chunks
  int32_t layout_tokens;
  int32_t layout_bytes;
  uint8_t* rounded;
};

// y (n_tokens, out_features) = x Wᵀ + bias; sums of parts of the inputs where n_splits > 1.
struct Multiplying {
  DeviceTiles w;
  const uint8_t* rounded;
  int32_t n_tokens;
  const void* bias;  // or null
  Float bias_type;
  Float y_type;
  void* y;
  int32_t n_splits;
  float* parts;  // (n_splits, n_tokens, out_features)
};

// out (n_rows, in_features): the weight's rows from those of `first_tile` on.
struct Dequantizing {
  DeviceTiles w;
  int32_t first_tile;
  int32_t n_rows;
  Float out_type;
  void* out;
};

}  // namespace gpu
}  // namespace lwquant
