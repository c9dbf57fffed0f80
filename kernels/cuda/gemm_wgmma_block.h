// What a block of the warpgroup product (gemm_wgmma.cu) does: one warp orders weights and tokens, the others multiply.
// sm_90a only.
//
// A unit is 128 rows of weights, 128 bytes of each, and the tokens' part for that k, in boxes of 64 of k. A group of four
// warps multiplies 64 of the rows. bf16 weights are read by the instructions where they lie; int8 and fp8 are widened to
// bf16 in registers: a lane brings two bytes at a time in the order of k, so it reads the words that hold them, half of
// whose bytes are its neighbour's.
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
inline constexpr int kBlockThreads = (kConsumers + 1) * kWarpSize;
inline constexpr int kMaxStages = 8;

template <int kType, int kTokens>
struct Unit {
  static constexpr int kDepth = kType == kLinspecCudaBf16 ? kUnitRowBytes / 2 : kUnitRowBytes;
  static constexpr int kBoxes = kDepth / kBoxDepth, kBoxBytes = kTokens * kBoxDepth * 2;
  static constexpr int kBytes = kWeightBytes + kBoxes * kBoxBytes;
  static constexpr int kSumsBytes = kGroupRows * kTokens * static_cast<int>(sizeof(float));  // of a group
  static_assert(kSumsBytes <= kBytes);  // a slot of the ring holds a unit, or a group's sums of a tile
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

// A barrier of the warps that multiply.
__device__ __forceinline__ void ConsumerBarrier() {
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers * kWarpSize) : "memory");
}
static_assert(kUnitRows == kNormPart);

// Of the norms on both sides of the product (launch.h).
template <int kTokens>
struct Norms {
  float scales[kTokens];               // 1 / rms of each token's x
  float squares[kConsumers][kTokens];  // of a warp's 16 rows of a tile of y
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
template <typename Unit>
struct Producer {
  const CUtensorMap &weights, &tokens;
  const Shares& shares;
  const Workspace& workspace;
  Ring& ring;
  uint32_t buffers;
  int stages, share;

  __device__ __forceinline__ uint32_t At(int stage) const { return buffers + stage * Unit::kBytes; }
  __device__ __forceinline__ void OrderWeights(int stage, int unit, uint64_t policy) const {
    BarrierExpect(&ring.full[stage], Unit::kBytes);
    CopyTile(At(stage), &weights, unit % shares.depth * Unit::kDepth, unit / shares.depth * kUnitRows,
             &ring.full[stage], policy);
  }
  __device__ __forceinline__ void OrderTokens(int stage, int unit, uint64_t policy) const {
#pragma unroll
    for (int box = 0; box < Unit::kBoxes; ++box) {
      CopyTile(At(stage) + kWeightBytes + box * Unit::kBoxBytes, &tokens,
               unit % shares.depth * Unit::kDepth + box * kBoxDepth, 0, &ring.full[stage], policy);
    }
  }

  __device__ __forceinline__ void Run() const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    Turn turn{0, 1};  // of an empty barrier, the phase before the first is over
    if (lane == 0) OrderUnits(turn);
    __syncwarp();
    OrderSums(turn);
  }

  // By one thread. Weights for the whole ring are asked for before the kernel ahead has ended, tokens after it.
  __device__ __forceinline__ void OrderUnits(Turn& turn) const {
    uint64_t once, often;  // weights are the first to leave the L2
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(often));
    const int begin = Begin(shares, share), end = Begin(shares, share + 1), ahead = min(stages, end - begin);
    for (int i = 0; i < ahead; ++i) OrderWeights(i, begin + i, once);
    PrefetchMap(&tokens);
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
    constexpr int kBytes = Unit::kSumsBytes;
    const char* from = reinterpret_cast<const char*>(workspace.sums) + int64_t{share + 1} * kGroups * kBytes;
    for (int i = 0; i < behind * kGroups; ++i, turn.Next(stages)) {
      BarrierWait(&ring.empty[turn.stage], turn.parity);
      CopyBytes(At(turn.stage), from + int64_t{i} * kBytes, kBytes, &ring.full[turn.stage]);
      BarrierExpect(&ring.full[turn.stage], kBytes);  // after the copy: racecheck takes it to be ordered by the arrival
    }
  }
};

// What the multiplying warps do. sums[j]: 8 tokens, as OutputTile takes them. kNorms: with a norm on either side, which
// takes registers.
template <int kType, int kTokens, bool kNorms>
struct Consumer {
  using Unit = cuda::Unit<kType, kTokens>;
  static constexpr int kColumns = kTokens / 8;
  static constexpr bool kWidens = kType != kLinspecCudaBf16;

  const GemmParams& p;
  int rows, share, stages;
  const Shares& shares;
  const Workspace& workspace;
  Ring& ring;
  Norms<kTokens>& norms;
  uint32_t buffers;
  Turn turn = {};

  __device__ static int Warp() { return static_cast<int>(threadIdx.x) / kWarpSize; }
  __device__ static int Lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  __device__ static int Group() { return static_cast<int>(threadIdx.x) / kGroupThreads; }

  __device__ __forceinline__ uint32_t At(int stage) const { return buffers + stage * Unit::kBytes; }
  __device__ __forceinline__ void Release(int stage) const {
    if (Lane() == 0) BarrierArrive(&ring.empty[stage], kWarpSize);
  }

  __device__ static __forceinline__ uint32_t ReadWord(uint32_t at) {
    uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at));
    return word;
  }
  // Two bytes of a word, the lane's by k, as bf16.
  __device__ static __forceinline__ uint32_t Widen(uint32_t word) {
    return WeightTraits<kType>::WidenPair(__byte_perm(word, 0, Lane() % 2 == 0 ? 0x4140 : 0x4342));
  }

  // sums += 64 of k, or from zero; in flight at the end. The 16-byte pieces of a row lie swizzled by the row.
  __device__ __forceinline__ void MultiplyBox(uint32_t unit, int box, int add, float (&sums)[kColumns][4]) const {
    constexpr int kSteps = kBoxDepth / 16;
    const uint64_t b = WgmmaOperand(unit + kWeightBytes + box * Unit::kBoxBytes);
    if constexpr (kWidens) {
      const int g = Lane() / 4;
      const uint32_t lane = unit + (Warp() * 16 + g) * kUnitRowBytes + g * 16 + Lane() % 4 / 2 * 4;
      uint32_t a[kSteps][4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t at = lane ^ (box * kSteps + step) * 16;
        a[step][0] = ReadWord(at), a[step][1] = ReadWord(at + 8 * kUnitRowBytes);
        a[step][2] = ReadWord(at + 8), a[step][3] = ReadWord(at + 8 * kUnitRowBytes + 8);
      }
#pragma unroll
      for (auto& words : a) {
#pragma unroll
        for (uint32_t& word : words) word = Widen(word);
      }
      WgmmaBegin();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) Wgmma<kTokens>(sums, a[step], b + step * kWgmmaNextK, add + step);
    } else {
      const uint64_t a = WgmmaOperand(unit + Group() * kGroupRows * kUnitRowBytes);
      WgmmaBegin();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        Wgmma<kTokens>(sums, a + step * kWgmmaNextK, b + step * kWgmmaNextK, add + step);
      }
    }
    WgmmaCommit();
  }

  // sums of `count` units from zero.
  __device__ __forceinline__ void Multiply(int count, float (&sums)[kColumns][4]) {
    int previous = 0;
    for (int i = 0; i < count; ++i) {
      BarrierWait(&ring.full[turn.stage], turn.parity);
#pragma unroll
      for (int box = 0; box < Unit::kBoxes; ++box) {
        MultiplyBox(At(turn.stage), box, i + box, sums);
        WgmmaWait<1>();
        if (box == 0 && i > 0) Release(previous);
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

  // Of y, where the product is added to it; asked for while other blocks' sums are waited for.
  __device__ __forceinline__ void ReadOld(int tile, float (&old)[kColumns][4]) const {
    const OutputTile output{p, rows};
#pragma unroll
    for (int j = 0; j < kColumns; ++j) output.ReadOld(Row(tile), Token(j), old[j]);
  }
  __device__ __forceinline__ void Write(int tile, float (&sums)[kColumns][4], const float (&old)[kColumns][4]) const {
    const OutputTile output{p, rows};
    const bool after = kNorms && p.norm_after.weight != nullptr;
    int first = Token(0);
    asm volatile(
        ""
        : "+r"(first));  // addresses are not computed ahead of the multiplication, for which registers would lack
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int token = first + j * 8;
      if (kNorms && p.norm_before.squares != nullptr) {
        const float even = norms.scales[token], odd = norms.scales[token + 1];
        sums[j][0] *= even, sums[j][1] *= odd, sums[j][2] *= even, sums[j][3] *= odd;
      }
      output.Write(Row(tile), token, sums[j], old[j]);
      if (after) WriteNormed(tile, token, sums[j], old[j]);
      if (kNorms) asm volatile("" ::: "memory");  // nor is anything of later columns read early
    }
    if (after) WriteSquares(tile);
  }

  // sums + old is the residual stream.
  __device__ __forceinline__ void WriteNormed(int tile, int column, const float (&sums)[4],
                                              const float (&old)[4]) const {
    float squares[2] = {};  // of two tokens, the lane's rows
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float y = old[i] + sums[i];
      squares[i % 2] = fmaf(y, y, squares[i % 2]);
      const int64_t row = Row(tile) + i / 2 * 8, token = column + i % 2;
      if (row >= p.w.rows || token >= rows) continue;
      p.norm_after.out[token * p.w.rows + row] = Bf16Bits(y * p.norm_after.weight[row]);
    }
#pragma unroll
    for (float& sum : squares) {
#pragma unroll
      for (int lanes = 4; lanes < kWarpSize; lanes *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
    }
    if (Lane() < 4) norms.squares[Warp()][column] = squares[0], norms.squares[Warp()][column + 1] = squares[1];
  }
  __device__ __forceinline__ void WriteSquares(int tile) const {
    ConsumerBarrier();
    if (const int token = static_cast<int>(threadIdx.x); token < kTokens && token < rows) {
      float sum = 0.0f;
#pragma unroll
      for (const auto& warp : norms.squares) sum += warp[token];
      p.norm_after.squares[token * NormParts(p.w.rows) + tile] = sum;
    }
    ConsumerBarrier();
  }

  // Into norms.scales; a warp sums every kConsumers-th token's parts, the lanes in a fixed order.
  __device__ __forceinline__ void ReadScales() const {
    if (!kNorms || p.norm_before.squares == nullptr) return;
    constexpr int kEach = kTokens / kConsumers;
    const int parts = static_cast<int>(NormParts(p.w.cols));
    float sums[kEach] = {};
    for (int i = Lane(); i < parts; i += kWarpSize) {
#pragma unroll
      for (int t = 0; t < kEach; ++t) {
        const int token = Warp() + t * kConsumers;
        if (token < rows) sums[t] += __ldcg(p.norm_before.squares + int64_t{token} * parts + i);
      }
    }
#pragma unroll
    for (int t = 0; t < kEach; ++t) {
      for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) sums[t] += __shfl_xor_sync(0xFFFFFFFFu, sums[t], lanes);
      if (Lane() == 0) {
        norms.scales[Warp() + t * kConsumers] =
            1.0f / sqrtf(sums[t] / static_cast<float>(p.w.cols) + p.norm_before.eps);
      }
    }
    ConsumerBarrier();
  }

  __device__ static int64_t Row(int tile) { return int64_t{tile} * kUnitRows + Warp() * kTileRows + Lane() / 4; }
  __device__ static int Token(int column) { return column * 8 + Lane() % 4 * 2; }

  __device__ void Run() {
    GridWait();
    ReadScales();
    for (int unit = Begin(shares, share), end = Begin(shares, share + 1); unit < end;) {
      const int tile = unit / shares.depth, tile_end = (tile + 1) * shares.depth, stop = min(end, tile_end);
      const bool begins = unit % shares.depth == 0;
      float sums[kColumns][4], old[kColumns][4] = {};
      Multiply(stop - unit, sums);
      unit = stop;
      if (!begins) {
        Leave(sums);
        continue;
      }
      if (p.accumulate) ReadOld(tile, old);
      Add(tile_end, sums);
      Write(tile, sums, old);
    }
  }
};

#endif

}  // namespace linspec::cuda
