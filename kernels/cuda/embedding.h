// Reading one element of an embedding table of any stored type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/plugin_api.h"

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
      return static_cast<float>(static_cast<const int8_t*>(table.data)[at]) * table.scales[token];
  }
}

}  // namespace linspec::cuda
