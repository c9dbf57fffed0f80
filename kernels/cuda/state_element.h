// What states are held in: fp32, or bf16 (float or its upper 16 bits, uint16_t). k and v of a token are then rounded to
// nearest before anything reads them, and S at the end of a fold as kernels/state_rounding.h says, whose functions this
// repeats for the device.
#pragma once

#include <cstdint>

#include "kernels/cuda/tensor_core.h"
#include "kernels/cuda/window_attention.h"
#include "kernels/state_rounding.h"

namespace linspec::cuda {

__device__ __forceinline__ uint32_t MixBits(uint32_t x) {
  x = (x ^ (x >> 16)) * kRoundingMix1;
  x = (x ^ (x >> 15)) * kRoundingMix2;
  return x ^ (x >> 16);
}
// Key of element 0 of a head's S in the fold that completes the group.
__device__ __forceinline__ uint32_t HeadRoundingKey(const LayerParams& layer, int64_t group, int kv_head) {
  return MixBits(static_cast<uint32_t>(group) ^ MixBits(static_cast<uint32_t>(layer.index) + 1)) +
         static_cast<uint32_t>(kv_head * layer.head_dim * layer.head_dim);
}
__device__ __forceinline__ float RoundStochastically(float value, uint32_t key) {
  const uint32_t bits = __float_as_uint(value);
  const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
  return __uint_as_float((bits + (finite ? MixBits(key) >> 16 : 0)) & 0xFFFF0000u);
}

// Four elements; stored ones are exact in the type.
__device__ __forceinline__ Vec4 LoadElements(const float* p) { return Load4(p); }
__device__ __forceinline__ Vec4 LoadElements(const uint16_t* p) {
  const uint2 x = *reinterpret_cast<const uint2*>(p);
  return {__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xFFFF0000u), __uint_as_float(x.y << 16),
          __uint_as_float(x.y & 0xFFFF0000u)};
}
__device__ __forceinline__ void StoreElements(float* p, const Vec4& v) { Store4(p, v); }
__device__ __forceinline__ void StoreElements(uint16_t* p, const Vec4& v) {
  *reinterpret_cast<uint2*>(p) = make_uint2(__float_as_uint(v.x) >> 16 | (__float_as_uint(v.y) & 0xFFFF0000u),
                                            __float_as_uint(v.z) >> 16 | (__float_as_uint(v.w) & 0xFFFF0000u));
}

// Four elements to shared memory as fp32: asynchronously where they are fp32, else at once.
__device__ __forceinline__ void CopyElements(float* shared, const float* global) { CopyAsync16(shared, global); }
__device__ __forceinline__ void CopyElements(float* shared, const uint16_t* global) {
  Store4(shared, LoadElements(global));
}

}  // namespace linspec::cuda
