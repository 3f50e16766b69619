// The host side of the GPU kernels: which of them run, on what grid, with what workspace.
//
// The driver is reached through a table of its functions, since no machine is built with it: a user's
// has it in libcuda, the tests have one that runs the kernels on the CPU.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "../column_block.h"
#include "../kernels.h"
#include "arguments.h"

namespace lwquant {
namespace gpu {

// Of the driver's C interface, by their meaning; each returns 0 or the number of an error.
struct Driver {
  int (*load_module)(void** module, const void* image);                            // cuModuleLoadData
  int (*find_function)(void** function, void* module, const char* name);           // cuModuleGetFunction
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,  // cuLaunchKernel
                unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                void* stream, void** arguments, void** extra);
  int (*error_text)(int error, const char** text);  // cuGetErrorString
  int (*find_device)(int* device, int index);         // cuDeviceGet
  int (*retain_context)(void** context, int device);  // cuDevicePrimaryCtxRetain
  int (*get_context)(void** context);                 // cuCtxGetCurrent
  int (*set_context)(void* context);                  // cuCtxSetCurrent
  // cuOccupancyMaxActiveBlocksPerMultiprocessor
  int (*count_resident)(int* n_blocks, void* function, int block_threads, size_t shared_bytes);
};

const Driver* system_driver();  // null where there is none

enum Kernel {
  kQuantizeFew,
  kQuantizeMany,
  kMultiplyFew1,
  kMultiplyMany8,
  kMultiplyMany16,
  kMultiplyMany32,
  kMultiplyMany64,
  kAddParts,
  kDequantize,
  kKernels
};
constexpr const char* kKernelNames[kKernels] = {
    "quantize_few",     "quantize_many",    "multiply_few_1", "multiply_many_8",
    "multiply_many_16", "multiply_many_32", "multiply_many_64", "add_parts", "dequantize"};

// Where code is loaded: the driver, and the context of one GPU that torch uses, too.
struct Place {
  const Driver* driver;
  void* context;
};

constexpr int kFewSizes = 3;  // of blocks for one token: kMostFewWarps, half of them, a quarter

// Machine code of csrc/cuda/kernels.cu for one kind of layer, loaded, and how many blocks of a kernel
// the whole GPU runs at a time: registers decide it.
struct Module {
  Place place;
  int bits, activation_bits, span_blocks;
  void* functions[kKernels];
  int64_t few_at_a_time[kFewSizes];
  int64_t many_at_a_time[kKernels];  // of those for more tokens
};

// Null, or what went wrong.
const char* load_module(const Driver&, int device_index, const void* image, int bits,
                        int activation_bits, int span_blocks, int n_multiprocessors, Module* out);

// How up to most_tokens() are multiplied. Follows from the layer, the number of tokens and the
// kernels on this GPU, and says how much workspace is needed, for run() to use as it likes.
struct Plan {
  bool many;          // by tensor cores
  int layout_tokens;  // of one layout of rounded activations
  int n_layouts;
  int n_chunks;
  int n_splits;
  int n_warps;  // of a block: many share the inputs of one tile, or each has a tile of its own
  int64_t layout_bytes;
  int64_t parts_offset;
  int64_t workspace_bytes;
};

int64_t most_tokens(int activation_bits);
bool fits_gpu(const Tiles&);  // whether its sizes fit the kernels' integers
Plan make_plan(const Module&, const Tiles&, int64_t n_tokens);

// A call. Addresses are the GPU's; `workspace` is aligned to 16 bytes.
struct Call {
  const uint8_t* tiles;  // with their header
  const void* x;
  Float x_type;
  int64_t n_tokens;  // 1 .. most_tokens()
  const void* bias;  // or null
  Float bias_type;
  void* y;
  Float y_type;
  uint8_t* workspace;
  void* stream;
};

const char* multiply(const Module&, const Tiles&, const Plan&, const Call&);

// out (n_rows, in_features): rows of the weight from those of `first_tile` on.
const char* dequantize(const Module&, const Tiles&, const uint8_t* tiles, int64_t first_tile,
                       int64_t n_rows, void* out, Float out_type, void* stream);

// Machine code of csrc/cuda/rounding.cu, loaded.
struct RoundingModule {
  Place place;
  void* round_block;
};

const char* load_rounding(const Driver&, int device_index, const void* image, RoundingModule* out);

// Addresses are the GPU's; 1 .. kRoundingColumns columns.
const char* round_block(const RoundingModule&, const ColumnBlock&, void* stream);

}  // namespace gpu
}  // namespace lwquant
