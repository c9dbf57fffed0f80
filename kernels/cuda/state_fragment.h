// S of one head, spread over the registers of a block of 8 warps in the layout of the tensor cores' operands.
//
// kColumns of the d columns, a multiple of 32 (kDim: all): warp w owns 32 of them, slice w % (kColumns / 32), and part
// w / (kColumns / 32) of the rows. Lane 4 g + c holds, for each step s of 16 rows, rows 16 s + 4 c + 0..3 and columns 4
// g + 0..3 of the slice: 16-byte loads, four whole 128-byte lines a warp. The same registers are A of q S
// (held_state.h; transposed: rows of A are columns of S) and C of the fold.
#pragma once

#include "kernels/cuda/block.h"
#include "kernels/cuda/state_element.h"
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
  __device__ __forceinline__ void LoadStep(int step, const uint16_t* state) {
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const Vec4 x = LoadElements(state + (Row(step) + row) * kDim + Column());
      float(&to)[4] = s[Held(step)][row];
      to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    }
  }
  template <typename T>
  __device__ __forceinline__ void Load(const T* state) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) LoadStep(step, state);
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

  // As a bf16 S is rounded at the end of a fold; key: of the element at `state` of LoadStep.
  __device__ __forceinline__ void RoundStep(int step, uint32_t key) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& x = s[Held(step)][i / 4][i % 4];
      x = RoundStochastically(x, key + static_cast<uint32_t>((Row(step) + i / 4) * kDim + Column() + i % 4));
    }
  }

  template <typename T>
  __device__ __forceinline__ void StoreStep(int step, T* state) const {
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const float(&x)[4] = s[Held(step)][row];
      StoreElements(state + (Row(step) + row) * kDim + Column(), {x[0], x[1], x[2], x[3]});
    }
  }
};

}  // namespace linspec::cuda
