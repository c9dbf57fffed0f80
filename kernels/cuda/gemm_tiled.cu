// Products of many rows where cuBLASLt is missing or has no kernel: 128 weight rows by 128 tokens per block.
//
// A four-stage cp.async pipeline brings one step (64 bytes of each weight row, and the tokens' same k) at a time into
// shared memory; 8 warps of 64 weight rows by 32 tokens read their operands as contiguous 512-byte pieces, free of bank
// conflicts. int8 and fp8 stay narrow in shared memory and widen on the way to the registers. The sum over k is taken
// in the same kSplit ranges as in the streaming kernel and the ranges added in the same order, so the bits are equal.
//
// Measured on an H200 (2026-11-27): 240 TFLOP/s at 4,096 rows of 22016 x 4096, where cuBLASLt reaches 680 to 750.
// Floor: 2 rows N K over the bf16 rate of mma.sync, about 60 % of wgmma's on sm_90.
#include "kernels/cuda/gemm_tile.h"
#include "kernels/cuda/pdl.h"

namespace linspec::cuda {
namespace {

constexpr int kBlockRows = 128, kBlockTokens = 128, kStages = 4;
constexpr int kWarpRowTiles = 4, kWarpTokenTiles = 4;

template <int kType>
struct Stage {
  static constexpr int kParts = WeightTraits<kType>::kParts;
  uint4 w[kBlockRows][4];
  uint4 x[kParts][kBlockTokens][4];
};

__device__ void CopyAsync(void* to, const void* from, bool inside) {  // zeros if not
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(to)), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}

// What a thread copies of each step: 16-byte pieces of kCopies rows of weights and of tokens, one step after another.
template <int kType>
struct Copier {
  static constexpr int kParts = Stage<kType>::kParts, kElements = 8 * kParts, kBytes = 2 / kParts;
  static constexpr int kCopies = kBlockRows * 4 / kThreads, kTokenChunks = 4 * kParts;
  static constexpr int kTokenCopies = kBlockTokens * kTokenChunks / kThreads;
  static_assert(kBlockRows == kBlockTokens);

  const char* w[kCopies];
  const uint16_t* x[kTokenCopies];
  bool w_inside[kCopies], x_inside[kTokenCopies];
  int w_depth, x_depth;  // k of this thread's first piece, from the end of the row: negative while inside

  __device__ Copier(const GemmParams& p, int rows) {
    const int64_t depth = p.w.cols;
    const int w_chunk = threadIdx.x % 4, x_chunk = threadIdx.x % kTokenChunks;
    w_depth = static_cast<int>(w_chunk * kElements - depth);
    x_depth = static_cast<int>(x_chunk * 8 - depth);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t row = int64_t{blockIdx.y} * kBlockRows + threadIdx.x / 4 + i * (kThreads / 4);
      w_inside[i] = row < p.w.rows;
      w[i] = static_cast<const char*>(p.w.data) + (w_inside[i] ? row * depth + w_chunk * kElements : 0) * kBytes;
    }
#pragma unroll
    for (int i = 0; i < kTokenCopies; ++i) {
      const int64_t token =
          int64_t{blockIdx.x} * kBlockTokens + threadIdx.x / kTokenChunks + i * (kThreads / kTokenChunks);
      x_inside[i] = token < rows;
      x[i] = p.x + (x_inside[i] ? token * depth + x_chunk * 8 : 0);
    }
  }

  // The next step into `stage`; a commit group of its own, empty past the end.
  __device__ void Next(Stage<kType>& stage) {
    const bool w_in = w_depth < 0, x_in = x_depth < 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool inside = w_in && w_inside[i];
      CopyAsync(&stage.w[threadIdx.x / 4 + i * (kThreads / 4)][threadIdx.x % 4], w[i], inside);
      w[i] += kStepBytes;
    }
#pragma unroll
    for (int i = 0; i < kTokenCopies; ++i) {
      const int chunk = threadIdx.x % kTokenChunks;
      CopyAsync(&stage.x[chunk % kParts][threadIdx.x / kTokenChunks + i * (kThreads / kTokenChunks)][chunk / kParts],
                x[i], x_in && x_inside[i]);
      x[i] += 4 * kElements;
    }
    w_depth += 4 * kElements;
    x_depth += 4 * kElements;
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
};

using Sums = float[kWarpRowTiles][kWarpTokenTiles][4];

template <int kType>
__device__ void MultiplyStage(const Stage<kType>& stage, int warp_row, int warp_token, Sums& sums) {
  constexpr int kParts = Stage<kType>::kParts;
  const int lane = threadIdx.x % kWarpSize;
  uint4 x[kWarpTokenTiles][kParts];
#pragma unroll
  for (int t = 0; t < kWarpTokenTiles; ++t) {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      x[t][part] = stage.x[part][warp_token + t * kTileTokens + lane / 4][lane % 4];
  }
#pragma unroll
  for (int r = 0; r < kWarpRowTiles; ++r) {
    const int row = warp_row + r * kTileRows + lane / 4;
    uint32_t low[4 * kParts], high[4 * kParts];
    WeightTraits<kType>::Widen(stage.w[row][lane % 4], low);
    WeightTraits<kType>::Widen(stage.w[row + 8][lane % 4], high);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint32_t *a = low + part * 4, *b = high + part * 4;
#pragma unroll
      for (int t = 0; t < kWarpTokenTiles; ++t) Mma(sums[r][t], a[0], b[0], a[1], b[1], x[t][part].x, x[t][part].y);
#pragma unroll
      for (int t = 0; t < kWarpTokenTiles; ++t) Mma(sums[r][t], a[2], b[2], a[3], b[3], x[t][part].z, x[t][part].w);
    }
  }
}

template <int kType>
__global__ void __launch_bounds__(kThreads, 1) TiledGemmKernel(const GemmParams p, const int rows) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto* stages = reinterpret_cast<Stage<kType>*>(shared);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warp_row = warp % 2 * kWarpRowTiles * kTileRows, warp_token = warp / 2 * kWarpTokenTiles * kTileTokens;
  const int steps = NumSteps(p.w);
  GridLaunchDependents();
  GridWait();
  Copier<kType> copier(p, rows);
  for (int i = 0; i < kStages - 1; ++i) copier.Next(stages[i]);
  Sums total = {};
  int step = 0;
  for (int range = 0; range < kSplit; ++range) {
    Sums sums = {};
    for (const int end = RangeBegin(steps, range + 1); step < end; ++step) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
      __syncthreads();  // the step has arrived for all, and all are done with the stage that is filled next
      copier.Next(stages[(step + kStages - 1) % kStages]);
      MultiplyStage(stages[step % kStages], warp_row, warp_token, sums);
    }
#pragma unroll
    for (int i = 0; i < kWarpRowTiles * kWarpTokenTiles * 4; ++i) (&total[0][0][0])[i] += (&sums[0][0][0])[i];
  }
  const OutputTile output{p, rows};
#pragma unroll
  for (int r = 0; r < kWarpRowTiles; ++r) {
#pragma unroll
    for (int t = 0; t < kWarpTokenTiles; ++t) {
      const int64_t row = int64_t{blockIdx.y} * kBlockRows + warp_row + r * kTileRows + lane / 4;
      const int token = static_cast<int>(blockIdx.x) * kBlockTokens + warp_token + t * kTileTokens + lane % 4 * 2;
      float old[4], token_scales[2];
      output.ReadOld(row, token, old);
      output.ReadTokenScales(token, token_scales);
#pragma unroll
      for (int i = 0; i < 4; ++i) total[r][t][i] *= token_scales[i % 2];
      output.Write(row, token, total[r][t], old);
    }
  }
}

template <int kType>
void Launch(const GemmParams& params, int rows, cudaStream_t stream) {
  constexpr int kShared = kStages * sizeof(Stage<kType>);
  if (cudaFuncSetAttribute(&TiledGemmKernel<kType>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared) !=
      cudaSuccess) {
    return;
  }
  const dim3 grid((rows + kBlockTokens - 1) / kBlockTokens,
                  static_cast<unsigned>((params.w.rows + kBlockRows - 1) / kBlockRows));
  LaunchOverlapped(&TiledGemmKernel<kType>, grid, kThreads, kShared, stream, 1, params, rows);
}

}  // namespace

void LaunchTiledGemm(const GemmParams& params, int rows, cudaStream_t stream) {
  switch (params.w.type) {
    case kLinspecCudaI8:
      return Launch<kLinspecCudaI8>(params, rows, stream);
    case kLinspecCudaFp8:
      return Launch<kLinspecCudaFp8>(params, rows, stream);
    default:
      return Launch<kLinspecCudaBf16>(params, rows, stream);
  }
}

}  // namespace linspec::cuda
