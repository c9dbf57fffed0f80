// silu(gate) * up by a block for every tile of up to 192 weight rows, all of k (gemm_wgmma.cu): as many rows as give all
// multiprocessors one tile, so that no sums are exchanged. sm_90a only.
#pragma once

#include "kernels/cuda/gemm_wgmma_multiply.h"

namespace linspec::cuda {

inline constexpr int kTallRows = 3 * kGroupRows;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct TallUnits {
  int tile, height, count;  // rows of a tile
  __device__ __forceinline__ int WeightBytes() const { return height * kUnitRowBytes; }
  __device__ __forceinline__ int Depth(int i) const { return i; }
  __device__ __forceinline__ int Row(int) const { return tile * height; }
};

// What the warps that multiply do.
template <int kType, int kTokens>
struct TallConsumer : Multiplier<Unit<kType, kTokens, Form::kTall>> {
  using Unit = cuda::Unit<kType, kTokens, Form::kTall>;
  using Base = Multiplier<Unit>;
  using Base::kColumns, Base::Warp, Base::Lane;
  // Sums, where the ring was. Banks: the four lanes that hold a row's tokens 2 s write 8 apart.
  using Sums = float[kTokens][kTallRows + 4];

  const GemmParams& p;
  const int rows;
  const TallUnits& units;
  const float (&token_scales)[kTokens];
  Sums& sums_of_tokens;

  // A thread takes two outputs of every `step`-th token: rows `gate`, + 1 and the same of up, 8 further.
  __device__ __forceinline__ void Run() {
    const int pairs = units.height / 4, lane = static_cast<int>(threadIdx.x) % pairs;
    const int gate = lane / 4 * kTileRows + lane % 4 * 2;
    const int64_t row = int64_t{units.tile} * units.height + gate;
    float2 gates{1.0f, 1.0f}, ups{1.0f, 1.0f};
    if (p.w.scales != nullptr && row < p.w.rows) {
      gates = __ldg(reinterpret_cast<const float2*>(p.w.scales + row));
      ups = __ldg(reinterpret_cast<const float2*>(p.w.scales + row + 8));
    }
    GridWait();
    float sums[kColumns][4];
    Base::Multiply(units.count, 0, sums);
    ConsumerBarrier<Unit::kBlockWarps>();  // all have multiplied what lies where the sums go
    const int at = Warp() * kTileRows + Lane() / 4, token = Lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums_of_tokens[j * 8 + token + i % 2][at + i / 2 * 8] = sums[j][i];
    }
    const bool scaled = p.norm_before.squares != nullptr;
    scaled ? ScalesWait<Unit::kBlockWarps>() : ConsumerBarrier<Unit::kBlockWarps>();
    const int step = Unit::kBlockWarps * kWarpSize / pairs, first = static_cast<int>(threadIdx.x) / pairs;
    if (first >= step || row >= p.w.rows) return;
    uint16_t* to = p.y_bf16 + row / kTileRows * 8 + row % kTileRows;
#pragma unroll 2
    for (int t = first; t < rows; t += step) {
      const float scale = scaled ? token_scales[t] : 1.0f;
      const float2 g = *reinterpret_cast<const float2*>(&sums_of_tokens[t][gate]);
      const float2 u = *reinterpret_cast<const float2*>(&sums_of_tokens[t][gate + 8]);
      *reinterpret_cast<__nv_bfloat162*>(to + t * (p.w.rows / 2)) =
          __floats2bfloat162_rn(Silu(g.x * (gates.x * scale)) * (u.x * (ups.x * scale)),
                                Silu(g.y * (gates.y * scale)) * (u.y * (ups.y * scale)));
    }
  }
};

#endif

// Blocks are tiles of `height` rows.
template <int kType, int kTokens>
__global__ void __launch_bounds__(Unit<kType, kTokens, Form::kTall>::kThreads + kWarpSize)
    WgmmaTallKernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap tokens,
                    const __grid_constant__ GemmParams p, const int rows, const int depth, const int height,
                    const int stages) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Unit = Unit<kType, kTokens, Form::kTall>;
  using Consumer = TallConsumer<kType, kTokens>;
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t barriers[Ring::kBarrierBytes / sizeof(uint64_t)];
  __shared__ float scales[kTokens];
  const int warp = UniformWarp();
  const TallUnits units{static_cast<int>(blockIdx.x), height, depth};
  const uint32_t misaligned = SharedAddress(shared) % 1024;
  uint8_t* const buffers = shared + (misaligned == 0 ? 0 : 1024 - misaligned);
  const Ring ring{SharedAddress(buffers), SharedAddress(barriers), stages};
  if (threadIdx.x == 0) {
    MakeRing<Unit>(ring);
    BarrierMade();
  }
  __syncthreads();
  GridLaunchDependents();
  if (warp < Unit::kBlockWarps) {
    auto& sums = *reinterpret_cast<typename Consumer::Sums*>(buffers);
    Consumer{{ring}, p, rows, units, scales, sums}.Run();
  } else if (warp == Unit::kThreads / kWarpSize) {
    MakeScales<kTokens, Unit::kBlockWarps>(p, rows, scales);
  } else if (threadIdx.x % kWarpSize == 0) {
    Producer<Unit, TallUnits>{weights, tokens, units, ring}.Run(warp - Unit::kBlockWarps);
  }
#endif
}

}  // namespace linspec::cuda
