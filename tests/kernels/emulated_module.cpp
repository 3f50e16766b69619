// csrc/cuda/kernels.cu for LWQUANT_BITS, compiled as C++: see emulated_modules.h.
#include "emulated_modules.h"

#include "cuda/dequantize.cuh"
#include "cuda/multiply_few.cuh"
#include "cuda/multiply_many.cuh"
#include "cuda/quantize.cuh"

namespace lwquant {
namespace emulated_modules {
namespace {

#define LWQUANT_PLANES (planes_of(LWQUANT_BITS, LWQUANT_SPAN))
#define MODULE                                                                \
  {LWQUANT_BITS,                                                              \
   LWQUANT_PLANES,                                                            \
   LWQUANT_SPAN,                                                              \
   {{"quantize_few", run<gpu::Quantizing, quantize_few>},                     \
    {"quantize_many", run<gpu::Quantizing, quantize_many>},                   \
    {"multiply_few_1", run<gpu::Multiplying, multiply_few_1>},                \
    {"multiply_many_8", run<gpu::Multiplying, multiply_many_8>},              \
    {"multiply_many_16", run<gpu::Multiplying, multiply_many_16>},            \
    {"multiply_many_32", run<gpu::Multiplying, multiply_many_32>},            \
    {"multiply_many_64", run<gpu::Multiplying, multiply_many_64>},            \
    {"add_parts", run<gpu::Multiplying, add_parts>},                          \
    {"dequantize", run<gpu::Dequantizing, dequantize>}}}

#define LWQUANT_SPAN 1
namespace spans_of_32 {
#include "cuda/kernels.cu"
constexpr Module kModule = MODULE;
}  // namespace spans_of_32
#undef LWQUANT_SPAN
#define LWQUANT_SPAN 2
namespace spans_of_64 {
#include "cuda/kernels.cu"
constexpr Module kModule = MODULE;
}  // namespace spans_of_64
#undef LWQUANT_SPAN
#define LWQUANT_SPAN 4
namespace spans_of_128 {
#include "cuda/kernels.cu"
constexpr Module kModule = MODULE;
}  // namespace spans_of_128

constexpr Module kModules[] = {spans_of_32::kModule, spans_of_64::kModule, spans_of_128::kModule};
const Known known(kModules);

}  // namespace
}  // namespace emulated_modules
}  // namespace lwquant
