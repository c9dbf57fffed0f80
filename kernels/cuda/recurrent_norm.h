// The norms of a recurrent head's input, [RMSNorm(state), RMSNorm(embedding)]: one order of sums, so that a level has
// the same bits whether it is launched alone or with all others.
//
// A row is vectors of 128 values, four a lane. A lane adds the squares of its part of each vector, vectors v, v + 8,
// v + 16 ... first, then those for v = 0 to 7; then the lanes are added.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace linspec::cuda {

inline constexpr int kNormVectors = 8;

__device__ __forceinline__ float Squares(const float4& v) {
  return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, v.x * v.x)));
}
__device__ __forceinline__ float AddLanes(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  return value;
}
__device__ __forceinline__ float InverseRmsOf(float squares, float inverse_dim, float eps) {
  return rsqrtf(fmaf(squares, inverse_dim, eps));
}
__device__ __forceinline__ uint2 Normed(const float4& v, float scale, const float4& weight) {  // bf16
  const __nv_bfloat162 low = __floats2bfloat162_rn(v.x * scale * weight.x, v.y * scale * weight.y);
  const __nv_bfloat162 high = __floats2bfloat162_rn(v.z * scale * weight.z, v.w * scale * weight.w);
  return {*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high)};
}

}  // namespace linspec::cuda
