// int8 and fp8 weights as bf16 for cuBLASLt: 1 byte read and 2 written per weight, so 3 bytes over the bandwidth of the
// L2 and memory; the product that follows reads the slice from the L2.
#include "kernels/cuda/gemm_tile.h"
#include "kernels/cuda/pdl.h"

namespace linspec::cuda {
namespace {

// A thread widens 16 weights of one row.
template <int kType>
__global__ void __launch_bounds__(kThreads)
    WidenKernel(const LinspecCudaMatrix w, const int64_t row_begin, const int64_t rows, uint16_t* out) {
  GridLaunchDependents();
  GridWait();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, per_row = w.cols / 16;
  if (i >= rows * per_row) return;
  const int64_t row = i / per_row;
  uint32_t pairs[8];
  WeightTraits<kType>::Widen(*(static_cast<const uint4*>(w.data) + row_begin * per_row + i), pairs);
  const float scale = w.scales[row_begin + row];
#pragma unroll
  for (uint32_t& pair : pairs) {
    const float2 value = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
    const __nv_bfloat162 scaled = __floats2bfloat162_rn(value.x * scale, value.y * scale);
    pair = *reinterpret_cast<const uint32_t*>(&scaled);
  }
  auto* to = reinterpret_cast<uint4*>(out) + 2 * i;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t* p = pairs + half * 4;
    to[half] = {p[0], p[1], p[2], p[3]};
  }
}

}  // namespace

void LaunchWidenWeights(const LinspecCudaMatrix& w, int64_t row_begin, int64_t rows, uint16_t* out,
                        cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((rows * (w.cols / 16) + kThreads - 1) / kThreads);
  const auto kernel = w.type == kLinspecCudaI8 ? &WidenKernel<kLinspecCudaI8> : &WidenKernel<kLinspecCudaFp8>;
  LaunchOverlapped(kernel, blocks, kThreads, 0, stream, 1, w, row_begin, rows, out);
}

}  // namespace linspec::cuda
