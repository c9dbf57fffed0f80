// Products of small matrices, up to a few hundred rows: the weights stay in the L2, so reading them again for each 64
// tokens costs little, and what counts is that nothing waits. A block is 16 weight rows times up to 64 tokens, its 8
// warps the 8 ranges of k; tokens come straight from the L2 in fragment order, and the ranges meet in shared memory. No
// workspace, no order between blocks, and the grid grows with the tokens instead of the time.
// The RMSNorm in front can be the prologue (launch.h): each value of x is read by one lane of a block, which multiplies
// it by the norm's weight on the way; the sums of squares meet where the ranges do.
//
// Floor: 2 rows N K over the mma.sync rate, or K bytes of tokens (2 K each) per block from the L2. Times: docs/cuda.md.
#include "kernels/cuda/gemm_batch.h"
#include "kernels/cuda/pdl.h"

namespace linspec::cuda {
namespace {

constexpr int kWarps = kThreads / kWarpSize;
static_assert(kWarps == kSplit);

// 8 values of x times the norm's weight. squares: the sum so far of the lane's slice.
__device__ __forceinline__ uint4 NormEight(const float4 (&x)[2], const float4 (&weights)[2], float& squares) {
  const uint2 a = NormFour(x[0], weights[0], squares), b = NormFour(x[1], weights[1], squares);
  return {a.x, a.y, b.x, b.y};
}
__device__ __forceinline__ uint4 ReadNormed(const NormBefore& norm, int64_t at, int64_t k, float& squares) {
  const auto* x = reinterpret_cast<const float4*>(norm.x + at + k);
  const auto* weights = reinterpret_cast<const float4*>(norm.weight + k);
  return NormEight({x[0], x[1]}, {__ldg(weights), __ldg(weights + 1)}, squares);
}

// A range's sum of squares of a token from those of its four slices, for all four lanes.
__device__ __forceinline__ float AddSlices(float squares) {
  squares += __shfl_xor_sync(0xFFFFFFFFu, squares, 1);
  return squares + __shfl_xor_sync(0xFFFFFFFFu, squares, 2);
}
// 1 / rms of a lane's two tokens. squares: the sums of each range, added halves onto halves, as lanes do.
using PairSquares = float2[kTileTokens / 2];
template <int kTiles>
__device__ __forceinline__ void ReadScales(const GemmParams& p, const PairSquares (&squares)[kSplit][kTiles], int tile,
                                           int pair, float (&scales)[2]) {
  float2 sums[kSplit];
#pragma unroll
  for (int range = 0; range < kSplit; ++range) sums[range] = squares[range][tile][pair];
#pragma unroll
  for (int step = 1; step < kSplit; step *= 2) {
#pragma unroll
    for (int i = 0; i < kSplit; i += 2 * step) sums[i].x += sums[i + step].x, sums[i].y += sums[i + step].y;
  }
  scales[0] = InverseRms(sums[0].x, p.w.cols, p.norm_before.eps);
  scales[1] = InverseRms(sums[0].y, p.w.cols, p.norm_before.eps);
}

// Grid: tiles of weight rows, groups of kTiles * 8 tokens. kNorm: with a norm as its prologue.
template <int kType, int kTiles, bool kNorm>
__global__ void __launch_bounds__(kThreads, kTiles <= 2 ? 2 : 1) SmallGemmKernel(const GemmParams p, const int rows) {
  constexpr int kParts = Range<kType>::kParts;
  static_assert(kTiles <= kWarps);
  __shared__ float4 partial[kSplit][kTiles][kWarpSize];
  __shared__ PairSquares all_squares[kNorm ? kSplit : 1][kTiles];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, g = lane / 4, s = lane % 4;
  const int first = static_cast<int>(blockIdx.y) * kTiles * kTileTokens;
  const Range<kType> range(p.w, warp);
  Batch<kType> batch;
  batch.Load(p.w, range, blockIdx.x, 0);
  GridLaunchDependents();
  GridWait();
  const OutputTile output{p, rows};
  const int64_t row = int64_t{blockIdx.x} * kTileRows + g;
  const int mine = first + warp * kTileTokens + 2 * s;  // of the tokens whose sums this warp adds
  float old[4], row_scales[2], token_scales[2];         // are under way while the tokens are multiplied
  if (warp < kTiles) {
    output.ReadOld(row, mine, old);
    output.ReadScales(row, row_scales);
    output.ReadTokenScales(mine, token_scales);
  }
  float squares[kTiles] = {};
  const auto x = [&](int step, int part, int t) {
    const int64_t token = min(first + t * kTileTokens + g, rows - 1);
    const int64_t k = int64_t{range.begin + step} * Range<kType>::kStepDepth + (s * kParts + part) * 8;
    if (step >= range.valid) return uint4{};
    if constexpr (kNorm) {
      return ReadNormed(p.norm_before, token * p.w.cols, k, squares[t]);
    } else {
      return *reinterpret_cast<const uint4*>(p.x + token * p.w.cols + k);
    }
  };
  float sums[kTiles][4] = {};
  for (int i = 0; i < range.batches(); ++i) {
    if (i > 0) batch.Load(p.w, range, blockIdx.x, i * kBatch);
    batch.template Multiply<kTiles>(i * kBatch, range.count, x, sums);
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    partial[warp][t][lane] = make_float4(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
    if constexpr (kNorm) {
      const float sum = AddSlices(squares[t]);
      if (s == 0) reinterpret_cast<float*>(all_squares[warp][t])[g] = sum;
    }
  }
  __syncthreads();
  if (warp >= kTiles) return;
  float total[4] = {};
#pragma unroll
  for (int from = 0; from < kSplit; ++from) {
    const float4 part = partial[from][warp][lane];
    total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
  }
  if constexpr (kNorm) ReadScales(p, all_squares, warp, s, token_scales);
#pragma unroll
  for (int i = 0; i < 4; ++i) total[i] *= token_scales[i % 2];
  output.Write(row, mine, total, old, row_scales);
}

constexpr int kNormThreads = 64;

// The prologue as a launch: a warp for each token, its lanes the ranges and slices.
template <int kType>
__global__ void __launch_bounds__(kNormThreads)
    NormKernel(const NormBefore norm, const LinspecCudaMatrix w, uint16_t* out, float* scales, const int rows) {
  GridLaunchDependents();
  constexpr int kParts = Range<kType>::kParts, kAhead = 4 / kParts;  // steps whose loads are under way at once
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = (int64_t{blockIdx.x} * kNormThreads + threadIdx.x) / kWarpSize;
  const Range<kType> range(w, lane / 4);
  const int64_t begin = int64_t{range.begin} * Range<kType>::kStepDepth + lane % 4 * 8 * kParts;
  GridWait();
  if (token >= rows) return;
  float squares = 0.0f;
  for (int first = 0; first < range.valid; first += kAhead) {
    float4 x[kAhead * kParts][2], weights[kAhead * kParts][2];
#pragma unroll
    for (int i = 0; i < kAhead * kParts; ++i) {
      const int64_t k = begin + min(first + i / kParts, range.valid - 1) * Range<kType>::kStepDepth + i % kParts * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        x[i][half] = reinterpret_cast<const float4*>(norm.x + token * w.cols + k)[half];
        weights[i][half] = __ldg(reinterpret_cast<const float4*>(norm.weight + k) + half);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead * kParts; ++i) {
      if (first + i / kParts >= range.valid) break;
      const int64_t k = begin + (first + i / kParts) * Range<kType>::kStepDepth + i % kParts * 8;
      *reinterpret_cast<uint4*>(out + token * w.cols + k) = NormEight(x[i], weights[i], squares);
    }
  }
  squares = AddSlices(squares);
  for (int lanes = 4; lanes < kWarpSize; lanes *= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, lanes);
  if (lane == 0) scales[token] = InverseRms(squares, w.cols, norm.eps);
}

template <int kType, bool kNorm>
void Launch(const GemmParams& p, int rows, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>((p.w.rows + kTileRows - 1) / kTileRows);
  const auto launch = [&](auto kernel, int token_tiles) {
    const int tokens = token_tiles * kTileTokens;
    const dim3 grid(tiles, static_cast<unsigned>((rows + tokens - 1) / tokens));
    LaunchOverlapped(kernel, grid, kThreads, 0, stream, 1, p, rows);
  };
  if (rows <= 8) return launch(&SmallGemmKernel<kType, 1, kNorm>, 1);
  if (kNorm || rows <= 16) return launch(&SmallGemmKernel<kType, 2, kNorm>, 2);  // more are not worth a prologue
  if constexpr (!kNorm) {
    if (rows <= 32) return launch(&SmallGemmKernel<kType, 4, false>, 4);
    launch(&SmallGemmKernel<kType, 8, false>, 8);
  }
}

template <int kType>
void LaunchOfType(const GemmParams& p, int rows, cudaStream_t stream) {
  (p.norm_before.x != nullptr ? &Launch<kType, true> : &Launch<kType, false>)(p, rows, stream);
}

}  // namespace

void LaunchSmallGemm(const GemmParams& params, int rows, cudaStream_t stream) {
  switch (params.w.type) {
    case kLinspecCudaI8:
      return LaunchOfType<kLinspecCudaI8>(params, rows, stream);
    case kLinspecCudaFp8:
      return LaunchOfType<kLinspecCudaFp8>(params, rows, stream);
    default:
      return LaunchOfType<kLinspecCudaBf16>(params, rows, stream);
  }
}

void LaunchNormForSmall(const NormBefore& norm, const LinspecCudaMatrix& w, uint16_t* out, float* scales, int rows,
                        cudaStream_t stream) {
  // The 8-bit types have the same ranges.
  const auto kernel = w.type == kLinspecCudaBf16 ? &NormKernel<kLinspecCudaBf16> : &NormKernel<kLinspecCudaFp8>;
  constexpr int kTokens = kNormThreads / kWarpSize;
  LaunchOverlapped(kernel, (rows + kTokens - 1) / kTokens, kNormThreads, 0, stream, 1, norm, w, out, scales, rows);
}

}  // namespace linspec::cuda
