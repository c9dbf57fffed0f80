// Products of small matrices, up to a few hundred rows: the weights stay in the L2, so reading them again for each 64
// tokens costs little, and what counts is that nothing waits. A block is 16 weight rows times up to 64 tokens, its 8 warps
// the 8 ranges of k; tokens come straight from the L2 in fragment order, and the ranges meet in shared memory. No
// workspace, no order between blocks, and the grid grows with the tokens instead of the time.
//
// Measured on an H200 (2026-11-27), graphs of 16 products: see docs/cuda.md.
//
// Floor: 2 rows N K over the mma.sync rate, or K bytes of tokens (2 K each) per block from the L2.
#include "kernels/cuda/gemm_batch.h"
#include "kernels/cuda/pdl.h"

namespace linspec::cuda {
namespace {

constexpr int kWarps = kThreads / kWarpSize;
static_assert(kWarps == kSplit);

// Grid: tiles of weight rows, groups of kTiles * 8 tokens.
template <int kType, int kTiles>
__global__ void __launch_bounds__(kThreads, 1) SmallGemmKernel(const GemmParams p, const int rows) {
  constexpr int kParts = Range<kType>::kParts;
  __shared__ float4 partial[kSplit][kTiles][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, g = lane / 4, s = lane % 4;
  const int first = static_cast<int>(blockIdx.y) * kTiles * kTileTokens;
  const Range<kType> range(p.w, warp);
  Batch<kType> batch;
  batch.Load(p.w, range, blockIdx.x, 0);
  GridLaunchDependents();
  GridWait();
  const uint16_t* x_lane = p.x + int64_t{range.begin} * Range<kType>::kStepDepth + s * 8 * kParts;
  const auto x = [&](int step, int part, int t) {
    const int64_t token = min(first + t * kTileTokens + g, rows - 1);
    const uint16_t* from = x_lane + token * p.w.cols + step * Range<kType>::kStepDepth + part * 8;
    return step < range.valid ? WeightTraits<kType>::Pair(*reinterpret_cast<const uint4*>(from)) : uint4{};
  };
  float sums[kTiles][4] = {};
  for (int i = 0; i < range.batches(); ++i) {
    if (i > 0) batch.Load(p.w, range, blockIdx.x, i * kBatch);
    batch.template Multiply<kTiles>(i * kBatch, range.count, x, sums);
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    partial[warp][t][lane] = make_float4(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
  }
  __syncthreads();
  const OutputTile output{p, rows};
  const int64_t row = int64_t{blockIdx.x} * kTileRows + g;
  for (int t = warp; t < kTiles; t += kWarps) {
    const int token = first + t * kTileTokens + 2 * s;
    float old[4], total[4] = {};
    output.ReadOld(row, token, old);
#pragma unroll
    for (int from = 0; from < kSplit; ++from) {
      const float4 part = partial[from][t][lane];
      total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
    }
    output.Write(row, token, total, old);
  }
}

template <int kType>
void Launch(const GemmParams& p, int rows, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>((p.w.rows + kTileRows - 1) / kTileRows);
  const auto launch = [&](auto kernel, int token_tiles) {
    const int tokens = token_tiles * kTileTokens;
    const dim3 grid(tiles, static_cast<unsigned>((rows + tokens - 1) / tokens));
    LaunchOverlapped(kernel, grid, kThreads, 0, stream, 1, p, rows);
  };
  if (rows <= 8) {
    launch(&SmallGemmKernel<kType, 1>, 1);
  } else if (rows <= 16) {
    launch(&SmallGemmKernel<kType, 2>, 2);
  } else if (rows <= 32) {
    launch(&SmallGemmKernel<kType, 4>, 4);
  } else {
    launch(&SmallGemmKernel<kType, 8>, 8);
  }
}

}  // namespace

void LaunchSmallGemm(const GemmParams& params, int rows, cudaStream_t stream) {
  switch (params.w.type) {
    case kLinspecCudaI8:
      Launch<kLinspecCudaI8>(params, rows, stream);
      break;
    case kLinspecCudaFp8:
      Launch<kLinspecCudaFp8>(params, rows, stream);
      break;
    default:
      Launch<kLinspecCudaBf16>(params, rows, stream);
  }
}

}  // namespace linspec::cuda
