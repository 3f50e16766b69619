// The kernels of one kind of layer: LWQUANT_BITS of codes, LWQUANT_PLANES of activations (one at 8
// bits, two at 16) and LWQUANT_SPAN blocks of inputs that share a scale of activations.
#include "dequantize.cuh"
#include "multiply_few.cuh"
#include "multiply_many.cuh"
#include "quantize.cuh"

#define FEW(tokens)                                                                   \
  KERNEL void LAUNCHED_WITH(512, 1) multiply_few_##tokens(lwquant::gpu::Multiplying m) { \
    lwquant::gpu::multiply_few<LWQUANT_BITS, LWQUANT_PLANES, LWQUANT_SPAN, tokens>(m);   \
  }
#define MANY(tokens, warps, n_blocks)                                                          \
  KERNEL void LAUNCHED_WITH(32 * warps, n_blocks)                                              \
      multiply_many_##tokens(lwquant::gpu::Multiplying m) {                                    \
    lwquant::gpu::multiply_many<LWQUANT_BITS, LWQUANT_PLANES, LWQUANT_SPAN, tokens, warps>(m); \
  }

FEW(1)
MANY(8, 4, 4)
MANY(16, 4, 4)
MANY(32, 4, 3)  // with a fourth, wide codes spill
MANY(64, 8, 1)

#undef FEW
#undef MANY

KERNEL void LAUNCHED_WITH(128, 4) quantize_few(lwquant::gpu::Quantizing q) {
  const lwquant::gpu::FewLayout<LWQUANT_PLANES, LWQUANT_SPAN> layout = {q.n_spans,
                                                                        q.layout_tokens};
  lwquant::gpu::quantize<LWQUANT_PLANES, LWQUANT_SPAN>(q, layout);
}

KERNEL void LAUNCHED_WITH(128, 4) quantize_many(lwquant::gpu::Quantizing q) {
  const lwquant::gpu::ManyLayout<LWQUANT_PLANES, LWQUANT_SPAN> layout = {q.layout_tokens};
  lwquant::gpu::quantize<LWQUANT_PLANES, LWQUANT_SPAN>(q, layout);
}

KERNEL void LAUNCHED_WITH(128, 4) add_parts(lwquant::gpu::Multiplying m) {
  lwquant::gpu::add_parts(m);
}

KERNEL void LAUNCHED_WITH(128, 4) dequantize(lwquant::gpu::Dequantizing d) {
  lwquant::gpu::dequantize<LWQUANT_BITS, LWQUANT_SPAN>(d);
}
