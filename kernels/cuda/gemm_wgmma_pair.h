// Two blocks, a cluster, that multiply a tile of 64 weight rows alone (gemm_wgmma.cu): each takes half of k, each of
// its two groups of warps half of that, in units of 64 rows. The four sums meet in the blocks' shared memory; each
// block ends the tile for half of the tokens. sm_90a only.
//
// Slots of the ring are a group's for good, every other one: their number is even. Groups do not wait for each other:
// with an odd number, one could come round to a slot in which the other's unit had not landed yet, and take that phase
// of the barrier, of which only the parity is told, for its own (garbage, or the launch failed: 11 slots, an H200).
//
// A group's k is that of one of four shares of a tile, its instructions are those of a group there, and the four are
// added in the same order: the bits are those of a launch of four blocks for every 128 rows (gemm_wgmma_consumer.h).
#pragma once

#include "kernels/cuda/cluster.h"
#include "kernels/cuda/gemm_wgmma_multiply.h"

namespace linspec::cuda {

inline constexpr int kPairBlocks = 2, kPairSums = kPairBlocks * kGroups;

// In shared memory, at the same place in both blocks.
template <int kTokens>
struct PairEnd {
  static constexpr int kOwn = kTokens > 8 ? kTokens / 16 : 1;  // columns, of 8 tokens, that a block ends; 8: its first
  static constexpr int kBytes = kGroups * kOwn * kGroupThreads * static_cast<int>(sizeof(float4));  // from the other
  float4 parts[kPairSums][kOwn][kGroupThreads];  // as threads hold them
  uint64_t there;                                // barrier: the other block's parts are
  // Where the ring was. Banks: the four lanes that hold a row's tokens 2 s write 8 apart.
  using Sums = float[kOwn * 8][kGroupRows + 4];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Of a tile, k from `begin` to `middle` is the block's first group's, the rest, as many or one more, the other's, which
// goes first: units are counted in that order.
struct PairUnits {
  int tile, begin, middle, count;
  __device__ PairUnits(int depth, int tile, int rank)
      : tile(tile),
        begin(depth * (2 * rank) / kPairSums),
        middle(depth * (2 * rank + 1) / kPairSums),
        count(depth * (2 * rank + 2) / kPairSums - begin) {}
  __device__ __forceinline__ int WeightBytes() const { return kGroupRows * kUnitRowBytes; }
  __device__ __forceinline__ int Depth(int i) const { return (i % 2 == 0 ? middle : begin) + i / 2; }
  __device__ __forceinline__ int Row(int) const { return tile * kGroupRows; }
  __device__ __forceinline__ int OfGroup(int group) const { return (count + group) / 2; }
};

// What the warps that multiply do.
template <int kType, int kTokens>
struct PairConsumer : Multiplier<Unit<kType, kTokens, Form::kPair>> {
  using Base = Multiplier<Unit<kType, kTokens, Form::kPair>>;
  using End = PairEnd<kTokens>;
  using Base::kColumns, Base::Group, Base::Warp, Base::Lane;
  static constexpr int kOwn = End::kOwn;
  static constexpr int kEach = (kOwn * 8 + 2 * kConsumers - 1) / (2 * kConsumers);  // tokens of half a warp

  const GemmParams& p;
  const int rows, rank;
  const PairUnits& units;
  End& end;
  typename End::Sums& sums_of_tokens;

  // Each half of a warp takes a token's 64 rows, a lane four of them.
  __device__ static __forceinline__ int Own(int i) { return (Warp() + i * kConsumers) * 2 + Lane() / 16; }
  __device__ __forceinline__ int64_t Row() const { return int64_t{units.tile} * kGroupRows + Lane() % 16 * 4; }
  __device__ __forceinline__ bool Ends(int i) const { return Own(i) < kOwn * 8 && Token(i) < rows; }
  __device__ __forceinline__ int Token(int i) const { return rank * kOwn * 8 + Own(i); }

  // group: as UniformWarp has it.
  __device__ __forceinline__ void Run(int group) {
    const float4 ones{1.0f, 1.0f, 1.0f, 1.0f};
    const auto read = [&](const float* of) { return __ldg(reinterpret_cast<const float4*>(of + Row())); };
    const float4 scales = p.w.scales != nullptr ? read(p.w.scales) : ones;
    const float4 weights = p.norm_after.weight != nullptr ? read(p.norm_after.weight) : ones;
    float4 old[kEach] = {};
    GridWait();
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (Ends(i)) old[i] = __ldcg(reinterpret_cast<const float4*>(p.y + Token(i) * p.w.rows + Row()));
    }
    float sums[kColumns][4];
    Base::turn.stage = 1 - group;
    Base::Multiply(units.OfGroup(group), 0, sums);
    Exchange(group, sums);
    Write(scales, weights, old);
  }

  // Sums of the tokens that this block ends.
  __device__ __forceinline__ void Exchange(int group, const float (&sums)[kColumns][4]) {
    const int at = static_cast<int>(threadIdx.x) % kGroupThreads;
    float4(&parts)[kOwn][kGroupThreads] = end.parts[rank * kGroups + group];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (rank != j / kOwn) Send(parts[j % kOwn][at], sums[j]);
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (rank == j / kOwn) parts[j % kOwn][at] = make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]);
    }
    ConsumerBarrier();  // also: all have multiplied what lies where the sums go
    if (rank * kOwn >= kColumns) return;
    BarrierWait(&end.there, 0);
    const int row = Warp() % 4 * kTileRows + Lane() / 4, token = Lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      if (j % kGroups != group) continue;
      float4 all = end.parts[0][j][at];
#pragma unroll
      for (int q = 1; q < kPairSums; ++q) {
        const float4 part = end.parts[q][j][at];
        all.x += part.x, all.y += part.y, all.z += part.z, all.w += part.w;
      }
      sums_of_tokens[j * 8 + token][row] = all.x;
      sums_of_tokens[j * 8 + token + 1][row] = all.y;
      sums_of_tokens[j * 8 + token][row + 8] = all.z;
      sums_of_tokens[j * 8 + token + 1][row + 8] = all.w;
    }
    ConsumerBarrier();
  }

  // To the same place in the other block, whose barrier counts it.
  __device__ __forceinline__ void Send(const float4& place, const float (&sums)[4]) const {
    const auto there = [&](uint32_t address) {
      uint32_t other;
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(other) : "r"(address), "r"(1 - rank));
      return other;
    };
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            there(SharedAddress(&place))),
        "f"(sums[0]), "f"(sums[1]), "f"(sums[2]), "f"(sums[3]), "r"(there(SharedAddress(&end.there)))
        : "memory");
  }

  // As Epilogue writes rows, to the bit.
  __device__ __forceinline__ void Write(const float4& scales, const float4& weights, const float4 (&old)[kEach]) const {
    if (rank * kOwn >= kColumns) return;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      float4 v = *reinterpret_cast<const float4*>(&sums_of_tokens[min(Own(i), kOwn * 8 - 1)][Lane() % 16 * 4]);
      v.x = fmaf(v.x, scales.x, old[i].x), v.y = fmaf(v.y, scales.y, old[i].y);
      v.z = fmaf(v.z, scales.z, old[i].z), v.w = fmaf(v.w, scales.w, old[i].w);
      const bool ends = Ends(i);
      const int64_t place = Token(i) * p.w.rows + Row();
      if (ends) __stcg(reinterpret_cast<float4*>(p.y + place), v);
      if (p.norm_after.weight == nullptr) continue;
      float squares = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, v.w * v.w)));
#pragma unroll
      for (int lanes = kWarpSize / 4; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, lanes);
      if (!ends) continue;
      StoreBf16(p.norm_after.out + place, v.x * weights.x, v.y * weights.y, v.z * weights.z, v.w * weights.w);
      if (Lane() % 16 != 0) continue;
      p.norm_after.squares[Token(i) * NormParts(p.w.rows) + units.tile] = squares;
    }
  }
};

#endif

// y += x w^T, and what a norm behind wants: blocks in clusters of kPairBlocks, tile by tile.
template <int kType, int kTokens>
__global__ void __launch_bounds__(Unit<kType, kTokens, Form::kPair>::kThreads)
    WgmmaPairKernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap tokens,
                    const __grid_constant__ GemmParams p, const int rows, const int depth, const int stages) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Unit = Unit<kType, kTokens, Form::kPair>;
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t barriers[Ring::kBarrierBytes / sizeof(uint64_t)];
  __shared__ __align__(16) PairEnd<kTokens> end;
  const int rank = static_cast<int>(blockIdx.x) % kPairBlocks, warp = UniformWarp();
  const PairUnits units(depth, static_cast<int>(blockIdx.x) / kPairBlocks, rank);
  const uint32_t misaligned = SharedAddress(shared) % 1024;
  uint8_t* const buffers = shared + (misaligned == 0 ? 0 : 1024 - misaligned);
  const Ring ring{SharedAddress(buffers), SharedAddress(barriers), stages};
  if (threadIdx.x == 0) {
    MakeRing<Unit>(ring);
    BarrierInit(&end.there, 1);
    BarrierMade();
    BarrierExpect(&end.there, PairEnd<kTokens>::kBytes);
  }
  Cluster().Sync();  // also: the other block, into whose memory this one writes, runs
  GridLaunchDependents();
  if (warp < kConsumers) {
    auto& sums = *reinterpret_cast<typename PairEnd<kTokens>::Sums*>(buffers);
    PairConsumer<kType, kTokens>{{ring}, p, rows, rank, units, end, sums}.Run(warp / (kConsumers / kGroups));
  } else if (threadIdx.x % kWarpSize == 0) {
    Producer<Unit, PairUnits>{weights, tokens, units, ring}.Run(warp - kConsumers);
  }
#endif
}

}  // namespace linspec::cuda
