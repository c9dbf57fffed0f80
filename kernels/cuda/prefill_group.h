// Outputs of one group of 64 tokens and one query head, S before the group given: y = W V + scale (Q S), with W the
// masked local and convolution weights [64 rows][32 tokens before the group, 64 of it].
//
// Rows stand at their place in the group whatever part of it the call brings, and weights of absent tokens are 0, so
// the bits of a row do not depend on how the prompt was cut. kExact: three tf32 products for each, error 2^-21; else
// one of rounded operands, error 2^-12: well below the bf16 rounding of the activations that follow.
#pragma once

#include <type_traits>

#include "kernels/cuda/prefill_chain.h"
#include "kernels/cuda/state_element.h"
#include "kernels/cuda/tensor_core.h"

namespace linspec::cuda {

// Grid (query heads, groups), 8 warps: warp w has rows 16 (w % 4) + 0..15 and half w / 4 of the keys, then of the
// columns. Two blocks share a multiprocessor, so one computes while the other loads; S, then keys, then weights and
// values pass through the same shared memory. Column tile j of a block of 32 has columns 4 n + j: 16-byte reads.
template <int kDim>
struct OutShared {
  static constexpr int kQuery = kDim + 4, kValue = kDim + 8, kWeight = kHistory + kGroup + 4;
  static constexpr int kLate = 16;  // rows of values whose place the keys take first
  static_assert(kGroup * kQuery <= kGroup * kWeight + kLate * kValue);
  float queries[kGroup * kQuery];
  union {
    float state[kDim * kValue];
    float keys[kGroup * kQuery];
    struct {
      float weights[kGroup * kWeight];  // [row][history, group]
      float values[(kHistory + kGroup) * kValue];
    } y;
  };
  float taps[kHistory], squares[2][kGroup];
};

template <int kDim, bool kExact, typename T>
struct GroupProgram {
  static constexpr int kColumns = kDim / 4, kBlocks = kDim / 64;  // blocks of 32 columns a warp
  using Shared = OutShared<kDim>;
  using A = std::conditional_t<kExact, Split<4>, Rounded<4>>;
  using B = std::conditional_t<kExact, Split<2>, Rounded<2>>;

  const AttentionParams& p;
  const Chain<T>& chain;
  Shared& shared;
  int head, first, tokens, begin;  // rows [begin, tokens) of the group are rows of the call
  bool folded;

  __device__ __forceinline__ static int Thread() { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ static int Half() { return Thread() / 128; }
  __device__ __forceinline__ static int G() { return Thread() % 32 / 4; }
  __device__ __forceinline__ static int C() { return Thread() % 4; }
  __device__ __forceinline__ static int Tile() { return Thread() / 32 % 4 * 16; }

  // A thread copies one column of 4 of every kRowsAtOnce-th row.
  static constexpr int kRowsAtOnce = kThreads / kColumns;
  __device__ __forceinline__ static int Column() { return Thread() % kColumns * 4; }
  __device__ __forceinline__ static int FirstRow() { return Thread() / kColumns; }

  __device__ __forceinline__ void LoadQueries() const {
    const float* from = chain.Row(first - chain.phase, head, kDim) + Column();
    float* to = shared.queries + Column();
#pragma unroll 4
    for (int i = FirstRow(); i < kGroup; i += kRowsAtOnce) {
      if (i >= begin && i < tokens) CopyAsync16(to + i * Shared::kQuery, from + i * chain.RowStride(kDim));
    }
  }
  __device__ __forceinline__ void LoadState(const float* state) const {
#pragma unroll 4
    for (int i = FirstRow(); i < kDim; i += kRowsAtOnce) {
      CopyAsync16(shared.state + i * Shared::kValue + Column(), state + i * kDim + Column());
    }
  }
  __device__ __forceinline__ void LoadKeys() const {
    const float* row = chain.Row(first - chain.phase, p.layer.num_heads + chain.kv_head, kDim) + Column();
    const T* slot = chain.Ring(0, 0, kDim) + Column();
    float* to = shared.keys + Column();
#pragma unroll 4
    for (int i = FirstRow(); i < kGroup; i += kRowsAtOnce) {
      if (i < begin) {
        CopyElements(to + i * Shared::kQuery, slot + i * kDim);
      } else if (i < tokens) {
        CopyAsync16(to + i * Shared::kQuery, row + i * chain.RowStride(kDim));
      }
    }
  }
  // Rows [from, to) of the values: the history, then the group. Zeros where there is no token.
  __device__ __forceinline__ void LoadValues(int from, int to) const {
    const float* row =
        chain.Row(first - chain.phase, p.layer.num_heads + p.layer.num_kv_heads + chain.kv_head, kDim) + Column();
    const T* slot = chain.Ring(0, 1, kDim) + Column();
#pragma unroll 2
    for (int i = from + FirstRow(); i < to; i += kRowsAtOnce) {
      const int token = i - kHistory, at = first + token;
      float* target = shared.y.values + i * Shared::kValue + Column();
      if (token >= tokens || !chain.Has(at)) {
        Store4(target, {0, 0, 0, 0});
      } else if (at >= chain.phase) {
        CopyAsync16(target, row + token * chain.RowStride(kDim));
      } else {
        CopyElements(target, slot + (at < 0 ? at + p.layer.group_size : at) * kDim);
      }
    }
  }
  __device__ __forceinline__ void LoadTaps() const {
    if (Thread() >= kHistory) return;
    const int taps = p.layer.conv_kernel;
    shared.taps[Thread()] = Thread() < taps ? p.layer.conv_taps[head * taps + Thread()] : 0.0f;
  }

  // sum += a[rows of the warp][k] b[k][columns of the warp] for k in [k_begin, k_end).
  __device__ __forceinline__ void Multiply(const float* a, int stride, const float* b, int k_begin, int k_end,
                                           float (&sum)[kBlocks][4][4]) const {
    const float *x = a + (Tile() + G()) * stride + C(), *y = b + C() * Shared::kValue + Half() * (kDim / 2) + 4 * G();
#pragma unroll 2
    for (int k = k_begin; k < k_end; k += 8) {
      const A row({x[k], x[8 * stride + k], x[k + 4], x[8 * stride + k + 4]});
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const Vec4 y0 = Load4(y + k * Shared::kValue + 32 * block),
                   y1 = Load4(y + (k + 4) * Shared::kValue + 32 * block);
        MmaProduct(sum[block][0], row, B({y0.x, y1.x}));
        MmaProduct(sum[block][1], row, B({y0.y, y1.y}));
        MmaProduct(sum[block][2], row, B({y0.z, y1.z}));
        MmaProduct(sum[block][3], row, B({y0.w, y1.w}));
      }
    }
  }

  // Scores of the warp's 16 rows and the keys 32 half + 8 n + 0..7, none past the rows.
  __device__ __forceinline__ void Score(float (&sum)[4][4]) const {
    const float* q = shared.queries + (Tile() + G()) * Shared::kQuery + 4 * C();
    const float* key = shared.keys + (32 * Half() + G()) * Shared::kQuery + 4 * C();
#pragma unroll 2
    for (int k = 0; k < kDim; k += 16) {
      const Vec4 x0 = Load4(q + k), x1 = Load4(q + 8 * Shared::kQuery + k);
      const A row[2] = {A({x0.x, x1.x, x0.y, x1.y}), A({x0.z, x1.z, x0.w, x1.w})};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (32 * Half() + 8 * n > Tile() + 15) continue;
        const Vec4 y = Load4(key + 8 * n * Shared::kQuery + k);
        MmaProduct(sum[n], row[0], B({y.x, y.y}));
        MmaProduct(sum[n], row[1], B({y.z, y.w}));
      }
    }
  }

  __device__ __forceinline__ void Weigh(const float (&sum)[4][4]) const {
    for (int i = Thread(); i < kHistory * kHistory; i += kThreads) {
      const int row = i / kHistory, lag = row + kHistory - i % kHistory;
      shared.y.weights[row * Shared::kWeight + i % kHistory] = lag < kHistory ? shared.taps[lag] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int row = Tile() + G() + i / 2 % 2 * 8, key = 32 * Half() + i / 4 * 8 + 2 * C() + i % 2;
      float weight = 0.0f;
      if (key <= row && row < tokens) {
        const float positive = p.layer.local != 0 ? fmaxf(sum[i / 4][i % 4], 0.0f) : 0.0f;
        weight = positive * positive + (row - key < kHistory ? shared.taps[row - key] : 0.0f);
      }
      shared.y.weights[row * Shared::kWeight + kHistory + key] = weight;
    }
  }

  // Partial sums of z^2 for rows Tile() + G() and + 8; read after the next barrier.
  __device__ __forceinline__ void Square(const float (&z)[kBlocks][4][4]) const {
    float squares[2] = {};
#pragma unroll
    for (int i = 0; i < kBlocks * 16; ++i) {
      const float x = z[i / 16][i / 4 % 4][i % 4];
      squares[i / 2 % 2] = fmaf(x, x, squares[i / 2 % 2]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      squares[r] += __shfl_xor_sync(0xFFFFFFFFu, squares[r], 1);
      squares[r] += __shfl_xor_sync(0xFFFFFFFFu, squares[r], 2);
      if (C() == 0) shared.squares[Half()][Tile() + G() + 8 * r] = squares[r];
    }
  }

  __device__ __forceinline__ void Store(const float (&y)[kBlocks][4][4], const float (&z)[kBlocks][4][4]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = Tile() + G() + 8 * r;
      if (row < begin || row >= tokens) continue;
      float scale = p.layer.global_factor;
      if (p.layer.global == Global::kRmsNorm) {
        const float squares = shared.squares[0][row] + shared.squares[1][row];
        scale = p.layer.global_gain[head] / sqrtf(squares / static_cast<float>(kDim) + p.layer.global_norm_eps);
      }
      const int64_t at =
          (static_cast<int64_t>(chain.task.row_begin + first + row - chain.phase) * p.layer.num_heads + head) * kDim;
#pragma unroll
      for (int i = 0; i < kBlocks * 2; ++i) {
        const int block = i / 2, e = 2 * r + i % 2, column = Half() * (kDim / 2) + 32 * block + 8 * C() + i % 2 * 4;
        const float(&a)[4][4] = y[block], (&b)[4][4] = z[block];
        const Vec4 x{fmaf(scale, b[0][e], a[0][e]), fmaf(scale, b[1][e], a[1][e]), fmaf(scale, b[2][e], a[2][e]),
                     fmaf(scale, b[3][e], a[3][e])};
        if (p.out != nullptr) Store4(p.out + at + column, x);
        if (p.out_bf16 != nullptr) {
          *reinterpret_cast<uint2*>(p.out_bf16 + at + column) =
              make_uint2(RoundToBf16(x.x) | static_cast<uint32_t>(RoundToBf16(x.y)) << 16,
                         RoundToBf16(x.z) | static_cast<uint32_t>(RoundToBf16(x.w)) << 16);
        }
      }
    }
  }
};

}  // namespace linspec::cuda
