// Products of few rows: the weights are streamed from memory once, and 8 to 64 tokens ride along.
//
// A warp holds one tile of 16 weight rows and one of kSplit ranges of k. It loads a batch of 8 steps (512 consecutive
// bytes of each row: shorter pieces cost DRAM efficiency) straight into registers in the tensor core's fragment order;
// 16 warps on a multiprocessor keep 128 KB in flight. The first batch leaves before the kernel ahead has ended (pdl.h).
//
// Two forms with the same bits:
// - whole (up to 8 tokens, many tiles): the 8 warps of a block are the ranges of one tile; x comes through the L1.
// - split (more tokens, or few tiles): the block is one range; its slice of x stays in shared memory in fragment order,
//   so x is read from the L2 once per block and not once per tile. Sums of a range go to the workspace, and the last
//   of a tile's kSplit warps adds them in order.
//
// A 7B step in bf16 on an H200: 64 % of the read bandwidth at 16 rows, 34 % at 64; what holds them up is the exchange
// of sums. Rejected: reloading each register as it is used (the loads share scoreboards).
//
// Floor: N K bytes-per-weight over the read bandwidth, as long as 2 rows N K over the mma.sync rate is less.
#include <algorithm>

#include "kernels/cuda/gemm_batch.h"
#include "kernels/cuda/gemm_ring.h"
#include "kernels/cuda/gemm_wgmma.h"
#include "kernels/cuda/pdl.h"

namespace linspec::cuda {
namespace {

constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerProcessor = 2;  // by registers
constexpr int kMaxTiles = 16384;        // of one matrix: 262,144 rows
constexpr int64_t kPartialBytes = int64_t{96} << 20;
static_assert(kWarps == kSplit);

template <int kType>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) WholeGemmKernel(const GemmParams p, const int rows) {
  constexpr int kParts = Range<kType>::kParts;
  __shared__ float4 partial[2][kSplit][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, g = lane / 4, s = lane % 4;
  const Range<kType> range(p.w, warp);
  const int64_t tiles = (p.w.rows + kTileRows - 1) / kTileRows;
  Batch<kType> batch;
  batch.Load(p.w, range, blockIdx.x, 0);
  GridLaunchDependents();
  GridWait();
  const uint16_t* x_lane =
      p.x + int64_t{min(g, rows - 1)} * p.w.cols + int64_t{range.begin} * Range<kType>::kStepDepth + s * 8 * kParts;
  const auto x = [&](int step, int part, int) {
    const uint16_t* from = x_lane + step * Range<kType>::kStepDepth + part * 8;
    return step < range.valid ? *reinterpret_cast<const uint4*>(from) : uint4{};
  };
  const OutputTile output{p, rows};
  int turn = 0;
  for (int64_t tile = blockIdx.x, next; tile < tiles; tile = next, ++turn) {
    float sums[1][4] = {};
    next = tile + gridDim.x;
    for (int i = 0; i < range.batches(); ++i) {
      batch.template Multiply<1>(i * kBatch, range.count, x, sums);
      if (i + 1 < range.batches()) {
        batch.Load(p.w, range, tile, (i + 1) * kBatch);
      } else if (next < tiles) {
        batch.Load(p.w, range, next, 0);
      }
    }
    // Two buffers: a warp that is a tile ahead writes the other one, and none can be two ahead of the barrier.
    float4(&parts)[kSplit][kWarpSize] = partial[turn % 2];
    parts[warp][lane] = make_float4(sums[0][0], sums[0][1], sums[0][2], sums[0][3]);
    __syncthreads();
    if (warp != turn % kWarps) continue;
    const int64_t row = tile * kTileRows + g;
    float old[4], total[4] = {};
    output.ReadOld(row, 2 * s, old);
    for (const auto& part : parts) {
      total[0] += part[lane].x, total[1] += part[lane].y, total[2] += part[lane].z, total[3] += part[lane].w;
    }
    output.Write(row, 2 * s, total, old);
  }
}

struct Workspace {
  unsigned* arrived;  // [kMaxTiles], zero between launches
  float2* partial;    // [tile][range][token tile][half of the rows][lane]
};

// The range's slice of x as [step][token tile][part][lane].
template <int kType, int kTiles>
__device__ void StoreTokens(const GemmParams& p, const Range<kType>& range, int rows, uint4* tokens) {
  constexpr int kParts = Range<kType>::kParts;
  for (int i = threadIdx.x; i < range.count * kTiles * kParts * kWarpSize; i += kThreads) {
    const int lane = i % kWarpSize, part = i / kWarpSize % kParts, t = i / (kWarpSize * kParts) % kTiles;
    const int step = i / (kWarpSize * kParts * kTiles), m = t * kTileTokens + lane / 4;
    const int64_t k = int64_t{range.begin + step} * Range<kType>::kStepDepth + (lane % 4 * kParts + part) * 8;
    const bool inside = m < rows && k < p.w.cols;
    tokens[i] = inside ? *reinterpret_cast<const uint4*>(p.x + m * p.w.cols + k) : uint4{};
  }
}

template <int kTiles>
__device__ void AddRanges(const OutputTile& output, const Workspace& workspace, int64_t tile) {
  const int lane = threadIdx.x % kWarpSize;
  const float2* all = workspace.partial + tile * kSplit * kTiles * 2 * kWarpSize + lane;
#pragma unroll 1
  for (int t = 0; t < kTiles && t * kTileTokens + lane % 4 * 2 < output.rows; ++t) {
    const int64_t row = tile * kTileRows + lane / 4;
    const int token = t * kTileTokens + lane % 4 * 2;
    float old[4], total[4] = {};
    output.ReadOld(row, token, old);
    float2 low[kSplit], high[kSplit];
#pragma unroll
    for (int from = 0; from < kSplit; ++from) {
      low[from] = __ldcg(all + (from * kTiles + t) * 2 * kWarpSize);
      high[from] = __ldcg(all + ((from * kTiles + t) * 2 + 1) * kWarpSize);
    }
#pragma unroll
    for (int from = 0; from < kSplit; ++from) {
      total[0] += low[from].x, total[1] += low[from].y, total[2] += high[from].x, total[3] += high[from].y;
    }
    output.Write(row, token, total, old);
  }
}

template <int kType, int kTiles>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    SplitGemmKernel(const GemmParams p, const int rows, const Workspace workspace) {
  constexpr int kParts = Range<kType>::kParts;
  extern __shared__ uint4 tokens[];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, range_index = blockIdx.x % kSplit;
  const int columns = static_cast<int>(gridDim.x) / kSplit;
  const Range<kType> range(p.w, range_index);
  const int64_t tiles = (p.w.rows + kTileRows - 1) / kTileRows, stride = columns * kWarps;
  const int64_t first = blockIdx.x / kSplit + warp * columns;
  Batch<kType> batch;
  if (first < tiles) batch.Load(p.w, range, first, 0);
  GridLaunchDependents();
  GridWait();
  StoreTokens<kType, kTiles>(p, range, rows, tokens);
  __syncthreads();
  const auto x = [&](int step, int part, int t) {
    return tokens[((step * kTiles + t) * kParts + part) * kWarpSize + lane];
  };
  const OutputTile output{p, rows};
  for (int64_t tile = first, next; tile < tiles; tile = next) {
    float sums[kTiles][4] = {};
    next = tile + stride;
    for (int i = 0; i < range.batches(); ++i) {
      batch.template Multiply<kTiles>(i * kBatch, range.count, x, sums);
      if (i + 1 < range.batches()) {
        batch.Load(p.w, range, tile, (i + 1) * kBatch);
      } else if (next < tiles) {
        batch.Load(p.w, range, next, 0);
      }
    }
    float2* mine = workspace.partial + (tile * kSplit + range_index) * kTiles * 2 * kWarpSize + lane;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t * kTileTokens + lane % 4 * 2 >= rows) break;
      __stcg(mine + t * 2 * kWarpSize, make_float2(sums[t][0], sums[t][1]));
      __stcg(mine + (t * 2 + 1) * kWarpSize, make_float2(sums[t][2], sums[t][3]));
    }
    __threadfence();
    __syncwarp();
    unsigned arrived = lane == 0 ? atomicAdd(workspace.arrived + tile, 1u) : 0;
    arrived = __shfl_sync(0xFFFFFFFFu, arrived, 0);
    if (arrived != kSplit - 1) continue;
    __threadfence();
    if (lane == 0) workspace.arrived[tile] = 0;
    AddRanges<kTiles>(output, workspace, tile);
  }
}

int NumTiles(const LinspecCudaMatrix& w) { return static_cast<int>((w.rows + kTileRows - 1) / kTileRows); }

template <int kType>
int64_t SharedBytes(const LinspecCudaMatrix& w, int token_tiles) {
  constexpr int kStepTokensBytes = WeightTraits<kType>::kParts * kWarpSize * static_cast<int>(sizeof(uint4));
  return int64_t{(NumSteps(w) + kSplit - 1) / kSplit} * token_tiles * kStepTokensBytes;
}

template <int kType, int kTiles>
void LaunchSplit(const GemmParams& p, int rows, const Device& device, cudaStream_t stream) {
  const auto shared = static_cast<int>(SharedBytes<kType>(p.w, kTiles));
  const auto kernel = &SplitGemmKernel<kType, kTiles>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) != cudaSuccess) return;
  const int blocks =
      device.processors * std::clamp(device.shared_per_processor / (shared + 1024), 1, kBlocksPerProcessor);
  const int columns = std::clamp(NumTiles(p.w) / kWarps, 1, std::max(blocks / kSplit, 1));
  const Workspace workspace{static_cast<unsigned*>(p.workspace),
                            reinterpret_cast<float2*>(static_cast<char*>(p.workspace) + kMaxTiles * sizeof(unsigned))};
  LaunchOverlapped(kernel, kSplit * columns, kThreads, shared, stream, 1, p, rows, workspace);
}

// As many of `rows` tokens as one pass takes; the number taken.
template <int kType>
int LaunchPass(const GemmParams& p, int rows, const Device& device, cudaStream_t stream) {
  if (rows <= kTileTokens) {
    if (LaunchRingGemm(p, rows, stream)) return rows;
    if (NumTiles(p.w) > device.processors * kBlocksPerProcessor || p.workspace == nullptr) {
      const int blocks = std::min(NumTiles(p.w), device.processors * kBlocksPerProcessor);
      LaunchOverlapped(&WholeGemmKernel<kType>, blocks, kThreads, 0, stream, 1, p, rows);
    } else {
      LaunchSplit<kType, 1>(p, rows, device, stream);
    }
    return rows;
  }
  int tiles = rows <= 16 ? 2 : rows <= 32 ? 4 : 8;
  while (tiles > 2 && SharedBytes<kType>(p.w, tiles) > device.shared_per_block) tiles /= 2;
  const int count = std::min(rows, tiles * kTileTokens);
  switch (tiles) {
    case 8:
      LaunchSplit<kType, 8>(p, count, device, stream);
      break;
    case 4:
      LaunchSplit<kType, 4>(p, count, device, stream);
      break;
    default:
      LaunchSplit<kType, 2>(p, count, device, stream);
  }
  return count;
}

}  // namespace

int64_t StreamingGemmWorkspaceBytes() {
  return kMaxTiles * sizeof(unsigned) + kPartialBytes + WgmmaGemmWorkspaceBytes();
}

void LaunchStreamingGemm(const GemmParams& params, int rows, cudaStream_t stream) {
  const Device& device = CurrentDevice();
  GemmParams p = params;
  for (int taken = 0; rows > 0; rows -= taken) {
    switch (p.w.type) {
      case kLinspecCudaI8:
        taken = LaunchPass<kLinspecCudaI8>(p, rows, device, stream);
        break;
      case kLinspecCudaFp8:
        taken = LaunchPass<kLinspecCudaFp8>(p, rows, device, stream);
        break;
      default:
        taken = LaunchPass<kLinspecCudaBf16>(p, rows, device, stream);
    }
    p.x += taken * p.w.cols;
    if (p.y != nullptr) p.y += taken * p.w.rows;
    if (p.y_bf16 != nullptr) p.y_bf16 += taken * (p.silu_mul ? p.w.rows / 2 : p.w.rows);
  }
}

}  // namespace linspec::cuda
