// Products of any number of tokens on sm_90: weights are streamed by the copy engine's tensor form into a ring of
// shared memory and are the 64-row operand of warpgroup instructions; the tokens (8 to 128 at a time) are the other.
//
// The work is units: (tile of 128 weight rows, 64 of k), in that order; every block gets the same number of consecutive
// units, so that no multiprocessor idles whatever the shape. A tile that several blocks share is summed in order of k
// by the block that holds its beginning, as its last work; the others leave their sums in the workspace as their first,
// and these come through the ring like weights. The cuts depend on the shape and the chip alone and the columns of an
// instruction do not mix: a row has the same bits beside any other rows.
//
// Blocks take their work backwards, so that a block only waits for blocks that started before it. Their rings take more
// than half of the shared memory: of two, the next product's blocks would gather on the multiprocessors that are free
// first, two on one and none on another (a step of 64 requests took 7.4 instead of 6.6 ms).
//
// Measured on an H200 (2026-11-27, read bandwidth 4.49 TB/s in the same run), bf16, graphs of products:
//   rows             1      16      32      64     128
//   12288 x  4096   88 %    87 %    84 %    79 %    69 %   of the read bandwidth
//    4096 x  4096   62 %    59 %    56 %    49 %    39 %
//   22016 x  4096   92 %    91 %    88 %    82 %    71 %
//    4096 x 11008   78 %    77 %    74 %    68 %    60 %
//   32000 x  4096   93 %    92 %    92 %    85 %    76 %
//   all of 7B       86 %    85 %    82 %    76 %    63 %
// What 4096 rows lack is the latency of a tile's sums from four blocks. Rejected: a chain of products with their norms
// in one launch (the barriers between them cost more than launches: 3.89 ms for 3.43); clusters of two that share
// tokens (half the speed); fetching 256 bytes into the L2 for each 128 asked for (5 points); a multiple of the number of
// tiles for the number of blocks (0 to 1 % slower in a step).
#include <cuda.h>

#include <algorithm>

#include "kernels/cuda/gemm_tile.h"
#include "kernels/cuda/gemm_wgmma.h"
#include "kernels/cuda/mbarrier.h"
#include "kernels/cuda/pdl.h"
#include "kernels/cuda/wgmma.h"

namespace linspec::cuda {
namespace {

constexpr int kUnitRows = 128, kUnitDepth = 64;  // 16 KB of weights
constexpr int kWeightBytes = kUnitRows * kUnitDepth * 2;
constexpr int kGroupRows = 64, kGroups = kUnitRows / kGroupRows, kGroupThreads = 128;
constexpr int kConsumers = kGroups * kGroupThreads / kWarpSize;  // warps that multiply
constexpr int kBlockThreads = (kConsumers + 1) * kWarpSize;
constexpr int kMaxStages = 8, kMaxTokens = 128;
constexpr int kRingBytes = 148 << 10, kRingBytes128 = 224 << 10;  // for 128 tokens
constexpr int kMaxBlocks = 512;                                   // of which the workspace has room for sums

// A slot of the ring holds a unit, or a group's sums of a tile.
__host__ __device__ constexpr int UnitBytes(int tokens) { return kWeightBytes + tokens * kUnitDepth * 2; }
__host__ __device__ constexpr int SumsBytes(int tokens) {
  return kGroupRows * tokens * static_cast<int>(sizeof(float));
}
static_assert(SumsBytes(kMaxTokens) <= UnitBytes(kMaxTokens));

struct Workspace {
  unsigned* left;  // [block]: warps that left their sums, zero between launches
  float4* sums;    // [block][group][8 tokens][thread of the group]
};

// The units of each block.
struct Shares {
  int depth, total, blocks;  // depth: units of a tile
  __host__ __device__ Shares(const LinspecCudaMatrix& w, int blocks)
      : depth(static_cast<int>((w.cols + kUnitDepth - 1) / kUnitDepth)),
        total(static_cast<int>((w.rows + kUnitRows - 1) / kUnitRows) * depth),
        blocks(blocks) {}
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ int Begin(const Shares& shares, int share) {
  return static_cast<int>(int64_t{shares.total} * share / shares.blocks);
}
// Blocks after `share` that hold units before `end`.
__device__ __forceinline__ int Behind(const Shares& shares, int share, int end) {
  int behind = 0;
  while (Begin(shares, share + 1 + behind) < end) ++behind;
  return behind;
}

struct Ring {
  uint64_t full[kMaxStages], empty[kMaxStages];
};

// Position in the ring.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Next(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// What one warp does: asks for everything that comes through the ring.
template <int kTokens>
struct Producer {
  const CUtensorMap &weights, &tokens;
  const Shares& shares;
  const Workspace& workspace;
  Ring& ring;
  uint32_t buffers;
  int stages, share;

  __device__ __forceinline__ uint32_t At(int stage) const { return buffers + stage * UnitBytes(kTokens); }
  __device__ __forceinline__ void OrderWeights(int stage, int unit, uint64_t policy) const {
    BarrierExpect(&ring.full[stage], UnitBytes(kTokens));
    CopyTile(At(stage), &weights, unit % shares.depth * kUnitDepth, unit / shares.depth * kUnitRows, &ring.full[stage],
             policy);
  }
  __device__ __forceinline__ void OrderTokens(int stage, int unit, uint64_t policy) const {
    CopyTile(At(stage) + kWeightBytes, &tokens, unit % shares.depth * kUnitDepth, 0, &ring.full[stage], policy);
  }

  __device__ __forceinline__ void Run() const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    Turn turn{0, 1};  // of an empty barrier, the phase before the first is over
    if (lane == 0) OrderUnits(turn);
    __syncwarp();
    OrderSums(turn);
  }

  // Weights for the whole ring are asked for before the kernel ahead has ended, tokens after it. By one thread.
  __device__ __forceinline__ void OrderUnits(Turn& turn) const {
    uint64_t once, often;  // weights are the first to leave the L2
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(often));
    const int begin = Begin(shares, share), end = Begin(shares, share + 1), ahead = min(stages, end - begin);
    for (int i = 0; i < ahead; ++i) OrderWeights(i, begin + i, once);
    GridWait();
    asm volatile("fence.proxy.async;" ::: "memory");  // tokens were written by ordinary stores
    for (int i = 0; i < ahead; ++i, turn.Next(stages)) OrderTokens(i, begin + i, often);
    for (int unit = begin + ahead; unit < end; ++unit, turn.Next(stages)) {
      BarrierWait(&ring.empty[turn.stage], turn.parity);
      OrderWeights(turn.stage, unit, once);
      OrderTokens(turn.stage, unit, often);
    }
  }

  // What the blocks behind left, up to the end of the tile that this block began. The lanes look for one block each.
  __device__ __forceinline__ void OrderSums(Turn turn) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, last = Begin(shares, share + 1) - 1;
    const int tile_begin = last / shares.depth * shares.depth,
              behind = Behind(shares, share, tile_begin + shares.depth);
    if (Begin(shares, share) > tile_begin || behind == 0) return;
    for (int i = lane; i < behind; i += kWarpSize) {
      unsigned* left = workspace.left + share + 1 + i;
      unsigned warps = 0;
      while (warps < kConsumers) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(warps) : "l"(left) : "memory");
      }
      *left = 0;
    }
    __syncwarp();
    if (lane != 0) return;
    asm volatile("fence.proxy.async;" ::: "memory");
    constexpr int kBytes = SumsBytes(kTokens);
    const char* from = reinterpret_cast<const char*>(workspace.sums) + int64_t{share + 1} * kGroups * kBytes;
    for (int i = 0; i < behind * kGroups; ++i, turn.Next(stages)) {
      BarrierWait(&ring.empty[turn.stage], turn.parity);
      CopyBytes(At(turn.stage), from + int64_t{i} * kBytes, kBytes, &ring.full[turn.stage]);
      BarrierExpect(&ring.full[turn.stage], kBytes);  // after the copy: racecheck takes it to be ordered by the arrival
    }
  }
};

// What the multiplying warps do. sums[j]: 8 tokens, as OutputTile takes them.
template <int kTokens>
struct Consumer {
  static constexpr int kColumns = kTokens / 8;

  const GemmParams& p;
  int rows, share, stages;
  const Shares& shares;
  const Workspace& workspace;
  Ring& ring;
  uint32_t buffers;
  Turn turn = {};

  __device__ static int Warp() { return static_cast<int>(threadIdx.x) / kWarpSize; }
  __device__ static int Lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  __device__ static int Group() { return static_cast<int>(threadIdx.x) / kGroupThreads; }

  __device__ __forceinline__ uint32_t At(int stage) const { return buffers + stage * UnitBytes(kTokens); }
  __device__ __forceinline__ void Release(int stage) const {
    if (Lane() == 0) BarrierArrive(&ring.empty[stage], kWarpSize);
  }

  // sums of `count` units from zero.
  __device__ __forceinline__ void Multiply(int count, float (&sums)[kColumns][4]) {
    int previous = 0;
    for (int i = 0; i < count; ++i) {
      BarrierWait(&ring.full[turn.stage], turn.parity);
      const uint64_t a = WgmmaOperand(At(turn.stage) + Group() * kGroupRows * kUnitDepth * 2);
      const uint64_t b = WgmmaOperand(At(turn.stage) + kWeightBytes);
      WgmmaBegin();
#pragma unroll
      for (int step = 0; step < kUnitDepth / 16; ++step) {
        Wgmma<kTokens>(sums, a + step * kWgmmaNextK, b + step * kWgmmaNextK, i + step > 0);
      }
      WgmmaCommit();
      if (i > 0) {
        WgmmaWait<1>();
        Release(previous);
      }
      previous = turn.stage;
      turn.Next(stages);
    }
    WgmmaWait<0>();
#pragma unroll
    for (auto& column : sums) {
#pragma unroll
      for (float& x : column) asm volatile("" : "+f"(x)::"memory");
    }
    Release(previous);
  }

  // For the block that holds the beginning of the tile.
  __device__ __forceinline__ void Leave(const float (&sums)[kColumns][4]) const {
    float4* to =
        workspace.sums + (int64_t{share} * kGroups + Group()) * kColumns * kGroupThreads + threadIdx.x % kGroupThreads;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      __stcg(to + j * kGroupThreads, make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]));
    }
    __syncwarp();
    if (Lane() == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(workspace.left + share) : "memory");
  }

  // The sums of the blocks behind, up to the end of the tile, in order.
  __device__ __forceinline__ void Add(int tile_end, float (&sums)[kColumns][4]) {
    for (int i = 0, count = Behind(shares, share, tile_end) * kGroups; i < count; ++i, turn.Next(stages)) {
      BarrierWait(&ring.full[turn.stage], turn.parity);
      __syncwarp();  // racecheck takes one lane of a warp to have waited
      if (i % kGroups == Group()) {
        const uint32_t at = At(turn.stage) + threadIdx.x % kGroupThreads * sizeof(float4);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          float x, y, z, w;
          asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                       : "=f"(x), "=f"(y), "=f"(z), "=f"(w)
                       : "r"(at + j * kGroupThreads * static_cast<int>(sizeof(float4))));
          sums[j][0] += x, sums[j][1] += y, sums[j][2] += z, sums[j][3] += w;
        }
      }
      BarrierArrive(&ring.empty[turn.stage], 1);  // each lane for itself: racecheck again
    }
  }

  // Of y, where the product is added to it; asked for before the tile is multiplied.
  __device__ __forceinline__ void ReadOld(int tile, float (&old)[kColumns][4]) const {
    const OutputTile output{p, rows};
#pragma unroll
    for (int j = 0; j < kColumns; ++j) output.ReadOld(Row(tile), Token(j), old[j]);
  }
  __device__ __forceinline__ void Write(int tile, float (&sums)[kColumns][4], const float (&old)[kColumns][4]) const {
    const OutputTile output{p, rows};
#pragma unroll
    for (int j = 0; j < kColumns; ++j) output.Write(Row(tile), Token(j), sums[j], old[j]);
  }
  __device__ static int64_t Row(int tile) { return int64_t{tile} * kUnitRows + Warp() * kTileRows + Lane() / 4; }
  __device__ static int Token(int column) { return column * 8 + Lane() % 4 * 2; }

  __device__ void Run() {
    GridWait();
    for (int unit = Begin(shares, share), end = Begin(shares, share + 1); unit < end;) {
      const int tile = unit / shares.depth, tile_end = (tile + 1) * shares.depth, stop = min(end, tile_end);
      const bool begins = unit % shares.depth == 0;
      float sums[kColumns][4], old[kColumns][4] = {};
      if (begins && p.accumulate) ReadOld(tile, old);
      Multiply(stop - unit, sums);
      unit = stop;
      if (!begins) {
        Leave(sums);
        continue;
      }
      Add(tile_end, sums);
      Write(tile, sums, old);
    }
  }
};

#endif

template <int kTokens>
__global__ void __launch_bounds__(kBlockThreads)
    WgmmaGemmKernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap tokens,
                    const __grid_constant__ GemmParams p, const int rows, const int stages, const Workspace workspace) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ Ring ring;
  const uint32_t buffers = (SharedAddress(shared) + 1023) / 1024 * 1024;
  const Shares shares(p.w, static_cast<int>(gridDim.x));
  const int share = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      BarrierInit(&ring.full[i], 1);
      BarrierInit(&ring.empty[i], kConsumers * kWarpSize);
    }
    BarrierMade();
  }
  __syncthreads();
  GridLaunchDependents();
  if (threadIdx.x < kConsumers * kWarpSize) {
    Consumer<kTokens>{p, rows, share, stages, shares, workspace, ring, buffers}.Run();
  } else {
    Producer<kTokens>{weights, tokens, shares, workspace, ring, buffers, stages, share}.Run();
  }
#endif
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// Null without the driver's function, and where the chip's code was compiled from another chip's on the way.
Encode FindEncode() {
  cudaFuncAttributes compiled;
  if (cudaFuncGetAttributes(&compiled, &WgmmaGemmKernel<8>) != cudaSuccess || compiled.ptxVersion != 90) {
    cudaGetLastError();
    return nullptr;
  }
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

// [rows, cols] bf16 in boxes of box_rows by kUnitDepth; what lies outside reads as zero.
bool Describe(Encode encode, const void* data, int64_t rows, int64_t cols, int box_rows, CUtensorMap* map) {
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(cols) * 2};
  const cuuint32_t box[2] = {kUnitDepth, static_cast<cuuint32_t>(box_rows)}, stride[2] = {1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), size, pitch, box, stride,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

Encode UsableEncode() {
  static const Encode encode = FindEncode();
  return CurrentDevice().major == 9 ? encode : nullptr;
}

template <int kTokens>
bool Launch(Encode encode, const GemmParams& p, int rows, cudaStream_t stream) {
  const Device& device = CurrentDevice();
  CUtensorMap weights, tokens;
  if (!Describe(encode, p.w.data, p.w.rows, p.w.cols, kUnitRows, &weights) ||
      !Describe(encode, p.x, rows, p.w.cols, kTokens, &tokens)) {
    return false;
  }
  constexpr int kBytes = (kTokens > 64 ? kRingBytes128 : kRingBytes) - 1024;  // the ring begins at a multiple of 1,024
  constexpr int kFit = kBytes / UnitBytes(kTokens), stages = kFit < kMaxStages ? kFit : kMaxStages;
  const int shared = stages * UnitBytes(kTokens) + 1024;
  const auto kernel = &WgmmaGemmKernel<kTokens>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) != cudaSuccess) return false;
  const int blocks = std::min({Shares(p.w, 1).total, device.processors, kMaxBlocks});
  auto* left = static_cast<unsigned*>(p.workspace);
  const Workspace workspace{left,
                            reinterpret_cast<float4*>(static_cast<char*>(p.workspace) + kMaxBlocks * sizeof(unsigned))};
  LaunchOverlapped(kernel, blocks, kBlockThreads, shared, stream, 1, weights, tokens, p, rows, stages, workspace);
  return true;
}

bool LaunchPass(Encode encode, const GemmParams& p, int rows, cudaStream_t stream) {
  if (rows <= 8) return Launch<8>(encode, p, rows, stream);
  if (rows <= 16) return Launch<16>(encode, p, rows, stream);
  if (rows <= 32) return Launch<32>(encode, p, rows, stream);
  if (rows <= 64) return Launch<64>(encode, p, rows, stream);
  return Launch<128>(encode, p, rows, stream);
}

}  // namespace

bool WgmmaGemmRuns() { return UsableEncode() != nullptr; }

bool LaunchWgmmaGemm(const GemmParams& params, int rows, cudaStream_t stream) {
  const Encode encode = UsableEncode();
  if (encode == nullptr || params.w.type != kLinspecCudaBf16 || params.workspace == nullptr) return false;
  GemmParams p = params;
  for (int taken = 0; rows > 0; rows -= taken) {
    taken = std::min(rows, kMaxTokens);
    if (!LaunchPass(encode, p, taken, stream)) return false;
    p.x += taken * p.w.cols;
    if (p.y != nullptr) p.y += taken * p.w.rows;
    if (p.y_bf16 != nullptr) p.y_bf16 += taken * (p.silu_mul ? p.w.rows / 2 : p.w.rows);
  }
  return true;
}

}  // namespace linspec::cuda
