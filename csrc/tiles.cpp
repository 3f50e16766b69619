// Between the stored row streams and tiles, and from tiles to float32.
#include "kernels.h"
#include "pool.h"

#include <string.h>

#include <algorithm>
#include <vector>

namespace lwquant {
namespace {

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

Tiles tiles_of(const TilesHeader& is) {
  Tiles t{};
  t.is = is;
  t.n_tiles = (is.out_features + kTileOutputs - 1) / kTileOutputs;
  t.n_groups = (is.in_features + is.group_size - 1) / is.group_size;
  t.padded_inputs = round_up(is.in_features, kBlockInputs);
  t.group_bytes = kTileOutputs * ((is.scale_bytes ? 1 : 2) + (is.zeros ? 1 : 0));
  const int64_t windows = is.scale_bytes ? kTileOutputs : 0;
  t.codes_offset = round_up(windows + t.n_groups * t.group_bytes, kLine);
  t.tile_bytes = t.codes_offset + t.padded_inputs * kTileOutputs * is.bits / 8;
  t.zero_step = is.fine_zeros ? byte_zero_step(is.bits) : 1.0f;
  return t;
}

TilesHeader header_of(const Weight& w) {
  TilesHeader is{};
  is.magic = kTilesMagic;
  is.bits = w.bits;
  is.out_features = w.out_features;
  is.in_features = w.in_features;
  is.group_size = w.group_size;
  is.scale_bytes = w.scale_bytes != nullptr;
  is.zeros = w.zeros || w.zero_bytes;
  is.fine_zeros = w.zero_bytes != nullptr;
  is.int8_weights = w.int8_weights;
  return is;
}

using Vec = uint8_t;  // one lane
#define INLINE
template <int N>
uint8_t shift_right(uint8_t v) {
  return static_cast<uint8_t>(v >> N);
}
uint8_t keep(uint8_t v, int bits) { return static_cast<uint8_t>(v & bits); }
uint8_t merge(uint8_t a, uint8_t b, int bits) { return static_cast<uint8_t>(a | (b & bits)); }

#include "unpack_block.inc"

#undef INLINE

// One lane of a block: `bits` bytes -> 8 codes.
template <int BITS>
void unpack_lane(const uint8_t* bytes, uint8_t* codes) {
  uint8_t in[BITS], out[kBlockVectors];
  memcpy(in, bytes, sizeof in);
  Block<BITS>::unpack(in, out);
  memcpy(codes, out, sizeof out);
}

using UnpackLane = void (*)(const uint8_t*, uint8_t*);

UnpackLane lane_unpacker(int bits) {
  static const UnpackLane every[] = {unpack_lane<2>, unpack_lane<3>, unpack_lane<4>,
                                     unpack_lane<5>, unpack_lane<6>, unpack_lane<7>,
                                     unpack_lane<8>};
  return every[bits - 2];
}

// Which bit of which code each bit of a lane's bytes is, found by unpacking it alone: packing has
// no definition of its own.
struct LanePacking {
  int code[64], bit[64];  // for bit i % 8 of byte i / 8

  explicit LanePacking(int bits) {
    for (int i = 0; i < 8 * bits; ++i) {
      uint8_t bytes[8] = {}, codes[kBlockVectors];
      bytes[i / 8] = static_cast<uint8_t>(1 << i % 8);
      lane_unpacker(bits)(bytes, codes);
      for (int c = 0; c < kBlockVectors; ++c) {
        for (int b = 0; b < bits; ++b) {
          if (codes[c] >> b & 1) code[i] = c, bit[i] = b;
        }
      }
    }
  }

  void pack(int bits, const uint8_t* codes, uint8_t* bytes) const {
    for (int i = 0; i < 8 * bits; ++i) {
      bytes[i / 8] = static_cast<uint8_t>(bytes[i / 8] | (codes[code[i]] >> bit[i] & 1) << i % 8);
    }
  }
};

const LanePacking& lane_packing(int bits) {
  static const LanePacking every[] = {LanePacking(2), LanePacking(3), LanePacking(4),
                                      LanePacking(5), LanePacking(6), LanePacking(7),
                                      LanePacking(8)};
  return every[bits - 2];
}

int64_t tile_rows(const Tiles& t, int64_t tile) {
  return std::min<int64_t>(kTileOutputs, t.is.out_features - tile * kTileOutputs);
}

// Runs body(0), .., body(n_tiles - 1).
template <typename Body>
void for_each_tile(int64_t n_tiles, int n_threads, Body body) {
  run_tasks(
      static_cast<int>(n_tiles), n_threads,
      [](void* pointer, int tile, int) { (*static_cast<Body*>(pointer))(tile); }, &body);
}

}  // namespace

void tile_codes(const Tiles& t, int64_t tile, uint8_t* codes) {
  const int bits = t.is.bits;
  const UnpackLane unpack = lane_unpacker(bits);
  const uint8_t* block = t.first + tile * t.tile_bytes + t.codes_offset;
  for (int64_t first = 0; first < t.padded_inputs; first += kBlockInputs, block += bits * kLine) {
    for (int lane = 0; lane < kLine; ++lane) {
      uint8_t bytes[8], eight[kBlockVectors];
      for (int i = 0; i < bits; ++i) bytes[i] = block[i * kLine + lane];
      unpack(bytes, eight);
      uint8_t* row = codes + lane / kQuad * t.padded_inputs + first + lane % kQuad;
      for (int v = 0; v < kBlockVectors; ++v) row[v * kQuad] = eight[v];
    }
  }
}

int64_t tiles_size(const Weight& w) {
  const Tiles t = tiles_of(header_of(w));
  return static_cast<int64_t>(sizeof(TilesHeader)) + t.n_tiles * t.tile_bytes;
}

bool tiles_fit(const Weight& w) { return w.n_groups == 1 || w.group_size % kBlockInputs == 0; }

bool read_header(const TilesHeader& is, int64_t size, Tiles* out) {
  const bool plausible = is.magic == kTilesMagic && is.bits >= 2 && is.bits <= 8 &&
                         is.out_features >= 1 && is.in_features >= 1 && is.group_size >= 1 &&
                         is.group_size <= is.in_features &&
                         (is.group_size == is.in_features || is.group_size % kBlockInputs == 0);
  if (!plausible) return false;
  *out = tiles_of(is);
  return size == static_cast<int64_t>(sizeof(TilesHeader)) + out->n_tiles * out->tile_bytes;
}

bool read_tiles(const uint8_t* data, int64_t size, Tiles* out) {
  if (size < static_cast<int64_t>(sizeof(TilesHeader))) return false;
  TilesHeader is;
  memcpy(&is, data, sizeof is);
  if (!read_header(is, size, out)) return false;
  out->first = data + sizeof is;
  return true;
}

int64_t span_blocks(const Tiles& w) {
  if (w.n_groups == 1) return kMaxSpanBlocks;
  int64_t blocks = kMaxSpanBlocks;
  while (w.is.group_size % (blocks * kBlockInputs) != 0) blocks /= 2;
  return blocks;
}

void make_tiles(const Weight& w, int n_threads, uint8_t* data) {
  const TilesHeader is = header_of(w);
  memcpy(data, &is, sizeof is);
  const Tiles t = tiles_of(is);
  uint8_t* first = data + sizeof is;
  for_each_tile(t.n_tiles, n_threads, [&](int64_t tile) {
    uint8_t* begin = first + tile * t.tile_bytes;
    memset(begin, 0, static_cast<size_t>(t.codes_offset));
    uint8_t* params = begin + (is.scale_bytes ? kTileOutputs : 0);
    std::vector<uint8_t> codes(static_cast<size_t>(kTileOutputs * t.padded_inputs));
    for (int64_t row = 0; row < tile_rows(t, tile); ++row) {
      const int64_t r = tile * kTileOutputs + row;
      current_isa().unpack_row(w.bits, w.codes + r * w.row_words, w.in_features,
                               codes.data() + row * t.padded_inputs);
      if (is.scale_bytes) begin[row] = w.scale_bytes[r * (1 + w.n_groups)];
      for (int64_t group = 0; group < w.n_groups; ++group) {
        uint8_t* scales = params + group * t.group_bytes;
        uint8_t* zeros = scales + kTileOutputs * (is.scale_bytes ? 1 : 2);
        if (is.scale_bytes) {
          scales[row] = w.scale_bytes[r * (1 + w.n_groups) + 1 + group];
        } else {
          memcpy(scales + 2 * row, w.scales + r * w.n_groups + group, 2);
        }
        if (w.zero_bytes) zeros[row] = w.zero_bytes[group * w.out_features + r];
        if (w.zeros) zeros[row] = code_at(w.bits, w.zeros + group * w.zero_words, r);
      }
    }
    uint8_t* block = begin + t.codes_offset;
    memset(block, 0, static_cast<size_t>(t.tile_bytes - t.codes_offset));
    const LanePacking& packing = lane_packing(w.bits);
    for (int64_t k = 0; k < t.padded_inputs; k += kBlockInputs, block += w.bits * kLine) {
      for (int lane = 0; lane < kLine; ++lane) {
        const uint8_t* row = codes.data() + lane / kQuad * t.padded_inputs + k + lane % kQuad;
        uint8_t bytes[8] = {}, eight[kBlockVectors];
        for (int v = 0; v < kBlockVectors; ++v) eight[v] = row[v * kQuad];
        packing.pack(w.bits, eight, bytes);
        for (int i = 0; i < w.bits; ++i) block[i * kLine + lane] = bytes[i];
      }
    }
  });
}

void unmake_tiles(const Tiles& t, int n_threads, int32_t* codes, uint8_t* scales, uint8_t* zeros) {
  const int64_t words = row_words(t.is.in_features, t.is.bits), n_groups = t.n_groups;
  const int64_t row_scales = t.is.scale_bytes ? 1 + n_groups : 2 * n_groups;  // bytes
  for_each_tile(t.n_tiles, n_threads, [&](int64_t tile) {
    const uint8_t* begin = t.first + tile * t.tile_bytes;
    const uint8_t* params = begin + (t.is.scale_bytes ? kTileOutputs : 0);
    std::vector<uint8_t> rows(static_cast<size_t>(kTileOutputs * t.padded_inputs));
    tile_codes(t, tile, rows.data());
    for (int64_t row = 0; row < tile_rows(t, tile); ++row) {
      const int64_t r = tile * kTileOutputs + row;
      pack_row(t.is.bits, rows.data() + row * t.padded_inputs, t.is.in_features,
               codes + r * words);
      uint8_t* own = scales + r * row_scales;
      if (t.is.scale_bytes) *own++ = begin[row];
      const int width = t.is.scale_bytes ? 1 : 2;
      for (int64_t group = 0; group < n_groups; ++group) {
        const uint8_t* from = params + group * t.group_bytes;
        memcpy(own + group * width, from + row * width, static_cast<size_t>(width));
        if (t.is.zeros) zeros[group * t.is.out_features + r] = from[kTileOutputs * width + row];
      }
    }
  });
}

void dequantize_tiles(const Tiles& t, const Outliers& outliers, int64_t first_tile,
                      int64_t n_rows, int n_threads, float* out) {
  const int64_t n_tiles = (n_rows + kTileOutputs - 1) / kTileOutputs;
  for_each_tile(n_tiles, n_threads, [&](int64_t index) {
    const int64_t tile = first_tile + index;
    const int64_t rows = std::min<int64_t>(kTileOutputs, n_rows - index * kTileOutputs);
    std::vector<uint8_t> codes(static_cast<size_t>(kTileOutputs * t.padded_inputs));
    tile_codes(t, tile, codes.data());
    float* first = out + index * kTileOutputs * t.is.in_features;
    for (int64_t row = 0; row < rows; ++row) {
      const uint8_t* own = codes.data() + row * t.padded_inputs;
      float* weights = first + row * t.is.in_features;
      for (int64_t group = 0; group < t.n_groups; ++group) {
        const float scale = tile_scale(t, tile, row, group);
        const float zero = tile_zero(t, tile, row, group);
        const int64_t start = group * t.is.group_size;
        const int64_t stop = std::min(start + t.is.group_size, t.is.in_features);
        for (int64_t k = start; k < stop; ++k) {
          weights[k] = (static_cast<float>(own[k]) - zero) * scale;
        }
      }
    }
    place_outliers(outliers, tile * kTileOutputs, rows, t.is.in_features, first);
  });
}

float tile_scale(const Tiles& t, int64_t tile, int64_t row, int64_t group) {
  const uint8_t* begin = t.first + tile * t.tile_bytes;
  if (t.is.scale_bytes) {
    const uint8_t byte = begin[kTileOutputs + group * t.group_bytes + row];
    const int pattern = (begin[row] << kByteExponent) + (byte << kByteStep);
    return half_to_float(static_cast<uint16_t>(pattern));
  }
  uint16_t half;
  memcpy(&half, begin + group * t.group_bytes + 2 * row, sizeof half);
  return half_to_float(half);
}

float tile_zero(const Tiles& t, int64_t tile, int64_t row, int64_t group) {
  if (!t.is.zeros) return static_cast<float>(1 << (t.is.bits - 1));
  const uint8_t* params =
      t.first + tile * t.tile_bytes + (t.is.scale_bytes ? kTileOutputs : 0);
  const uint8_t* zeros =
      params + group * t.group_bytes + kTileOutputs * (t.is.scale_bytes ? 1 : 2);
  return static_cast<float>(zeros[row]) * t.zero_step;
}

}  // namespace lwquant
