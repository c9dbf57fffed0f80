// S of one head, spread over the registers of a block of 8 warps in the layout of the tensor cores' operands.
//
// kColumns of the d columns, a multiple of 32 (kDim: all): warp w owns 32 of them, slice w % (kColumns / 32), and part
// w / (kColumns / 32) of the rows. Lane 4 g + c holds, for each
// step s of 16 rows, rows 16 s + 4 c + 0..3 and columns 4 g + 0..3 of the slice: 16-byte loads, four whole 128-byte
// lines a warp. The same registers are A of q S (transposed: rows of A are columns of S) and C of the fold.
#pragma once

#include "kernels/cuda/block.h"
#include "kernels/cuda/tensor_core.h"

namespace linspec::cuda {

// kHeld 1: only one step is held at a time, for folds.
template <int kDim, int kColumns = kDim, int kHeld = 0>
struct StateFragment {
  static constexpr int kSlices = kColumns / 32, kParts = kThreads / 32 / kSlices, kSteps = kDim / 16 / kParts;
  float s[kHeld != 0 ? kHeld : kSteps][4][4];  // step, row, column

  __device__ __forceinline__ static constexpr int Held(int step) { return kHeld == 1 ? 0 : step; }
  __device__ __forceinline__ static int Part() { return static_cast<int>(threadIdx.x) / 32 / kSlices; }
  __device__ __forceinline__ static int Column() {
    return static_cast<int>(threadIdx.x) / 32 % kSlices * 32 + static_cast<int>(threadIdx.x) % 32 / 4 * 4;
  }
  __device__ __forceinline__ static int Row(int step) {
    return (Part() * kSteps + step) * 16 + static_cast<int>(threadIdx.x) % 4 * 4;
  }

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(s) / sizeof(float)); ++i) s[i / 16][i / 4 % 4][i % 4] = 0.0f;
  }

  // `state` [kDim][kDim], from the first column on.
  __device__ __forceinline__ void LoadStep(int step, const float* state) {
#pragma unroll
    for (int row = 0; row < 4; ++row) LoadEarly(s[Held(step)][row], state + (Row(step) + row) * kDim + Column());
  }
  __device__ __forceinline__ void Load(const float* state) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) LoadStep(step, state);
  }

  // partial[part][row][column] of q S for kRows rows of q [kRows][stride].
  template <int kRows>
  __device__ __forceinline__ void Multiply(const float* q, int stride, float* partial) const {
    constexpr int kTiles = (kRows + 7) / 8;  // of 8 rows, the columns of an instruction
    const int g = static_cast<int>(threadIdx.x) % 32 / 4, c = static_cast<int>(threadIdx.x) % 4;
    PreciseSums sum[kTiles][2];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Vec4 x[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) x[tile] = Load4(q + min(8 * tile + g, kRows - 1) * stride + Row(step));
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const float(&r0)[4] = s[step][2 * u], (&r1)[4] = s[step][2 * u + 1];
        const Split<4, true> even({r0[0], r0[1], r1[0], r1[1]}), odd({r0[2], r0[3], r1[2], r1[3]});
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const Split<2> b(u == 0 ? Split<2>({x[tile].x, x[tile].y}) : Split<2>({x[tile].z, x[tile].w}));
          sum[tile][0].Add(even, b);
          sum[tile][1].Add(odd, b);
        }
      }
    }
    float* out = partial + Part() * kRows * kDim + Column();
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int row = i / 2 * 8 + 2 * c + i % 2, e = i % 2;
      const PreciseSums(&y)[2] = sum[i / 2];
      if (row < kRows) Store4(out + row * kDim, {y[0][e], y[0][2 + e], y[1][e], y[1][2 + e]});
    }
  }

  // One step of S <- decay S + K^T V, over `tokens` (a multiple of 8) rows of k and v in shared memory, ascending.
  // K^T V is summed on its own first, so that a fold is the same arithmetic wherever it runs.
  // kUnrolled costs registers.
  template <bool kUnrolled = true>
  __device__ __forceinline__ void Fold(int step, float decay, const float* k, int k_stride, const float* v,
                                       int v_stride, int tokens) {
    const int g = static_cast<int>(threadIdx.x) % 32 / 4, c = static_cast<int>(threadIdx.x) % 4;
    const int key_column = (Part() * kSteps + step) * 16 + g / 2 * 4 + g % 2;
    Accumulators sum[2][2];  // columns 0, 1 or 2, 3 of the lane; rows 0, 1 or 2, 3
    const auto add = [&](int token) {
      const Vec4 v0 = Load4(v + token * v_stride + Column()), v1 = Load4(v + (token + 4) * v_stride + Column());
      const float *k0 = k + token * k_stride + key_column, *k1 = k0 + 4 * k_stride;
      const Split<4> a[2] = {Split<4>({v0.x, v0.y, v1.x, v1.y}), Split<4>({v0.z, v0.w, v1.z, v1.w})};
      const Split<2> b[2] = {Split<2>({k0[0], k1[0]}), Split<2>({k0[2], k1[2]})};
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i / 2][i % 2].Add(a[i / 2], b[i % 2]);
    };
    if (kUnrolled && tokens == 64) {  // known at compile time: no branches between the steps
#pragma unroll
      for (int token = 0; token < 64; token += 8) add(token + c);
    } else {
#pragma unroll 1
      for (int token = 0; token < tokens; token += 8) add(token + c);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int row = i / 4, column = i % 4;
      float& x = s[Held(step)][row][column];
      x = fmaf(decay, x, sum[column / 2][row / 2][row % 2 + column % 2 * 2]);
    }
  }

  __device__ __forceinline__ void StoreStep(int step, float* state) const {
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const float(&x)[4] = s[Held(step)][row];
      Store4(state + (Row(step) + row) * kDim + Column(), {x[0], x[1], x[2], x[3]});
    }
  }
};

}  // namespace linspec::cuda
