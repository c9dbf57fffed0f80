// The read ceiling: 16-byte loads, four in flight per thread, one float written per block that no optimiser can drop.
#include "kernels/cuda/block.h"
#include "tests/cuda/per_node.h"

namespace linspec::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) ReadKernel(const float* data, int64_t floats, float* out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * 4;
  Vec4 sum{0, 0, 0, 0};
#pragma unroll 4
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4; i < floats; i += stride) {
    Fma4(1.0f, Load4(data + i), sum);
  }
  const float total = sum.x + sum.y + sum.z + sum.w;
  if (__syncthreads_or(total == 12345.678f) || threadIdx.x == 0) out[blockIdx.x] = total;
}

}  // namespace

void LaunchRead(const float* data, int64_t floats, float* out, int blocks, cudaStream_t stream) {
  ReadKernel<<<blocks, kThreads, 0, stream>>>(data, floats, out);
}

}  // namespace linspec::cuda
