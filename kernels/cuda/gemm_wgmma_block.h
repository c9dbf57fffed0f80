// The parts of a block of the warpgroup product (gemm_wgmma.cu): its share of the work, its ring in shared memory, and
// the warps that order what comes through that. The warps that multiply: gemm_wgmma_consumer.h. sm_90a only.
//
// A unit is rows of weights, 128 bytes of each, and the tokens' part for that k, in boxes of 64 of k. A group of four
// warps multiplies 64 of the rows. What a unit's rows are is the product's form.
#pragma once

#include <cuda.h>

#include "kernels/cuda/gemm_tile.h"
#include "kernels/cuda/mbarrier.h"
#include "kernels/cuda/pdl.h"
#include "kernels/cuda/wgmma.h"

namespace linspec::cuda {

inline constexpr int kUnitRows = 128, kUnitRowBytes = 128, kBoxDepth = 64;
inline constexpr int kGroupRows = 64, kGroups = kUnitRows / kGroupRows, kGroupThreads = 128;
inline constexpr int kGroupWarps = kGroupThreads / kWarpSize, kConsumers = kGroups * kGroupWarps;
inline constexpr int kMaxStages = 20;  // of any ring

// Equal shares of tiles of 128 rows (gemm_wgmma_consumer.h); pairs of blocks, where each group of warps has units of
// its own, of 64 rows, in turn (gemm_wgmma_pair.h); a tile of up to 192 rows a block (gemm_wgmma_tall.h).
enum class Form { kShares, kPair, kTall };

template <int kWeightType, int kTokenCount, Form kFormOf = Form::kShares>
struct Unit {
  static constexpr Form kForm = kFormOf;
  static constexpr int kType = kWeightType, kTokens = kTokenCount;
  static constexpr bool kWidens = kType != kLinspecCudaBf16;
  static constexpr int kRows = kForm == Form::kPair ? kGroupRows : kForm == Form::kTall ? 3 * kGroupRows : kUnitRows;
  static constexpr int kWeightBytes = kRows * kUnitRowBytes;
  static constexpr int kWarps = kRows / kGroupRows * kGroupWarps;                 // that multiply it
  static constexpr int kBlockWarps = kForm == Form::kPair ? kConsumers : kWarps;  // that multiply
  static constexpr int kDepth = kWidens ? kUnitRowBytes : kUnitRowBytes / 2;
  static constexpr int kBoxes = kDepth / kBoxDepth, kBoxBytes = kTokens * kBoxDepth * 2;
  static constexpr int kBytes = kWeightBytes + kBoxes * kBoxBytes;
  static constexpr int kSumsBytes = kGroupRows * kTokens * static_cast<int>(sizeof(float));  // of a group
  static_assert(kForm != Form::kShares ||
                kSumsBytes <= kBytes);  // a slot of the ring holds a unit, or a group's sums of a tile
  // Whether weights are asked for kWindow units at a time, by a warp of their own (gemm_wgmma.cu).
  static constexpr bool kPaced = kTokens <= 32 && !kWidens;
  static constexpr int kWindow = 6 * kUnitRows / kRows;
  static constexpr int kMostStages = kForm != Form::kShares ? kMaxStages : kWidens ? 6 : 10;
  static constexpr int kThreads = (kBlockWarps + (kPaced ? 2 : 1)) * kWarpSize;
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

// A block's units, in the order in which it multiplies them: where they begin, in units of k and in rows, and how many
// bytes of weights come with each.
struct ShareUnits {
  int depth, begin, count;
  __device__ ShareUnits(const Shares& shares, int share)
      : depth(shares.depth), begin(Begin(shares, share)), count(Begin(shares, share + 1) - begin) {}
  __device__ __forceinline__ int WeightBytes() const { return kUnitRows * kUnitRowBytes; }
  __device__ __forceinline__ int Depth(int i) const { return (begin + i) % depth; }
  __device__ __forceinline__ int Row(int i) const { return (begin + i) / depth * kUnitRows; }
};

// A barrier of the warps that multiply.
template <int kWarps = kConsumers>
__device__ __forceinline__ void ConsumerBarrier() {
  asm volatile("bar.sync 1, %0;" ::"n"(kWarps * kWarpSize) : "memory");
}

__device__ __forceinline__ void StoreBf16(uint16_t* to, float a, float b, float c, float d) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(a, b), high = __floats2bfloat162_rn(c, d);
  __stcg(reinterpret_cast<uint2*>(to),
         make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high)));
}

// Of those and the warp that makes scales of tokens, which does not wait there.
template <int kWarps = kConsumers>
__device__ __forceinline__ void ScalesWait() {
  asm volatile("bar.sync 2, %0;" ::"n"((kWarps + 1) * kWarpSize) : "memory");
}
template <int kWarps>
__device__ __forceinline__ void ScalesMade() {
  asm volatile("bar.arrive 2, %0;" ::"n"((kWarps + 1) * kWarpSize) : "memory");
}

// What a warp of its own does where a norm is in front: `scales`, while the others multiply. Each lane adds the parts
// of its tokens in order. (By the warps that multiply, before they do: 4.5 us at 64 tokens, an H200.)
template <int kTokens, int kWarps = kConsumers>
__device__ __forceinline__ void MakeScales(const GemmParams& p, int rows, float (&scales)[kTokens]) {
  if (p.norm_before.squares == nullptr) return;
  constexpr int kEach = (kTokens + kWarpSize - 1) / kWarpSize;  // tokens of a lane
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, parts = static_cast<int>(NormParts(p.w.cols));
  const float* of[kEach];
#pragma unroll
  for (int t = 0; t < kEach; ++t) of[t] = p.norm_before.squares + min(lane + t * kWarpSize, rows - 1) * parts;
  float sums[kEach] = {};
  GridWait();
  const int fours = parts % 4 == 0 ? parts : 0;  // where each token's are aligned
#pragma unroll 4
  for (int i = 0; i < fours; i += 4) {
#pragma unroll
    for (int t = 0; t < kEach; ++t) {
      const float4 part = __ldcg(reinterpret_cast<const float4*>(of[t] + i));
      sums[t] = sums[t] + part.x + part.y + part.z + part.w;
    }
  }
  for (int i = fours; i < parts; ++i) {
#pragma unroll
    for (int t = 0; t < kEach; ++t) sums[t] += __ldcg(of[t] + i);
  }
#pragma unroll
  for (int t = 0; t < kEach; ++t) {
    const int token = lane + t * kWarpSize;
    if (token < kTokens) scales[token] = InverseRms(sums[t], p.w.cols, p.norm_before.eps);
  }
  ScalesMade<kWarps>();
}

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

// What one warp does, or two in a paced product: ask for everything that is multiplied.
template <typename Unit, typename Units>
struct Producer {
  const CUtensorMap &weights, &tokens;
  const Units& units;
  const Ring& ring;

  __device__ __forceinline__ uint32_t At(int stage) const { return ring.buffers + stage * Unit::kBytes; }

  // The barrier's expectation is the caller's.
  __device__ __forceinline__ void CopyWeights(int stage, int unit, uint64_t policy) const {
    CopyTile(At(stage), &weights, units.Depth(unit) * Unit::kDepth, units.Row(unit), ring.full(stage), policy);
  }
  __device__ __forceinline__ void CopyTokens(int stage, int unit, uint32_t there, uint64_t policy) const {
#pragma unroll
    for (int box = 0; box < Unit::kBoxes; ++box) {
      CopyTile(At(stage) + Unit::kWeightBytes + box * Unit::kBoxBytes, &tokens,
               units.Depth(unit) * Unit::kDepth + box * kBoxDepth, 0, there, policy);
    }
  }
  // Of the L2: weights, read once, are the first to leave it, tokens the last.
  __device__ static __forceinline__ uint64_t Policy(bool once) {
    uint64_t first, last;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(last));
    return once ? first : last;
  }

  // By one thread. warp: of the block's last one or two. Returns where in the ring a next unit would go.
  __device__ __forceinline__ Turn Run(int warp) const {
    Turn turn{0, 1};  // of an empty barrier, the phase before the first is over
    if (warp > 0) {
      OrderTokens(turn);
    } else {
      Unit::kPaced ? OrderWeights(turn) : OrderUnits(turn);
    }
    return turn;
  }

  // Weights for the whole ring are asked for before the kernel ahead has ended, tokens after it.
  __device__ __forceinline__ void OrderUnits(Turn& turn) const {
    const uint64_t once = Policy(true), often = Policy(false);
    const int ahead = min(ring.stages, units.count);
    const auto order_weights = [&](int stage, int unit) {
      BarrierExpect(ring.full(stage), units.WeightBytes() + Unit::kBoxes * Unit::kBoxBytes);
      CopyWeights(stage, unit, once);
    };
    for (int i = 0; i < ahead; ++i) order_weights(i, i);
    PrefetchMap(&tokens);
    GridWait();  // after which the copy engine sees what the kernels ahead wrote
    for (int i = 0; i < ahead; ++i, turn.Next(ring.stages)) CopyTokens(i, i, ring.full(i), often);
    for (int unit = ahead; unit < units.count; ++unit, turn.Next(ring.stages)) {
      BarrierWait(ring.empty(turn.stage), turn.parity);
      order_weights(turn.stage, unit);
      CopyTokens(turn.stage, unit, ring.full(turn.stage), often);
    }
  }

  // From before the end of the kernel ahead.
  __device__ __forceinline__ void OrderWeights(Turn& turn) const {
    const uint64_t once = Policy(true);
    Turn landed;
    for (int unit = 0; unit < units.count; ++unit, turn.Next(ring.stages)) {
      if (unit >= Unit::kWindow) {
        BarrierWait(ring.full(landed.stage), landed.parity);
        landed.Next(ring.stages);
      }
      BarrierWait(ring.empty(turn.stage), turn.parity);
      BarrierExpect(ring.full(turn.stage), units.WeightBytes());
      CopyWeights(turn.stage, unit, once);
    }
  }

  __device__ __forceinline__ void OrderTokens(Turn& turn) const {
    const uint64_t often = Policy(false);
    PrefetchMap(&tokens);
    GridWait();  // after which the copy engine sees what the kernels ahead wrote
    for (int unit = 0; unit < units.count; ++unit, turn.Next(ring.stages)) {
      BarrierWait(ring.empty(turn.stage), turn.parity);
      BarrierExpect(ring.tokens(turn.stage), Unit::kBoxes * Unit::kBoxBytes);
      CopyTokens(turn.stage, unit, ring.tokens(turn.stage), often);
    }
  }
};

// By the first of those warps, after that: what the blocks behind left, up to the end of the tile that this block
// began. The lanes look for one block each. turn: of the warp's first lane.
template <typename Unit>
__device__ __forceinline__ void OrderSums(const Shares& shares, int share, const Workspace& workspace, const Ring& ring,
                                          Turn turn) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, last = Begin(shares, share + 1) - 1;
  const int tile_begin = last / shares.depth * shares.depth, behind = Behind(shares, share, tile_begin + shares.depth);
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
    CopyBytes(ring.buffers + turn.stage * Unit::kBytes, from + int64_t{i} * kBytes, kBytes, ring.full(turn.stage));
    BarrierExpect(ring.full(turn.stage), kBytes);  // after the copy: racecheck takes it to be ordered by the arrival
  }
}

// The block's barriers, by one thread; then a barrier of the block.
template <typename Unit>
__device__ __forceinline__ void MakeRing(const Ring& ring) {
  for (int i = 0; i < ring.stages; ++i) {
    BarrierInit(ring.full(i), 1);
    BarrierInit(ring.tokens(i), 1);
    BarrierInit(ring.empty(i), Unit::kWarps * kWarpSize);
  }
}

#endif

}  // namespace linspec::cuda
