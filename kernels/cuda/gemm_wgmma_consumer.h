// What the warps that multiply do in a block of the warpgroup product (gemm_wgmma.cu): tiles, and sums of tiles that
// several blocks share. sm_90a only.
#pragma once

#include "kernels/cuda/gemm_wgmma_epilogue.h"
#include "kernels/cuda/gemm_wgmma_multiply.h"

namespace linspec::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// kNorms: with a norm on either side, which takes registers.
template <int kType, int kTokens, bool kNorms>
struct Consumer : Multiplier<Unit<kType, kTokens>> {
  using Base = Multiplier<Unit<kType, kTokens>>;
  using Base::kColumns, Base::ring, Base::turn, Base::Group, Base::Lane;

  const GemmParams& p;
  int rows, share;
  const Shares& shares;
  const Workspace& workspace;
  TileEnd<kTokens>& end;

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
        const uint32_t at = Base::At(turn.stage) + threadIdx.x % kGroupThreads * sizeof(float4);
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
      Base::Multiply(stop - unit, last - unit, sums);
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

#endif

}  // namespace linspec::cuda
