// Reading one element of an embedding table of any stored type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/plugin_api.h"
#include "kernels/cuda/stored_column.h"

namespace linspec::cuda {

// Element `column` of row `token`; int8 with its row's scale.
__device__ inline float EmbeddingValue(const LinspecCudaMatrix& table, int64_t token, int64_t column) {
  const int64_t at = token * table.cols + column;
  switch (table.type) {
    case kLinspecCudaF32:
      return static_cast<const float*>(table.data)[at];
    case kLinspecCudaF16:
      return __half2float(static_cast<const __half*>(table.data)[at]);
    case kLinspecCudaBf16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(table.data)[at]);
    default:
      return static_cast<float>(static_cast<const int8_t*>(table.data)[at - column + StoredColumn(column)]) *
             table.scales[token];
  }
}

// An int8 row by fours of columns.
struct ByteRow {
  const uint2* words;
  __device__ __forceinline__ char4 operator[](int64_t i) const {
    const uint2 pair = words[i / 4 * 2 + i % 2];
    const uint32_t four = __byte_perm(pair.x, pair.y, i % 4 < 2 ? 0x6420 : 0x7531);
    return *reinterpret_cast<const char4*>(&four);
  }
};

// f(row, widen): elements 4 i to 4 i + 3 of row `token` are widen(row[i]); a multiple of 4 columns. The type is asked
// for once, so that what f loads first is under way at once.
template <typename Function>
__device__ __forceinline__ void ReadEmbedding(const LinspecCudaMatrix& table, int64_t token, Function f) {
  const int64_t at = token * table.cols;
  switch (table.type) {
    case kLinspecCudaF32:
      return f(reinterpret_cast<const float4*>(static_cast<const float*>(table.data) + at),
               [](const float4& v) { return v; });
    case kLinspecCudaF16:
      return f(reinterpret_cast<const uint2*>(static_cast<const __half*>(table.data) + at), [](const uint2& v) {
        const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&v.x));
        const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&v.y));
        return float4{low.x, low.y, high.x, high.y};
      });
    case kLinspecCudaBf16:
      return f(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(table.data) + at), [](const uint2& v) {
        return float4{__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xFFFF0000u), __uint_as_float(v.y << 16),
                      __uint_as_float(v.y & 0xFFFF0000u)};
      });
    default: {
      const float scale = table.scales[token];
      return f(ByteRow{reinterpret_cast<const uint2*>(static_cast<const int8_t*>(table.data) + at)},
               [scale](const char4& v) {
                 return float4{static_cast<float>(v.x) * scale, static_cast<float>(v.y) * scale,
                               static_cast<float>(v.z) * scale, static_cast<float>(v.w) * scale};
               });
    }
  }
}

}  // namespace linspec::cuda
