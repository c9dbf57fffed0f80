// One head of q or k in the registers of a warp: RoPE, then the L2 norm. Used by the kernel that does all rows of a
// step and by tree_verify where it takes rows as the product left them: the same instructions, so the same bits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/window_attention.h"

namespace linspec::cuda {

__device__ __forceinline__ float WarpSum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  return value;
}

// A lane's at most two pairs of a head. kWide: of a head of 128, whose lanes have two consecutive ones, for 8-byte
// loads.
template <bool kWide>
struct RopeLane {
  float low[2], high[2];

  __device__ __forceinline__ static int Index(int lane, int part) { return kWide ? 2 * lane + part : lane + part * 32; }
  __device__ __forceinline__ static bool Has(int lane, int half, int part) { return kWide || Index(lane, part) < half; }
  __device__ __forceinline__ void Load(const float* x, int lane, int half) {
    if constexpr (kWide) {
      const float2 a = reinterpret_cast<const float2*>(x)[lane], b = reinterpret_cast<const float2*>(x + half)[lane];
      low[0] = a.x, low[1] = a.y, high[0] = b.x, high[1] = b.y;
    } else {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const bool has = Has(lane, half, part);
        low[part] = has ? x[Index(lane, part)] : 0.0f;
        high[part] = has ? x[Index(lane, part) + half] : 0.0f;
      }
    }
  }
  // By cosines and sines, then to length 1.
  __device__ __forceinline__ void TurnAndNormalize(const RopeLane& angles, int lane, int half, float eps) {
    float squares = 0.0f;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      if (!Has(lane, half, part)) continue;
      const float a = low[part], b = high[part], cosine = angles.low[part], sine = angles.high[part];
      low[part] = fmaf(a, cosine, -(b * sine));
      high[part] = fmaf(b, cosine, a * sine);
      squares = fmaf(low[part], low[part], fmaf(high[part], high[part], squares));
    }
    const float scale = 1.0f / sqrtf(WarpSum(squares) + eps);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      low[part] *= scale;
      high[part] *= scale;
    }
  }
  __device__ __forceinline__ void LoadAngles(const float2* angles, int lane, int half) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const float2 angle = angles[min(Index(lane, part), half - 1)];
      low[part] = angle.x, high[part] = angle.y;
    }
  }
  __device__ __forceinline__ void Round() {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      low[part] = __uint_as_float(static_cast<uint32_t>(RoundToBf16(low[part])) << 16);
      high[part] = __uint_as_float(static_cast<uint32_t>(RoundToBf16(high[part])) << 16);
    }
  }
  __device__ __forceinline__ void Store(uint16_t* x, int lane, int half) const {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      if (!Has(lane, half, part)) continue;
      x[Index(lane, part)] = RoundToBf16(low[part]);
      x[Index(lane, part) + half] = RoundToBf16(high[part]);
    }
  }
  __device__ __forceinline__ void Store(float* x, int lane, int half) const {
    if constexpr (kWide) {
      reinterpret_cast<float2*>(x)[lane] = make_float2(low[0], low[1]);
      reinterpret_cast<float2*>(x + half)[lane] = make_float2(high[0], high[1]);
    } else {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        if (!Has(lane, half, part)) continue;
        x[Index(lane, part)] = low[part];
        x[Index(lane, part) + half] = high[part];
      }
    }
  }
};

}  // namespace linspec::cuda
