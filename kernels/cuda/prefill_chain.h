// The tokens of a prefill task, and its groups: ring and rows as one chain of positions.
#pragma once

#include "kernels/cuda/window_attention.h"

namespace linspec::cuda {

inline constexpr int kGroup = 64, kHistory = 32;  // largest group; values before it that taps reach

__device__ __forceinline__ int Groups(const Task& task, int group_size) {
  if (task.slot < 0 || task.num_rows == 0) return 0;
  const int phase = static_cast<int>(task.length % group_size);
  return (phase + task.num_rows + group_size - 1) / group_size;
}

// Groups of the tasks before `end`, by one warp.
__device__ __forceinline__ int GroupsBefore(const AttentionParams& p, int end) {
  int count = 0;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < end; i += 32) count += Groups(p.tasks[i], p.layer.group_size);
  return __reduce_add_sync(0xFFFFFFFFu, count);
}

// The tokens of a call: ring slots first (T: type of the states), then its rows. Index 0 is the first position of the
// open group.
template <typename T>
struct Chain {
  const AttentionParams& p;
  const Task& task;
  T* state;
  int kv_head, phase;

  __device__ __forceinline__ Chain(const AttentionParams& params, const Task& t, int head)
      : p(params), task(t), kv_head(head), phase(static_cast<int>(t.length % params.layer.group_size)) {
    state = p.states.Slot<T>(t.slot);
  }
  __device__ __forceinline__ int end() const { return phase + task.num_rows; }
  // Zero: before the start of the sequence, or no longer in the ring and out of every tap's reach.
  __device__ __forceinline__ bool Has(int token) const {
    return token < end() && token >= phase - p.layer.group_size && task.length - phase + token >= 0;
  }
  __device__ __forceinline__ T* Matrix(int d) const { return state + static_cast<int64_t>(kv_head) * d * d; }
  __device__ __forceinline__ T* Ring(int slot, int value, int d) const {
    const int64_t heads = p.layer.num_kv_heads, group = p.layer.group_size;
    return state + heads * d * d + ((value * heads + kv_head) * group + slot) * d;
  }
  __device__ __forceinline__ int64_t RowStride(int d) const {
    return static_cast<int64_t>(p.layer.num_heads + 2 * p.layer.num_kv_heads) * d;
  }
  __device__ __forceinline__ const float* Row(int row, int head, int d) const {
    return p.qkv + static_cast<int64_t>(task.row_begin + row) * RowStride(d) + head * d;
  }
};

}  // namespace linspec::cuda
