// S of one head in the registers of a block of 8 warps, in the type and layout it is stored in, on its way from memory
// while the block does other things; then an operand of the tensor cores (the layout is state_fragment.h's).
#pragma once

#include <utility>

#include "kernels/cuda/state_fragment.h"

namespace linspec::cuda {

// Four columns of a row of S.
template <typename T>
struct HeldRow;

template <>
struct HeldRow<float> {
  float x[4];
};
template <>
struct HeldRow<uint16_t> {
  uint32_t x[2];  // pairs
};

// Columns 2 i and 2 i + 1 of two rows as the A operand. bf16 is exact in tf32.
template <int i>
__device__ __forceinline__ Split<4, true> OperandOf(const HeldRow<float>& a, const HeldRow<float>& b) {
  return Split<4, true>({a.x[2 * i], a.x[2 * i + 1], b.x[2 * i], b.x[2 * i + 1]});
}
template <int i>
__device__ __forceinline__ ExactOperand OperandOf(const HeldRow<uint16_t>& a, const HeldRow<uint16_t>& b) {
  return OfRowPairs(a.x[i], b.x[i]);
}

template <int kDim, typename T>
struct HeldState {
  using Layout = StateFragment<kDim>;
  static constexpr int kParts = Layout::kParts, kSteps = Layout::kSteps, kRowBytes = kDim * sizeof(T);
  HeldRow<T> s[kSteps][4];

  // One step of at most four; those past the end are nothing.
  template <int step>
  __device__ __forceinline__ void LoadStep(const T* state) {
    if constexpr (step < kSteps) {
      const auto own = static_cast<unsigned>(Layout::Row(0) * kDim + Layout::Column());  // one register, not two
      LoadRows<step>(state + own, std::make_integer_sequence<int, 4>());
    }
  }
  // Before the next step is asked for.
  template <int step>
  __device__ __forceinline__ void AwaitStep() const {
    if constexpr (step + 1 < kSteps) AwaitLoad(s[step][3].x[3]);
  }
  __device__ __forceinline__ void Load(const T* state) {
    static_assert(kSteps <= 4);
    LoadStep<0>(state);
    LoadStep<1>(state);
    LoadStep<2>(state);
    LoadStep<3>(state);
  }

  // The thread's part of q S for kRows rows of q [kRows][stride]: y[2 tile + e] is row 8 tile + 2 c + e, four columns
  // from Column() on.
  template <int kRows>
  __device__ __forceinline__ void Multiply(const float* q, int stride, Vec4 (&y)[(kRows + 7) / 8 * 2]) const {
    constexpr int kTiles = (kRows + 7) / 8;  // of 8 rows, the columns of an instruction
    const int g = static_cast<int>(threadIdx.x) % 32 / 4;
    PreciseSums sum[kTiles][2];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Vec4 x[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        x[tile] = Load4(q + min(8 * tile + g, kRows - 1) * stride + Layout::Row(step));
      }
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const auto even = OperandOf<0>(s[step][2 * u], s[step][2 * u + 1]);
        const auto odd = OperandOf<1>(s[step][2 * u], s[step][2 * u + 1]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const Split<2> b(u == 0 ? Split<2>({x[tile].x, x[tile].y}) : Split<2>({x[tile].z, x[tile].w}));
          sum[tile][0].Add(even, b);
          sum[tile][1].Add(odd, b);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const PreciseSums(&part)[2] = sum[i / 2];
      y[i] = {part[0][i % 2], part[0][2 + i % 2], part[1][i % 2], part[1][2 + i % 2]};
    }
  }

  // partial[part][row][column] of q S, rows kStride apart.
  template <int kRows, int kStride>
  __device__ __forceinline__ static void Store(const Vec4 (&y)[(kRows + 7) / 8 * 2], float* partial) {
    float* out = partial + Layout::Part() * kRows * kStride + Layout::Column();
#pragma unroll
    for (int i = 0; i < (kRows + 7) / 8 * 2; ++i) {
      const int row = i / 2 * 8 + 2 * (static_cast<int>(threadIdx.x) % 4) + i % 2;
      if (row < kRows) Store4(out + row * kStride, y[i]);
    }
  }

 private:
  template <int step, int... i>
  __device__ __forceinline__ void LoadRows(const T* from, std::integer_sequence<int, i...>) {
    (LoadEarly<(step * 16 + i) * kRowBytes>(s[step][i].x, from), ...);
  }
};

}  // namespace linspec::cuda
