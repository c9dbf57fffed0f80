// The parts of a block of the warpgroup product (gemm_wgmma.cu): its share of the work, its ring in shared memory, and
// the warps that order what comes through that. The warps that multiply: gemm_wgmma_consumer.h. sm_90a only.
//
// A unit is 128 rows of weights, 128 bytes of each, and the tokens' part for that k, in boxes of 64 of k. A group of
// four warps multiplies 64 of the rows.
#pragma once

#include <cuda.h>

#include "kernels/cuda/gemm_tile.h"
#include "kernels/cuda/mbarrier.h"
#include "kernels/cuda/pdl.h"
#include "kernels/cuda/wgmma.h"

namespace linspec::cuda {

inline constexpr int kUnitRows = 128, kUnitRowBytes = 128, kBoxDepth = 64;
inline constexpr int kWeightBytes = kUnitRows * kUnitRowBytes;
inline constexpr int kGroupRows = 64, kGroups = kUnitRows / kGroupRows, kGroupThreads = 128;
inline constexpr int kConsumers = kGroups * kGroupThreads / kWarpSize;  // warps that multiply
inline constexpr int kMaxStages = 10, kMaxStages8Bit = 6;

template <int kType, int kTokens>
struct Unit {
  static constexpr int kDepth = kType == kLinspecCudaBf16 ? kUnitRowBytes / 2 : kUnitRowBytes;
  static constexpr int kBoxes = kDepth / kBoxDepth, kBoxBytes = kTokens * kBoxDepth * 2;
  static constexpr int kBytes = kWeightBytes + kBoxes * kBoxBytes;
  static constexpr int kSumsBytes = kGroupRows * kTokens * static_cast<int>(sizeof(float));  // of a group
  static_assert(kSumsBytes <= kBytes);  // a slot of the ring holds a unit, or a group's sums of a tile
  // Whether weights are asked for kWindow units at a time, by a warp of their own (gemm_wgmma.cu).
  static constexpr bool kPaced = kTokens <= 32 && kType == kLinspecCudaBf16;
  static constexpr int kWindow = 6;
  static constexpr int kThreads = (kConsumers + (kPaced ? 2 : 1)) * kWarpSize;
};

// Sums of a tile on their way to the block that began it.
struct Workspace {
  unsigned* left;  // [block]: warps that left sums, zero between launches
  float4* sums;    // [block][group][8 tokens][thread of the group]
};

// The units of each block: consecutive, tile by tile, equally many.
struct Shares {
  int depth, total, blocks;  // depth: units of a tile
  __host__ __device__ Shares(const LinspecCudaMatrix& w, int unit_depth, int blocks)
      : depth(static_cast<int>((w.cols + unit_depth - 1) / unit_depth)),
        total(static_cast<int>((w.rows + kUnitRows - 1) / kUnitRows) * depth),
        blocks(blocks) {}
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ int Begin(const Shares& shares, int share) {
  return static_cast<int>(static_cast<unsigned>(shares.total) * static_cast<unsigned>(share) /
                          static_cast<unsigned>(shares.blocks));
}
// Blocks after `share` that hold units before `end`.
__device__ __forceinline__ int Behind(const Shares& shares, int share, int end) {
  int behind = 0;
  while (Begin(shares, share + 1 + behind) < end) ++behind;
  return behind;
}

// A barrier of the warps that multiply.
__device__ __forceinline__ void ConsumerBarrier() {
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers * kWarpSize) : "memory");
}

// Of those and the warp that makes scales of tokens, which does not wait there.
inline constexpr int kScalesThreads = (kConsumers + 1) * kWarpSize;
__device__ __forceinline__ void ScalesWait() { asm volatile("bar.sync 2, %0;" ::"n"(kScalesThreads) : "memory"); }
__device__ __forceinline__ void ScalesMade() { asm volatile("bar.arrive 2, %0;" ::"n"(kScalesThreads) : "memory"); }

// The ring, as every thread knows it: addresses in shared memory of the slots, and of their barriers: a unit, or sums,
// are there; its tokens are, in a paced product; all is used up.
struct Ring {
  uint32_t buffers, barriers;
  int stages;  // slots
  static constexpr int kBarrierBytes = 3 * kMaxStages * static_cast<int>(sizeof(uint64_t));

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + stage * 8; }
  __device__ __forceinline__ uint32_t tokens(int stage) const { return full(stage) + kMaxStages * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + 2 * kMaxStages * 8; }
};

// Position in the ring.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Next(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// What one warp does, or two in a paced product: ask for everything that comes through the ring.
template <typename Unit>
struct Producer {
  const CUtensorMap &weights, &tokens;
  const Shares& shares;
  const Workspace& workspace;
  const Ring& ring;
  int share;

  __device__ __forceinline__ uint32_t At(int stage) const { return ring.buffers + stage * Unit::kBytes; }

  // The barrier's expectation is the caller's.
  __device__ __forceinline__ void CopyWeights(int stage, int unit, uint64_t policy) const {
    CopyTile(At(stage), &weights, unit % shares.depth * Unit::kDepth, unit / shares.depth * kUnitRows, ring.full(stage),
             policy);
  }
  __device__ __forceinline__ void CopyTokens(int stage, int unit, uint32_t there, uint64_t policy) const {
#pragma unroll
    for (int box = 0; box < Unit::kBoxes; ++box) {
      CopyTile(At(stage) + kWeightBytes + box * Unit::kBoxBytes, &tokens,
               unit % shares.depth * Unit::kDepth + box * kBoxDepth, 0, there, policy);
    }
  }
  // Of the L2: weights, read once, are the first to leave it, tokens the last.
  __device__ static __forceinline__ uint64_t Policy(bool once) {
    uint64_t first, last;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(last));
    return once ? first : last;
  }

  // warp: of the block's last one or two.
  __device__ __forceinline__ void Run(int warp) const {
    const bool leads = threadIdx.x % kWarpSize == 0;
    if (warp > 0) {
      if (leads) OrderTokens();
      return;
    }
    Turn turn{0, 1};  // of an empty barrier, the phase before the first is over
    if (leads) Unit::kPaced ? OrderWeights(turn) : OrderUnits(turn);
    __syncwarp();
    GridWait();
    OrderSums(turn);
  }

  // By one thread. Weights for the whole ring are asked for before the kernel ahead has ended, tokens after it.
  __device__ __forceinline__ void OrderUnits(Turn& turn) const {
    const uint64_t once = Policy(true), often = Policy(false);
    const int begin = Begin(shares, share), end = Begin(shares, share + 1), ahead = min(ring.stages, end - begin);
    const auto order_weights = [&](int stage, int unit) {
      BarrierExpect(ring.full(stage), Unit::kBytes);
      CopyWeights(stage, unit, once);
    };
    for (int i = 0; i < ahead; ++i) order_weights(i, begin + i);
    PrefetchMap(&tokens);
    GridWait();  // after which the copy engine sees what the kernels ahead wrote
    for (int i = 0; i < ahead; ++i, turn.Next(ring.stages)) CopyTokens(i, begin + i, ring.full(i), often);
    for (int unit = begin + ahead; unit < end; ++unit, turn.Next(ring.stages)) {
      BarrierWait(ring.empty(turn.stage), turn.parity);
      order_weights(turn.stage, unit);
      CopyTokens(turn.stage, unit, ring.full(turn.stage), often);
    }
  }

  // By one thread, from before the end of the kernel ahead.
  __device__ __forceinline__ void OrderWeights(Turn& turn) const {
    const uint64_t once = Policy(true);
    const int begin = Begin(shares, share), end = Begin(shares, share + 1);
    Turn landed;
    for (int unit = begin; unit < end; ++unit, turn.Next(ring.stages)) {
      if (unit - begin >= Unit::kWindow) {
        BarrierWait(ring.full(landed.stage), landed.parity);
        landed.Next(ring.stages);
      }
      BarrierWait(ring.empty(turn.stage), turn.parity);
      BarrierExpect(ring.full(turn.stage), kWeightBytes);
      CopyWeights(turn.stage, unit, once);
    }
  }

  // By one thread.
  __device__ __forceinline__ void OrderTokens() const {
    const uint64_t often = Policy(false);
    PrefetchMap(&tokens);
    GridWait();  // after which the copy engine sees what the kernels ahead wrote
    Turn turn{0, 1};
    for (int unit = Begin(shares, share), end = Begin(shares, share + 1); unit < end; ++unit, turn.Next(ring.stages)) {
      BarrierWait(ring.empty(turn.stage), turn.parity);
      BarrierExpect(ring.tokens(turn.stage), Unit::kBoxes * Unit::kBoxBytes);
      CopyTokens(turn.stage, unit, ring.tokens(turn.stage), often);
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
    constexpr int kBytes = Unit::kSumsBytes;
    const char* from = reinterpret_cast<const char*>(workspace.sums) + int64_t{share + 1} * kGroups * kBytes;
    for (int i = 0; i < behind * kGroups; ++i, turn.Next(ring.stages)) {
      BarrierWait(ring.empty(turn.stage), turn.parity);
      CopyBytes(At(turn.stage), from + int64_t{i} * kBytes, kBytes, ring.full(turn.stage));
      BarrierExpect(ring.full(turn.stage), kBytes);  // after the copy: racecheck takes it to be ordered by the arrival
    }
  }
};

#endif

}  // namespace linspec::cuda
