// What the CPU kernels agree on: plain records and declarations.
//
// Each instruction set is one source file compiled with its own flags. An inline function or a
// std template shared between them could be emitted with AVX-512 in it and then be picked by the
// linker for all of them (one-definition rule), so this header holds only records, constants
// and constexpr sums (folded at compile time), and those files include nothing else but the
// intrinsics and C's headers.
#pragma once
#include <stdint.h>

#include "activation_steps.h"
#include "rounding.h"
#include "tiles.h"

namespace lwquant {

constexpr int kWordBits = 32;
constexpr int kStep = 32;  // codes that are exactly `bits` words of a row

// What is added to single weights, row r from rows[r] on.
struct Outliers {
  const uint16_t* values;         // float16 bits
  const uint16_t* narrow_columns; // or null
  const int32_t* wide_columns;    // otherwise
  const int32_t* rows;            // (out_features + 1), or null: nothing is
};

// One stored layer; the row streams are described in lwquant/ops/layout.py.
struct Weight {
  const int32_t* codes;        // (out_features, row_words)
  const uint16_t* scales;      // (out_features, n_groups) float16 bits, or null
  const uint8_t* scale_bytes;  // (out_features, 1 + n_groups) otherwise: lwquant/ops/scale_bytes.py
  const int32_t* zeros;        // (n_groups, zero_words), or null
  const uint8_t* zero_bytes;   // (n_groups, out_features) in steps of 2^(bits-8), or null; without
                               // either every zero is 2^(bits-1)
  int bits;
  int64_t group_size;  // at most in_features
  int64_t in_features;
  int64_t out_features;
  int64_t n_groups;
  int64_t row_words;
  int64_t zero_words;
  bool int8_weights;  // see TilesHeader
  Outliers outliers;
};

// The inputs of a call as integers: x = q * span_scale with |q| <= largest_activation(bits).
// A span is up to kMaxSpanBlocks blocks of one group: its integer products stay below 2^31.
struct Activations {
  int bits;                 // 8 or 16
  const uint8_t* quads;     // (n_spans, n_tokens, span_bytes): int8; at 16 bits int16, or all high
                            // bytes and then all low ones, as the instruction set wants them; zero
                            // beyond in_features
  const float* span_scale;  // (n_spans, n_tokens)
  const float* group_sum;   // (n_groups, n_tokens): the sum of q * span_scale over the group
  int64_t n_tokens;
  int64_t n_spans;
  int64_t span_blocks;      // the last span may have fewer that matter
  int64_t span_bytes;
  int64_t spans_per_group;  // the last group may have fewer
};

// What a span of one token was rounded with, and the sum of its q.
struct Span {
  float scale;
  int32_t sum;
  bool finite;  // false: there is NaN or infinity in it, and the rest means nothing
};

// Inputs of a layer as many tokens' kernels read them, in sets of 16 tokens.
struct PanelInputs {
  const uint8_t* values;  // as the kernels arrange them
  const float* scales;    // of int8: (n_spans, whole pairs of sets)
  int64_t n_tokens;
  int64_t first_input, n_inputs;  // n_inputs are filled up with zeros beyond in_features
};

// What an instruction set does with many tokens, if not what it does with few: weights are unpacked
// to the type of the inputs, scales and zeros in them, and products of many inputs add up before
// they are stored.
struct PanelKernels {
  const char* type;  // of values
  int value_bytes;
  int64_t span_inputs;  // that share a scale; parts of the inputs are whole spans
  // Rounds n inputs of x, whose tokens lie `stride` apart, and fills them up with zeros to n_padded
  // of them; int8 also to whole spans, and the tokens to whole pairs of sets: there is room for that.
  // False: there is NaN or infinity in x, which the type does not have.
  bool (*arrange)(const float* x, int64_t n_tokens, int64_t stride, int64_t n, int64_t n_padded,
                  uint8_t* values, float* scales);
  bool (*arrange_bf16)(const uint16_t* x, int64_t n_tokens, int64_t stride, int64_t n,
                       int64_t n_padded, uint8_t* values, float* scales);
  // What those inputs make of the tiles' rows, from y on, tokens `stride` apart: bias is added to
  // the first inputs' products, what y holds to the others'. `room` is for kStripRows rows of whole
  // spans of values and a float for each span of a row, aligned to lines.
  void (*multiply)(const Tiles&, const PanelInputs&, int64_t tile, int64_t n_tiles,
                   const float* bias, uint8_t* room, int64_t stride, float* y);
  void (*narrow)(const float* from, int64_t n, uint16_t* to);  // as narrow_to_bf16()
};

constexpr int kSetTokens = 16;
constexpr int kPairTokens = 2 * kSetTokens;
constexpr int kStripRows = 2 * kTileOutputs;

// One instruction set.
struct Isa {
  const char* name;
  // n codes of one row stream -> n bytes. Reads ceil(n * bits / 32) words and no more.
  void (*unpack_row)(int bits, const int32_t* words, int64_t n, uint8_t* codes);
  // Writes the quads of n inputs, filled up with zeros to n_padded: a multiple of kBlockInputs.
  Span (*quantize_span)(const float* x, int64_t n, int64_t n_padded, int bits, uint8_t* quads);
  // The tiles' rows of y (n_tokens, out_features) = x Wᵀ + bias; bias may be null.
  void (*multiply_tiles)(const Tiles&, const Activations&, int64_t tile, int64_t n_tiles,
                         const float* bias, float* y);
  const RoundingLoops* rounding;
  const PanelKernels* bf16 = nullptr;  // null: as few tokens are
  const PanelKernels* int8 = nullptr;
};

extern const Isa kReference;
#ifdef LWQUANT_X86
extern const Isa kAvx2;
#ifdef LWQUANT_AVX_VNNI
extern const Isa kAvxVnni;
#endif
extern const Isa kAvx512Vnni;
#ifdef LWQUANT_AMX
extern const Isa kAmx;
extern const PanelKernels kAmxBf16, kAmxInt8;
#endif
#endif

// What several of them have in common
void unpack_row_avx2(int bits, const int32_t* words, int64_t n, uint8_t* codes);
void unpack_row_avx512(int bits, const int32_t* words, int64_t n, uint8_t* codes);
void narrow_to_bf16_avx512(const float* from, int64_t n, uint16_t* to);
Span quantize_span_avx512(const float* x, int64_t n, int64_t n_padded, int bits, uint8_t* quads);
void multiply_tiles_avx512(const Tiles&, const Activations&, int64_t tile, int64_t n_tiles,
                           const float* bias, float* y);

// bits.cpp
int64_t row_words(int64_t n_codes, int bits);
void pack_row(int bits, const uint8_t* codes, int64_t n, int32_t* words);
void unpack_row(int bits, const int32_t* words, int64_t n, uint8_t* codes);
uint8_t code_at(int bits, const int32_t* words, int64_t index);

// floats.cpp: the plain meaning, for any group size
float half_to_float(uint16_t half);
void widen_bf16(const uint16_t* from, int64_t n, float* to);
void narrow_to_bf16(const float* from, int64_t n, uint16_t* to);  // to the nearest, ties to even
float scale_at(const Weight&, int64_t row, int64_t group);
float zero_at(const Weight&, int64_t row, int64_t group);
// One row as float32: (code - zero) * scale + outlier. `codes` has room for in_features bytes.
void dequantize_row(const Isa&, const Weight&, int64_t row, uint8_t* codes, float* out);
int64_t outlier_column(const Outliers&, int64_t index);
// weights (out_features, in_features): adds the outliers of rows [row, row + n_rows).
void place_outliers(const Outliers&, int64_t row, int64_t n_rows, int64_t in_features,
                    float* weights);
// y (n_tokens, n_rows), tokens `stride` apart: adds what the outliers of rows [row, row + n_rows)
// make of x.
void add_outliers(const Outliers&, const float* x, int64_t n_tokens, int64_t in_features,
                  int64_t row, int64_t n_rows, int64_t stride, float* y);

// tiles.cpp
bool tiles_fit(const Weight&);  // whether its groups are whole steps
int64_t tiles_size(const Weight&);
void make_tiles(const Weight&, int n_threads, uint8_t* data);  // outliers are not in it
bool read_tiles(const uint8_t* data, int64_t size, Tiles* out);  // false: these are no tiles
// The same of a header whose tiles are elsewhere, `size` bytes with it: out->first is null.
bool read_header(const TilesHeader&, int64_t size, Tiles* out);
// The longest span that groups are whole numbers of, in blocks.
int64_t span_blocks(const Tiles&);
// The row streams again; `zeros` (n_groups, out_features) in bytes, null where there are none.
void unmake_tiles(const Tiles&, int n_threads, int32_t* codes, uint8_t* scales, uint8_t* zeros);
// out (n_rows, in_features): the weight's rows from those of `first_tile` on, with outliers.
void dequantize_tiles(const Tiles&, const Outliers&, int64_t first_tile, int64_t n_rows,
                      int n_threads, float* out);
// The codes of one tile, (kTileOutputs, padded_inputs).
void tile_codes(const Tiles&, int64_t tile, uint8_t* codes);
float tile_scale(const Tiles&, int64_t tile, int64_t row, int64_t group);
float tile_zero(const Tiles&, int64_t tile, int64_t row, int64_t group);

// activations.cpp: false when a value is NaN or infinite (then quads mean nothing)
bool quantize_activations(const Isa&, const Tiles&, const Activations&, const float* x,
                          uint8_t* quads, float* span_scale, float* group_sum);

bool amx_permitted();  // amx_permission.cpp

// dispatch.cpp
int available_isas(const Isa** out, int capacity);  // best last; returns how many
const Isa& current_isa();
bool select_isa(const char* name);  // false: unknown, or not on this machine

// linear.cpp: the host functions; shapes have been checked
// What such a call rounds weights and inputs to, or null: codes are multiplied as they are.
const PanelKernels* panel_kernels(int bits, bool int8_weights, int64_t n_tokens,
                                  int activation_bits, bool bf16_inputs);
// y (n_tokens, out_features) = x Wᵀ + bias, x as integers of 8 or 16 bits or in bf16. False when x
// holds NaN or infinity, which integers cannot: y means nothing then.
bool linear(const Tiles&, const Outliers&, const float* bias, const float* x, int64_t n_tokens,
            int activation_bits, int n_threads, float* y);
// The same of bf16: what float32 gives, rounded, where both are rounded to the same type.
bool linear(const Tiles&, const Outliers&, const float* bias, const uint16_t* x, int64_t n_tokens,
            int activation_bits, int n_threads, uint16_t* y);
// out (n_rows, in_features): rows [row, row + n_rows) as float32.
void dequantize(const Weight&, int64_t row, int64_t n_rows, int n_threads, float* out);

}  // namespace lwquant
