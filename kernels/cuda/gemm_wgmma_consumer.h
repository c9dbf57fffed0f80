// What the warps that multiply do in a block of the warpgroup product (gemm_wgmma.cu). sm_90a only.
//
// bf16 weights are read by the instructions where they lie; int8 and fp8 are widened to bf16 in registers: the order
// within 16 bytes (stored_column.h) makes a word what a lane brings of 16 of k, and matrix loads hand out such words.
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
  using Raw = uint32_t[Unit::kBoxes * kSteps][2];   // words of a unit as they lie, of rows g and g + 8
  using Words = uint32_t[kWidens ? kSteps : 1][4];  // of a box, as an instruction takes them

  const GemmParams& p;
  int rows, share;
  const Shares& shares;
  const Workspace& workspace;
  const Ring& ring;
  TileEnd<kTokens>& end;
  Turn turn = {};

  __device__ static int Warp() { return static_cast<int>(threadIdx.x) / kWarpSize; }
  __device__ static int Lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  __device__ static int Group() { return static_cast<int>(threadIdx.x) / kGroupThreads; }

  __device__ __forceinline__ uint32_t At(int stage) const { return ring.buffers + stage * Unit::kBytes; }
  // When all lanes have read. for_sums: sums come into this slot next, by a plain bulk copy; racecheck sees those,
  // unlike copies of tiles, and takes an arrival to follow the reads of that lane alone.
  __device__ __forceinline__ void Release(int stage, bool for_sums) const {
    if constexpr (kWidens) {
      if (for_sums) return BarrierArrive(ring.empty(stage), 1);
      __syncwarp();
    }
    if (Lane() == 0) BarrierArrive(ring.empty(stage), kWarpSize);
  }

  // The words of a unit: 4 reads of 4 matrices of 8 rows by 16 bytes, whose pieces lie swizzled by the row.
  __device__ static __forceinline__ void ReadWords(uint32_t unit, Raw& raw) {
    const int row = Lane() % 16, piece = Lane() / 16;
    const uint32_t lane = unit + (Warp() * 16 + row) * kUnitRowBytes + (piece ^ row % 8) * 16;
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
        WeightTraits<kType>::Widen(raw[box * kSteps + step][half], a[step][half], a[step][2 + half]);
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
    const uint64_t b = WgmmaOperand(unit + kWeightBytes + box * Unit::kBoxBytes);
    WgmmaBegin();
    if constexpr (kWidens) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) Wgmma<kTokens>(sums, a[step], b + step * kWgmmaNextK);
    } else {
      const uint64_t weights = WgmmaOperand(unit + Group() * kGroupRows * kUnitRowBytes);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        Wgmma<kTokens>(sums, weights + step * kWgmmaNextK, b + step * kWgmmaNextK);
      }
    }
    WgmmaCommit();
  }

  __device__ __forceinline__ void WaitForUnit() const {
    BarrierWait(ring.full(turn.stage), turn.parity);
    if constexpr (Unit::kPaced) BarrierWait(ring.tokens(turn.stage), turn.parity);
  }

  // sums of `count` units from zero, of `left` that the block still has to do. Words of the next unit are read while
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
      turn.Next(ring.stages);
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
    for (int i = 0; i < behind * kGroups; ++i, turn.Next(ring.stages)) {
      BarrierWait(ring.full(turn.stage), turn.parity);
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
      BarrierArrive(ring.empty(turn.stage), 1);  // each lane for itself: racecheck again
    }
  }

  __device__ void Run() {
    const int last = Begin(shares, share + 1);
    // Only of the last tile is a part elsewhere.
    const int behind = Behind(shares, share, ((last - 1) / shares.depth + 1) * shares.depth);
    GridWait();
    bool scales_wait = kNorms && p.norm_before.squares != nullptr;
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
      if (scales_wait) ScalesWait();
      scales_wait = false;
      epilogue.Write(tile, sums);
    }
    if (scales_wait) ScalesWait();  // nobody leaves before all have met there
  }
};

// What a warp of its own does where a norm is in front: end.scales, while the others multiply. Each lane adds the parts
// of its tokens in order. (By the warps that multiply, before they do: 4.5 us at 64 tokens, an H200.)
template <int kTokens>
__device__ __forceinline__ void MakeScales(const GemmParams& p, int rows, TileEnd<kTokens>& end) {
  if (p.norm_before.squares == nullptr) return;
  constexpr int kEach = (kTokens + kWarpSize - 1) / kWarpSize;  // tokens of a lane
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, parts = static_cast<int>(NormParts(p.w.cols));
  const float* of[kEach];
#pragma unroll
  for (int t = 0; t < kEach; ++t) of[t] = p.norm_before.squares + min(lane + t * kWarpSize, rows - 1) * parts;
  float sums[kEach] = {};
  GridWait();
#pragma unroll 8
  for (int i = 0; i < parts; ++i) {
#pragma unroll
    for (int t = 0; t < kEach; ++t) sums[t] += __ldcg(of[t] + i);
  }
#pragma unroll
  for (int t = 0; t < kEach; ++t) {
    const int token = lane + t * kWarpSize;
    if (token < kTokens) end.scales[token] = InverseRms(sums[t], p.w.cols, p.norm_before.eps);
  }
  ScalesMade();
}

#endif

}  // namespace linspec::cuda
