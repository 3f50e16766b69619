// AMX's tile registers in memory, for csrc/linear_amx*.cpp on processors without them: each
// instruction as Intel's manual defines it, with the checks that the processor makes.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace lwquant {
namespace emulated {

constexpr int kRegisters = 8, kMostRows = 16, kMostBytes = 64;

struct Registers {
  bool configured = false;
  uint8_t config[64] = {};
  int rows[kRegisters] = {}, row_bytes[kRegisters] = {};
  uint8_t data[kRegisters][kMostRows][kMostBytes] = {};
};

inline Registers& registers() {
  static thread_local Registers own;
  return own;
}

inline void require(bool holds, const char* rule) {
  if (holds) return;
  fprintf(stderr, "AMX: %s\n", rule);
  abort();
}

inline void store_config(void* memory) { memcpy(memory, registers().config, 64); }

inline void load_config(const void* memory) {
  uint8_t bytes[64];
  memcpy(bytes, memory, sizeof bytes);
  Registers& own = registers();
  own = Registers();
  memcpy(own.config, bytes, sizeof bytes);
  require(bytes[0] == 1 && bytes[1] == 0, "palette 1, from row 0 on");
  for (int i = 2; i < 16; ++i) require(bytes[i] == 0, "reserved bytes are zero");
  for (int t = 0; t < kRegisters; ++t) {
    uint16_t row_bytes;
    memcpy(&row_bytes, bytes + 16 + 2 * t, sizeof row_bytes);
    own.rows[t] = bytes[48 + t], own.row_bytes[t] = row_bytes;
    require(own.rows[t] <= kMostRows && row_bytes <= kMostBytes, "at most 16 rows of 64 bytes");
    require((own.rows[t] == 0) == (row_bytes == 0), "rows and bytes, or neither");
  }
  for (int i = 32; i < 48; ++i) require(bytes[i] == 0, "there are 8 registers");
  for (int i = 56; i < 64; ++i) require(bytes[i] == 0, "there are 8 registers");
  own.configured = true;
}

inline void release() { registers() = Registers(); }

inline void zero(int t) {
  require(registers().configured, "configured before it is used");
  memset(registers().data[t], 0, sizeof registers().data[t]);
}

inline void load(int t, const void* memory, int64_t stride) {
  zero(t);
  for (int r = 0; r < registers().rows[t]; ++r) {
    const uint8_t* row = static_cast<const uint8_t*>(memory) + r * stride;
    memcpy(registers().data[t][r], row, static_cast<size_t>(registers().row_bytes[t]));
  }
}

inline void store(int t, void* memory, int64_t stride) {
  require(registers().configured, "configured before it is used");
  for (int r = 0; r < registers().rows[t]; ++r) {
    uint8_t* row = static_cast<uint8_t*>(memory) + r * stride;
    memcpy(row, registers().data[t][r], static_cast<size_t>(registers().row_bytes[t]));
  }
}

inline float normal_or_zero(float value) {
  return fabsf(value) < 0x1p-126f ? 0.0f : value;
}

inline float from_bf16(const uint8_t* at) {
  uint16_t half;
  memcpy(&half, at, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return normal_or_zero(value);
}

inline void require_product(const Registers& own, int sums, int a, int b) {
  require(own.configured, "configured before it is used");
  require(sums != a && sums != b && a != b, "three registers");
  require(own.rows[sums] == own.rows[a], "as many rows of sums as of a");
  require(own.row_bytes[sums] == own.row_bytes[b], "as many columns of sums as of b");
  require(own.row_bytes[a] == 4 * own.rows[b], "as many inputs of a as of b");
}

// sums (int32) += a (int8) b (TYPE: int8 or uint8); b has four inputs of each of its columns in a row.
template <typename TYPE>
inline void add_products(int sums, int a, int b) {
  Registers& own = registers();
  require_product(own, sums, a, b);
  for (int m = 0; m < own.rows[a]; ++m) {
    for (int n = 0; n < own.row_bytes[b] / 4; ++n) {
      int32_t sum;
      memcpy(&sum, own.data[sums][m] + 4 * n, sizeof sum);
      for (int k = 0; k < own.row_bytes[a]; ++k) {
        const TYPE other = static_cast<TYPE>(own.data[b][k / 4][4 * n + k % 4]);
        sum += static_cast<int8_t>(own.data[a][m][k]) * other;
      }
      memcpy(own.data[sums][m] + 4 * n, &sum, sizeof sum);
    }
  }
}

// sums (float32) += a (bf16) b (bf16); b has two inputs of each of its columns in a row. Denormal
// inputs and sums are zero; the order of the two additions is the processor's.
inline void add_bf16_products(int sums, int a, int b) {
  Registers& own = registers();
  require_product(own, sums, a, b);
  for (int m = 0; m < own.rows[a]; ++m) {
    for (int n = 0; n < own.row_bytes[b] / 4; ++n) {
      float sum;
      memcpy(&sum, own.data[sums][m] + 4 * n, sizeof sum);
      for (int pair = 0; pair < own.rows[b]; ++pair) {
        for (int k = 0; k < 2; ++k) {
          const float one = from_bf16(own.data[a][m] + 4 * pair + 2 * k);
          const float other = from_bf16(own.data[b][pair] + 4 * n + 2 * k);
          sum = normal_or_zero(sum + one * other);
        }
      }
      memcpy(own.data[sums][m] + 4 * n, &sum, sizeof sum);
    }
  }
}

}  // namespace emulated
}  // namespace lwquant

#define _tile_loadconfig(memory) ::lwquant::emulated::load_config(memory)
#define _tile_storeconfig(memory) ::lwquant::emulated::store_config(memory)
#define _tile_release() ::lwquant::emulated::release()
#define _tile_zero(t) ::lwquant::emulated::zero(t)
#define _tile_loadd(t, memory, stride) ::lwquant::emulated::load(t, memory, stride)
#define _tile_stored(t, memory, stride) ::lwquant::emulated::store(t, memory, stride)
#define _tile_dpbsud(sums, a, b) ::lwquant::emulated::add_products<uint8_t>(sums, a, b)
#define _tile_dpbssd(sums, a, b) ::lwquant::emulated::add_products<int8_t>(sums, a, b)
#define _tile_dpbf16ps(sums, a, b) ::lwquant::emulated::add_bf16_products(sums, a, b)
