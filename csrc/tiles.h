// A layer as the matmul kernels read it: tiles of 16 rows, one after another, each one stream.
//
//   header, 64 bytes
//   per tile: [16 bytes: first byte of each row's scales, with scales in bytes]
//             per group: 16 scales (a byte or a float16 each), 16 bytes of zeros unless symmetric
//             padding to 64 bytes
//             per block of 32 inputs: bits x 64 bytes of codes, see unpack_block.inc. They unpack to
//             8 vectors of 64 codes, each four inputs of row 0, of row 1, .. of row 15.
//
// Inputs are filled up to whole blocks with codes 0, rows to whole tiles with scales 0.
// Included by every instruction set and by the GPU kernels: records and constants only, see
// kernels.h.
#pragma once
#include <stdint.h>

namespace lwquant {

constexpr int kTileOutputs = 16;
constexpr int kQuad = 4;                            // inputs of a row that lie together
constexpr int kVectorCodes = kTileOutputs * kQuad;  // 64
constexpr int kBlockVectors = 8;
constexpr int kBlockInputs = kBlockVectors * kQuad;  // 32
constexpr int kLine = 64;                            // bytes, what everything is aligned to
constexpr uint32_t kTilesMagic = 0x3154514c;         // "LQT1"

constexpr int kByteExponent = 10;  // a row's first byte, shifted so, starts its window
constexpr int kByteStep = 6;       // the others count float16 patterns above it in steps of 2^6

// What one more in a byte of zeros adds to the zero-point, in codes.
constexpr float byte_zero_step(int bits) { return 1.0f / static_cast<float>(1 << (8 - bits)); }

struct TilesHeader {
  uint32_t magic;
  int32_t bits;
  int64_t out_features;
  int64_t in_features;
  int64_t group_size;   // at most in_features; a multiple of kBlockInputs, or all inputs
  uint8_t scale_bytes;  // 1: a scale is a byte above its row's first, 0: a float16
  uint8_t zeros;        // 1: a byte each, 0: every zero is 2^(bits-1)
  uint8_t fine_zeros;   // 1: bytes of zeros count steps of 2^(bits-8)
  uint8_t int8_weights; // 1: with many tokens weights may be rounded to int8
  uint8_t unused[28];
};
static_assert(sizeof(TilesHeader) == kLine, "codes must stay aligned");

// The header with what follows from it.
struct Tiles {
  TilesHeader is;
  const uint8_t* first;  // of tile 0, or null
  int64_t n_tiles;
  int64_t n_groups;
  int64_t padded_inputs;
  int64_t group_bytes;   // of its scales and zeros
  int64_t codes_offset;  // in a tile
  int64_t tile_bytes;
  float zero_step;
};

}  // namespace lwquant
