// The multiplication in a block of the warpgroup products (gemm_wgmma.cu). sm_90a only.
//
// bf16 weights are read by the instructions where they lie; int8 and fp8 are widened to bf16 in registers: the order
// within 16 bytes (stored_column.h) makes a word what a lane brings of 16 of k, and matrix loads hand out such words.
#pragma once

#include "kernels/cuda/gemm_wgmma_block.h"

namespace linspec::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// By the warps that multiply. sums[j]: 8 tokens, as OutputTile takes them.
template <typename Unit>
struct Multiplier {
  static constexpr int kTokens = Unit::kTokens, kColumns = kTokens / 8;
  static constexpr bool kWidens = Unit::kWidens;
  static constexpr int kSteps = kBoxDepth / 16;
  using Raw = uint32_t[Unit::kBoxes * kSteps][2];   // words of a unit as they lie, of rows g and g + 8
  using Words = uint32_t[kWidens ? kSteps : 1][4];  // of a box, as an instruction takes them

  const Ring& ring;
  Turn turn = {};

  __device__ static int Warp() { return static_cast<int>(threadIdx.x) / kWarpSize; }
  __device__ static int Lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  __device__ static int Group() { return static_cast<int>(threadIdx.x) / kGroupThreads; }

  __device__ __forceinline__ uint32_t At(int stage) const { return ring.buffers + stage * Unit::kBytes; }
  // When all lanes have read. for_sums: sums come into this slot next, by a plain bulk copy; racecheck sees those,
  // unlike copies of tiles, and takes an arrival to follow the reads of that lane alone.
  __device__ __forceinline__ void Release(int stage, bool for_sums) const {
    if constexpr (kWidens) {
      if (Unit::kForm == Form::kShares && for_sums) return BarrierArrive(ring.empty(stage), 1);
      __syncwarp();
    }
    if (Lane() == 0) BarrierArrive(ring.empty(stage), kWarpSize);
  }

  // The words of a unit: 4 reads of 4 matrices of 8 rows by 16 bytes, whose pieces lie swizzled by the row.
  __device__ static __forceinline__ void ReadWords(uint32_t unit, Raw& raw) {
    const int row = Lane() % 16, piece = Lane() / 16;
    const uint32_t lane = unit + (Warp() % Unit::kWarps * 16 + row) * kUnitRowBytes + (piece ^ row % 8) * 16;
#pragma unroll
    for (int step = 0; step < Unit::kBoxes * kSteps; step += 2) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(raw[step][0]), "=r"(raw[step][1]), "=r"(raw[step + 1][0]), "=r"(raw[step + 1][1])
                   : "r"(lane ^ step * 16));
    }
  }
  // Of a box, to bf16.
  __device__ static __forceinline__ void Widen(const Raw& raw, int box, Words& a) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        WeightTraits<Unit::kType>::Widen(raw[box * kSteps + step][half], a[step][half], a[step][2 + half]);
      }
    }
  }
  // Instructions read their words after they were issued. What nvcc 13.0 makes of two boxes in turn, each waited for
  // before its words are written again, keeps to that; of one box an iteration it did not, and products came out wrong.
  __device__ static __forceinline__ void WordsInUse(Words& a) {
#pragma unroll
    for (auto& words : a) asm volatile("" ::"r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]));
  }

  // sums += 64 of k; in flight at the end. a: the box's words, where they are widened.
  __device__ __forceinline__ void MultiplyBox(uint32_t unit, int box, const Words& a,
                                              float (&sums)[kColumns][4]) const {
    const uint64_t b = WgmmaOperand(unit + Unit::kWeightBytes + box * Unit::kBoxBytes);
    WgmmaBegin();
    if constexpr (kWidens) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) Wgmma<kTokens>(sums, a[step], b + step * kWgmmaNextK);
    } else {
      const uint64_t weights =
          WgmmaOperand(unit + (Unit::kForm == Form::kPair ? 0 : Group() * kGroupRows * kUnitRowBytes));
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        Wgmma<kTokens>(sums, weights + step * kWgmmaNextK, b + step * kWgmmaNextK);
      }
    }
    WgmmaCommit();
  }

  // The groups of a pair's block take turns.
  __device__ __forceinline__ void Next() {
    turn.Next(ring.stages);
    if constexpr (Unit::kForm == Form::kPair) turn.Next(ring.stages);
  }
  __device__ __forceinline__ void WaitForUnit() const {
    BarrierWait(ring.full(turn.stage), turn.parity);
    if constexpr (Unit::kPaced) BarrierWait(ring.tokens(turn.stage), turn.parity);
  }

  // sums of `count` units from zero, at least one, of `left` that the block still has to do. Words of the next unit are read while
  // this one's are multiplied.
  __device__ __forceinline__ void Multiply(int count, int left, float (&sums)[kColumns][4]) {
    Words words[Unit::kBoxes] = {};
    Raw raw;
#pragma unroll
    for (auto& column : sums) {
#pragma unroll
      for (float& x : column) x = 0.0f;
    }
    if constexpr (kWidens) {
      WaitForUnit();
      ReadWords(At(turn.stage), raw);
    }
    int previous = 0;
    for (int i = 0; i < count; ++i) {
      if constexpr (!kWidens) WaitForUnit();
      const int stage = turn.stage;
      Next();
#pragma unroll
      for (int box = 0; box < Unit::kBoxes; ++box) {
        if constexpr (kWidens) Widen(raw, box, words[box]);
        MultiplyBox(At(stage), box, words[box], sums);
        if (kWidens && box + 1 == Unit::kBoxes && i + 1 < count) {
          WaitForUnit();
          ReadWords(At(turn.stage), raw);
        }
        WgmmaWait<1>();
        if constexpr (kWidens) WordsInUse(words[1 - box]);
        if (box == 0 && i > 0) Release(previous, left - i < ring.stages);
      }
      previous = stage;
    }
    WgmmaWait<0>();
    if constexpr (kWidens) WordsInUse(words[1]);
#pragma unroll
    for (auto& column : sums) {
#pragma unroll
      for (float& x : column) asm volatile("" : "+f"(x)::"memory");
    }
    Release(previous, left - count < ring.stages);
  }
};

#endif

}  // namespace linspec::cuda
