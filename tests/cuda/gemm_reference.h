// The product in double on the device, and random operands: yardsticks of gemm_test and gemm_bench.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/launch.h"

namespace linspec::cuda {

// y [rows, N] = scale * x w^T, summed in double.
void LaunchReferenceGemm(const GemmParams& params, int rows, double* y, cudaStream_t stream);

// Uniform in (-scale, scale) as bf16, or random finite int8 or fp8 codes.
void LaunchFill(void* data, int64_t elements, int32_t type, float scale, uint32_t seed, cudaStream_t stream);

}  // namespace linspec::cuda
