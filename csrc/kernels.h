// What the CPU kernels agree on: plain records and declarations.
//
// Each instruction set is one source file compiled with its own flags. An inline function or a
// std template shared between them could be emitted with AVX-512 in it and then be picked by the
// linker for all of them (one-definition rule), so this header holds only records, constants
// and constexpr sums (folded at compile time), and those files include nothing else but the
// intrinsics and C's headers.
#pragma once
#include <stdint.h>

#include "rounding.h"

namespace lwquant {

constexpr int kWordBits = 32;
constexpr int kStep = 32;      // codes a kernel unpacks at once: exactly `bits` words of a row
constexpr int kTileRows = 32;  // rows of one task: exactly `bits` words of a row of zeros
// Most steps that share one activation scale. 4 steps put 8 products of at most 255 * 32767 in a
// 32-bit lane (AVX-512; 16 with AVX2), far from overflow.
constexpr int kMaxSpanSteps = 4;

// One stored layer; the row streams are described in lwquant/ops/layout.py.
struct Weight {
  const int32_t* codes;        // (out_features, row_words)
  const uint16_t* scales;      // (out_features, n_groups) float16 bits, or null
  const uint8_t* scale_bytes;  // (out_features, 1 + n_groups) otherwise: lwquant/ops/scale_bytes.py
  const int32_t* zeros;        // (n_groups, zero_words), or null
  const uint8_t* zero_bytes;   // (n_groups, out_features) in steps of 2^(bits-8), or null; without
                               // either every zero is 2^(bits-1)
  const float* bias;           // (out_features), or null
  int bits;
  int64_t group_size;  // at most in_features
  int64_t in_features;
  int64_t out_features;
  int64_t n_groups;
  int64_t row_words;
  int64_t zero_words;
  // What is added to single weights, row r from outlier_rows[r] on; null: nothing is.
  const uint16_t* outlier_values;   // float16 bits
  const uint16_t* narrow_columns;   // or null
  const int32_t* wide_columns;      // otherwise
  const int32_t* outlier_rows;      // (out_features + 1)
};

constexpr int kByteExponent = 10;  // a row's first byte, shifted so, starts its window
constexpr int kByteStep = 6;       // the others count float16 patterns above it in steps of 2^6

// The input of one call and, for the integer kernels, its 16-bit form: x = q * span_scale.
// A span is span_steps (1, 2 or 4) steps; groups start on a span, only the last span is shorter.
struct Activations {
  const float* x;           // (n_tokens, in_features)
  const int16_t* q;         // (n_tokens, n_steps * kStep), zero beyond in_features
  const float* span_scale;  // (n_tokens, n_spans)
  const float* group_sum;   // (n_tokens, n_groups): the sum of q * span_scale over the group
  int64_t n_tokens;
  int64_t n_steps;
  int64_t n_spans;
  int64_t span_steps;
  int64_t spans_per_group;  // the last group may have fewer
};

// One instruction set.
struct Isa {
  const char* name;
  // n codes of one row stream -> n bytes. Reads ceil(n * bits / 32) words and no more.
  void (*unpack_row)(int bits, const int32_t* words, int64_t n, uint8_t* codes);
  // y[:, row : row + n_rows] for a tile that starts at a multiple of kTileRows.
  // `scratch` has room for scratch_floats(n_groups). Null: use the float kernel.
  void (*linear_tile)(const Weight&, const Activations&, int64_t row, int64_t n_rows,
                      float* scratch, float* y);
  const RoundingLoops* rounding;
};

// What one more in a byte of zeros adds to the zero-point, in codes.
constexpr float byte_zero_step(int bits) { return 1.0f / static_cast<float>(1 << (8 - bits)); }

// A tile's zeros and two rows of scales, as floats, each row of scales in whole vectors of 16.
constexpr int64_t scratch_floats(int64_t n_groups) {
  return n_groups * kTileRows + 2 * (n_groups + 16);
}

extern const Isa kReference;
#ifdef LWQUANT_X86
extern const Isa kAvx2;
extern const Isa kAvx512Vnni;
#endif

// bits.cpp
int64_t row_words(int64_t n_codes, int bits);
void pack_row(int bits, const uint8_t* codes, int64_t n, int32_t* words);
void unpack_row(int bits, const int32_t* words, int64_t n, uint8_t* codes);
uint8_t code_at(int bits, const int32_t* words, int64_t index);

// floats.cpp: the plain meaning, for any group size
float half_to_float(uint16_t half);
float scale_at(const Weight&, int64_t row, int64_t group);
float zero_at(const Weight&, int64_t row, int64_t group);
// One row as float32: (code - zero) * scale + outlier. `codes` has room for in_features bytes.
void dequantize_row(const Isa&, const Weight&, int64_t row, uint8_t* codes, float* out);
int64_t outlier_column(const Weight&, int64_t index);
// y (n_tokens, out_features): adds what the outliers of rows [row, row + n_rows) make of x.
void add_outliers(const Weight&, const float* x, int64_t n_tokens, int64_t row, int64_t n_rows,
                  float* y);
float dot(const float* a, const float* b, int64_t n);

// activations.cpp: false when a value is NaN or infinite (then q means nothing)
bool quantize_activations(const Weight&, const Activations&, int16_t* q, float* span_scale,
                          float* group_sum);

// dispatch.cpp
int available_isas(const Isa** out, int capacity);  // best last; returns how many
const Isa& current_isa();
bool select_isa(const char* name);  // false: unknown, or not on this machine

// linear.cpp: the host functions; shapes have been checked
// y (n_tokens, out_features) = x Wᵀ + bias.
void linear(const Weight&, const float* x, int64_t n_tokens, int n_threads, float* y);
// out (n_rows, in_features): rows [row, row + n_rows) as float32.
void dequantize(const Weight&, int64_t row, int64_t n_rows, int n_threads, float* out);

}  // namespace lwquant
