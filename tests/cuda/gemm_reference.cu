#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "kernels/cuda/stored_column.h"
#include "tests/cuda/gemm_reference.h"

namespace linspec::cuda {
namespace {

__device__ double Weight(const LinspecCudaMatrix& w, int64_t row, int64_t column) {
  const int64_t i = row * w.cols + (w.type == kLinspecCudaBf16 ? column : StoredColumn(column));
  if (w.type == kLinspecCudaBf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(w.data)[i]);
  if (w.type == kLinspecCudaI8) return static_cast<const int8_t*>(w.data)[i];
  return static_cast<float>(static_cast<const __nv_fp8_e4m3*>(w.data)[i]);
}

__global__ void ReferenceKernel(const GemmParams p, double* y) {  // a warp for each output
  const int64_t n = blockIdx.x, m = blockIdx.y;
  double sum = 0;
  for (int64_t k = threadIdx.x; k < p.w.cols; k += 32) {
    sum += Weight(p.w, n, k) * __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(p.x)[m * p.w.cols + k]);
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
  if (threadIdx.x == 0) y[m * p.w.rows + n] = p.w.scales == nullptr ? sum : sum * p.w.scales[n];
}

__device__ uint32_t Mix(uint64_t i, uint32_t seed) {
  uint32_t x = static_cast<uint32_t>(i) * 2654435761u ^ static_cast<uint32_t>(i >> 32) * 40503u ^ seed;
  x ^= x >> 16, x *= 0x85ebca6bu, x ^= x >> 13, x *= 0xc2b2ae35u;
  return x ^ x >> 16;
}

__global__ void FillKernel(void* data, int64_t elements, int32_t type, float scale, uint32_t seed) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < elements; i += stride) {
    const uint32_t bits = Mix(i, seed);
    if (type == kLinspecCudaBf16) {
      const float unit = static_cast<float>(bits >> 8) * 0x1p-23f - 1.0f;
      static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(unit * scale);
    } else {
      const bool nan = type == kLinspecCudaFp8 && (bits & 0x7F) == 0x7F;
      static_cast<uint8_t*>(data)[i] = static_cast<uint8_t>(nan ? bits ^ 0x7F : bits);
    }
  }
}

}  // namespace

void LaunchReferenceGemm(const GemmParams& params, int rows, double* y, cudaStream_t stream) {
  ReferenceKernel<<<dim3(static_cast<unsigned>(params.w.rows), rows), 32, 0, stream>>>(params, y);
}

void LaunchFill(void* data, int64_t elements, int32_t type, float scale, uint32_t seed, cudaStream_t stream) {
  FillKernel<<<2048, 256, 0, stream>>>(data, elements, type, scale, seed);
}

}  // namespace linspec::cuda
