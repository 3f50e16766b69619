// The processor as the kernels see it: every instruction that is no plain C++, by name.
//
// Under LWQUANT_EMULATE_CUDA the same names are functions of a C++ compiler, each written from the
// definition of its instruction: tests/kernels/emulated_cuda.h.
#pragma once
#include <stdint.h>

#ifdef LWQUANT_EMULATE_CUDA
#include "emulated_cuda.h"
#else

#define KERNEL extern "C" __global__
// Registers are capped so that `n_blocks` blocks of `n_threads` fit a multiprocessor.
#define LAUNCHED_WITH(n_threads, n_blocks) __launch_bounds__(n_threads, n_blocks)
#define SHARED __shared__
#define INLINE __forceinline__

namespace lwquant {
namespace gpu {

struct Four {
  uint32_t word[4];
};

INLINE int thread_index() { return static_cast<int>(threadIdx.x); }
INLINE int n_threads() { return static_cast<int>(blockDim.x); }
INLINE int block_x() { return static_cast<int>(blockIdx.x); }
INLINE int block_y() { return static_cast<int>(blockIdx.y); }
INLINE int block_z() { return static_cast<int>(blockIdx.z); }

// All threads of the block arrive, and see what the others wrote before.
INLINE void barrier() { __syncthreads(); }

// Memory that no kernel writes while this one runs.
INLINE uint32_t load_byte(const uint8_t* from) { return __ldg(from); }
INLINE uint32_t load_half(const uint8_t* from) {
  return __ldg(reinterpret_cast<const unsigned short*>(from));
}
INLINE Four load_four(const uint8_t* from) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
  return {{v.x, v.y, v.z, v.w}};
}
INLINE float load_float(const float* from) { return __ldg(from); }
INLINE void load_pair(const void* from, float& first, float& second) {
  const float2 v = __ldg(static_cast<const float2*>(from));
  first = v.x, second = v.y;
}
// For what is read once: it pushes nothing out of the L1 cache.
INLINE uint32_t load_word_once(const uint8_t* from) {
  uint32_t v;
  asm("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}

// Shared memory in 8 and 16 bytes at a time.
INLINE void read_two(const uint8_t* from, uint32_t (&to)[2]) {
  const uint2 v = *reinterpret_cast<const uint2*>(from);
  to[0] = v.x, to[1] = v.y;
}
INLINE Four read_four(const uint8_t* from) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}

// 16 bytes from global to shared memory while the thread goes on. Copies up to end_copies() are one
// group; wait_copies<N>() returns when no more than the newest N groups of this thread are under way.
INLINE void start_copy(uint8_t* to, const uint8_t* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
INLINE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
INLINE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Of the whole warp: what the thread in `lane` holds, and in the lane that differs by `bits`.
INLINE uint32_t from_lane(uint32_t v, int lane) { return __shfl_sync(~0u, v, lane); }
INLINE uint32_t from_lane_xor(uint32_t v, int bits) { return __shfl_xor_sync(~0u, v, bits); }

// sum + the products of four unsigned bytes and four signed ones.
INLINE int32_t add_products(uint32_t codes, uint32_t values, int32_t sum) {
  int32_t result;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(codes), "r"(values), "r"(sum));
  return result;
}

// sums (16 x 8) += codes (16 x 32, unsigned bytes) times values (32 x 8, signed bytes), by the whole
// warp. With g = lane / 4 and t = lane % 4, a thread holds of codes rows g, g + 8, g, g + 8 at
// columns 4t.., 4t.., 16 + 4t.., 16 + 4t..; of values column g at rows 4t.. and 16 + 4t..; of sums
// rows g, g, g + 8, g + 8 at columns 2t, 2t + 1, 2t, 2t + 1 (PTX: m16n8k32).
INLINE void add_matrix_products(int32_t (&sums)[4], uint32_t codes0, uint32_t codes1,
                                uint32_t codes2, uint32_t codes3, uint32_t values0,
                                uint32_t values1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(codes0), "r"(codes1), "r"(codes2), "r"(codes3), "r"(values0), "r"(values1));
}

INLINE uint32_t bits_of(float v) { return __float_as_uint(v); }
INLINE float float_of(uint32_t bits) { return __uint_as_float(bits); }
INLINE int32_t nearest(float v) { return __float2int_rn(v); }  // even where two are as near
INLINE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// Each rounded by itself, so that it equals the CPU's.
INLINE float product(float a, float b) { return __fmul_rn(a, b); }
INLINE float difference(float a, float b) { return __fsub_rn(a, b); }
INLINE float quotient(float a, float b) { return __fdiv_rn(a, b); }

INLINE float half_as_float(uint32_t half) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(static_cast<unsigned short>(half)));
  return v;
}
INLINE uint16_t float_as_half(float v) {
  unsigned short half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(v));
  return half;
}
INLINE uint16_t float_as_bfloat(float v) {
  unsigned short bfloat;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bfloat) : "f"(v));
  return bfloat;
}

}  // namespace gpu
}  // namespace lwquant
#endif
