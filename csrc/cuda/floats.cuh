// Numbers of the caller's types, as float32 inside.
#pragma once
#include "arguments.h"
#include "device.h"

namespace lwquant {
namespace gpu {

INLINE float load_float(const void* from, int64_t index, Float type) {
  if (type == kFloat32) return static_cast<const float*>(from)[index];
  const uint32_t bits = static_cast<const uint16_t*>(from)[index];
  return type == kFloat16 ? half_as_float(bits) : float_of(bits << 16);
}

INLINE void store_float(void* to, int64_t index, Float type, float v) {
  if (type == kFloat32) {
    static_cast<float*>(to)[index] = v;
  } else {
    static_cast<uint16_t*>(to)[index] = type == kFloat16 ? float_as_half(v) : float_as_bfloat(v);
  }
}

}  // namespace gpu
}  // namespace lwquant
