// What the warps that multiply do in a block of the warpgroup product (gemm_wgmma.cu). sm_90a only.
//
// bf16 weights are read by the instructions where they lie; int8 and fp8 are widened to bf16 in registers: a lane
// brings two bytes at a time in the order of k, so it reads the words that hold them, half of whose bytes are its
// neighbour's.
#pragma once

#include "kernels/cuda/gemm_wgmma_epilogue.h"

namespace linspec::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What the multiplying warps do. sums[j]: 8 tokens, as OutputTile takes them. kNorms: with a norm on either side, which
// takes registers.
template <int kType, int kTokens, bool kNorms>
struct Consumer {
  using Unit = cuda::Unit<kType, kTokens>;
  static constexpr int kColumns = kTokens / 8;
  static constexpr bool kWidens = kType != kLinspecCudaBf16;
  static constexpr int kSteps = kBoxDepth / 16;
  using Words = uint32_t[kWidens ? kSteps : 1][4];  // of weights, as an instruction takes them

  const GemmParams& p;
  int rows, share, stages;
  const Shares& shares;
  const Workspace& workspace;
  Ring& ring;
  TileEnd<kTokens>& end;
  uint32_t buffers;
  Turn turn = {};

  __device__ static int Warp() { return static_cast<int>(threadIdx.x) / kWarpSize; }
  __device__ static int Lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  __device__ static int Group() { return static_cast<int>(threadIdx.x) / kGroupThreads; }

  __device__ __forceinline__ uint32_t At(int stage) const { return buffers + stage * Unit::kBytes; }
  // When all lanes have read. for_sums: sums come into this slot next, by a plain bulk copy; racecheck sees those,
  // unlike copies of tiles, and takes an arrival to follow the reads of that lane alone.
  __device__ __forceinline__ void Release(int stage, bool for_sums) const {
    if constexpr (kWidens) {
      if (for_sums) return BarrierArrive(&ring.empty[stage], 1);
      __syncwarp();
    }
    if (Lane() == 0) BarrierArrive(&ring.empty[stage], kWarpSize);
  }

  __device__ static __forceinline__ uint32_t ReadWord(uint32_t at) {
    uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at));
    return word;
  }
  // Two bytes of a word, the lane's by k, as bf16.
  __device__ static __forceinline__ uint32_t Widen(uint32_t word) {
    using Traits = WeightTraits<kType>;
    return Traits::WidenPair(Traits::Extend(word, Lane() % 2 == 0 ? Traits::kBytes01 : Traits::kBytes23));
  }

  // Words that hold weights of 64 of k. The 16-byte pieces of a row lie swizzled by the row.
  __device__ static __forceinline__ void ReadWords(uint32_t unit, int box, Words& a) {
    const int g = Lane() / 4;
    const uint32_t lane = unit + (Warp() * 16 + g) * kUnitRowBytes + g * 16 + Lane() % 4 / 2 * 4;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t at = lane ^ (box * kSteps + step) * 16;
      a[step][0] = ReadWord(at), a[step][1] = ReadWord(at + 8 * kUnitRowBytes);
      a[step][2] = ReadWord(at + 8), a[step][3] = ReadWord(at + 8 * kUnitRowBytes + 8);
    }
  }
  // Instructions read their words after they were issued. What nvcc 13.0 makes of two boxes in turn, each waited for
  // before its words are written again, keeps to that; of one box an iteration it did not, and products came out wrong.
  __device__ static __forceinline__ void WordsInUse(Words& a) {
#pragma unroll
    for (auto& words : a) asm volatile("" ::"r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]));
  }

  // sums += 64 of k; in flight at the end. raw, a: words of the box, where they are widened.
  __device__ __forceinline__ void MultiplyBox(uint32_t unit, int box, const Words& raw, Words& a,
                                              float (&sums)[kColumns][4]) const {
    const uint64_t b = WgmmaOperand(unit + kWeightBytes + box * Unit::kBoxBytes);
    if constexpr (kWidens) {
#pragma unroll
      for (int i = 0; i < kSteps * 4; ++i) a[i / 4][i % 4] = Widen(raw[i / 4][i % 4]);
      WgmmaBegin();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) Wgmma<kTokens>(sums, a[step], b + step * kWgmmaNextK);
    } else {
      const uint64_t weights = WgmmaOperand(unit + Group() * kGroupRows * kUnitRowBytes);
      WgmmaBegin();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        Wgmma<kTokens>(sums, weights + step * kWgmmaNextK, b + step * kWgmmaNextK);
      }
    }
    WgmmaCommit();
  }

  // sums of `count` units from zero, of `left` that the block still has to do.
  __device__ __forceinline__ void Multiply(int count, int left, float (&sums)[kColumns][4]) {
    constexpr bool kReadsUnit = kTokens <= 64;  // all of a unit's words at once: beyond there are no registers for it
    Words words[Unit::kBoxes] = {}, raw[Unit::kBoxes];
#pragma unroll
    for (auto& column : sums) {
#pragma unroll
      for (float& x : column) x = 0.0f;
    }
    int previous = 0;
    for (int i = 0; i < count; ++i) {
      BarrierWait(&ring.full[turn.stage], turn.parity);
      if constexpr (Unit::kPaced) BarrierWait(&ring.tokens[turn.stage], turn.parity);
#pragma unroll
      for (int box = 0; box < Unit::kBoxes; ++box) {
        if constexpr (kWidens) {
          if (box == 0 || !kReadsUnit) ReadWords(At(turn.stage), box, raw[box]);
          if (box == 0 && kReadsUnit) ReadWords(At(turn.stage), 1, raw[1]);
        }
        MultiplyBox(At(turn.stage), box, raw[box], words[box], sums);
        WgmmaWait<1>();
        if constexpr (kWidens) WordsInUse(words[1 - box]);
        if (box == 0 && i > 0) Release(previous, left - i < stages);
      }
      previous = turn.stage;
      turn.Next(stages);
    }
    WgmmaWait<0>();
    if constexpr (kWidens) WordsInUse(words[1]);
#pragma unroll
    for (auto& column : sums) {
#pragma unroll
      for (float& x : column) asm volatile("" : "+f"(x)::"memory");
    }
    Release(previous, left - count < stages);
  }

  // For the block that holds the beginning of the tile.
  __device__ __forceinline__ void Leave(const float (&sums)[kColumns][4]) const {
    float4* to =
        workspace.sums + (int64_t{share} * kGroups + Group()) * kColumns * kGroupThreads + threadIdx.x % kGroupThreads;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      __stcg(to + j * kGroupThreads, make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]));
    }
    asm volatile("fence.proxy.async.global;" ::
                     : "memory");  // the copy engine reads them; here, where nobody waits for it
    __syncwarp();
    if (Lane() == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(workspace.left + share) : "memory");
  }

  // The sums of the `behind` blocks behind, in order.
  __device__ __forceinline__ void Add(int behind, float (&sums)[kColumns][4]) {
    for (int i = 0; i < behind * kGroups; ++i, turn.Next(stages)) {
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

  // Into end.scales; a warp sums every kConsumers-th token's parts, the lanes in a fixed order.
  __device__ __forceinline__ void ReadScales() const {
    if (!kNorms || p.norm_before.squares == nullptr) return;
    constexpr int kEach = kTokens / kConsumers;
    const int parts = static_cast<int>(NormParts(p.w.cols));
    float sums[kEach] = {};
    for (int i = Lane(); i < parts; i += kWarpSize) {
#pragma unroll
      for (int t = 0; t < kEach; ++t) {  // no branches, so that loads overlap
        const int token = min(Warp() + t * kConsumers, rows - 1);
        sums[t] += __ldcg(p.norm_before.squares + int64_t{token} * parts + i);
      }
    }
#pragma unroll
    for (int t = 0; t < kEach; ++t) {
      for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) sums[t] += __shfl_xor_sync(0xFFFFFFFFu, sums[t], lanes);
      if (Lane() == 0) {
        end.scales[Warp() + t * kConsumers] = 1.0f / sqrtf(sums[t] / static_cast<float>(p.w.cols) + p.norm_before.eps);
      }
    }
    ConsumerBarrier();
  }

  __device__ void Run() {
    const int last = Begin(shares, share + 1);
    // Only of the last tile is a part elsewhere.
    const int behind = Behind(shares, share, ((last - 1) / shares.depth + 1) * shares.depth);
    GridWait();
    ReadScales();
    Epilogue<kTokens, kNorms> epilogue{p, rows, end};
    for (int unit = Begin(shares, share); unit < last;) {
      const int tile = unit / shares.depth, stop = min(last, (tile + 1) * shares.depth);
      const bool begins = unit % shares.depth == 0;
      float sums[kColumns][4];
      Multiply(stop - unit, last - unit, sums);
      unit = stop;
      if (!begins) {
        Leave(sums);
        continue;
      }
      epilogue.ReadAhead(tile);
      if (unit == last) Add(behind, sums);
      epilogue.Write(tile, sums);
    }
  }
};

#endif

}  // namespace linspec::cuda
