// Appends accepted rows to the rings and folds S where a group fills, for one layer or all layers in one launch.
//
// As many blocks as fit take turns: first at heads of requests that fill a group, of all layers, then at the others'
// rows, all heads of a layer at a time where there are enough. A fold stages a head's group (ring slots, then accepted
// rows) in shared memory, folds in registers (state_fragment.h) and writes S. Floor per head at d = 128, fp32: a row 1
// KB read and written, a fold 128 KB read and 64 KB written. Reached: docs/cuda_attention.md.
#include <algorithm>

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/pdl.h"
#include "kernels/cuda/state_fragment.h"

namespace linspec::cuda {
namespace {

constexpr int kBlocks = 2;  // of a multiprocessor

template <int kDim, typename T>
struct Commit {
  static constexpr int kStride = kDim + 8, kColumns = kDim / 4;
  const AttentionParams& p;
  const Task& task;
  T* state;

  __device__ __forceinline__ T* Ring(int kv_head, int value) const {
    const int64_t heads = p.layer.num_kv_heads, group = p.layer.group_size;
    return state + heads * kDim * kDim + (value * heads + kv_head) * group * kDim;
  }
  __device__ __forceinline__ const T* Row(int accepted, int kv_head, int value) const {
    const int64_t row = task.row_begin + p.paths[task.path_begin + accepted];
    const KvRows<T> kv = p.Kv<T>();
    return kv.data + row * kv.stride + (value * p.layer.num_kv_heads + kv_head) * kDim;
  }

  // Accepted rows [begin, end) of `heads` heads to their slots, from slot `slot` on. Several loads are under way.
  __device__ __forceinline__ void Append(int first_head, int heads, int begin, int end, int slot) const {
    constexpr int kBatch = 4;
    const int size = (end - begin) * 2 * heads * kColumns;
    for (int first = static_cast<int>(threadIdx.x); first < size; first += kBatch * kThreads) {
      T* to[kBatch];
      Vec4 x[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int i = min(first + j * kThreads, size - 1), vector = i / kColumns, c = i % kColumns * 4;
        const int row = vector / (2 * heads), value = vector / heads % 2, head = first_head + vector % heads;
        to[j] = Ring(head, value) + (slot + row) * kDim + c;
        x[j] = LoadElements(Row(begin + row, head, value) + c);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j * kThreads < size) StoreElements(to[j], x[j]);
      }
    }
  }

  // S <- decay S + K^T V over slots [0, phase) of the ring and accepted rows from `begin` on, at the end of a group.
  __device__ __forceinline__ void Fold(int kv_head, int begin, int phase, int64_t completed, float* keys,
                                       float* values) const {
    const int group = p.layer.group_size;
    for (int i = static_cast<int>(threadIdx.x); i < group * 2 * kColumns; i += kThreads) {
      const int slot = i / (2 * kColumns), value = i / kColumns % 2, c = i % kColumns * 4;
      const T* from = slot < phase ? Ring(kv_head, value) + slot * kDim : Row(begin + slot - phase, kv_head, value);
      CopyElements((value != 0 ? values : keys) + slot * kStride + c, from + c);
    }
    CommitCopies();
    StateFragment<kDim, kDim, 1> s;
    T* matrix = state + static_cast<int64_t>(kv_head) * kDim * kDim;
    const uint32_t key = HeadRoundingKey(p.layer, completed, kv_head);
    const float decay = p.layer.decay != nullptr ? p.layer.decay[kv_head] : 1.0f;
    WaitCopies<0>();
    __syncthreads();
#pragma unroll 1
    for (int step = 0; step < s.kSteps; ++step) {
      s.LoadStep(step, matrix);
      if (completed == 0) s.Clear();
      s.Fold(step, decay, keys, kStride, values, kStride, group);
      if constexpr (sizeof(T) == 2) s.RoundStep(step, key);
      s.StoreStep(step, matrix);
    }
    __syncthreads();
  }

  // All accepted rows of one head, whose last group they fill.
  __device__ __forceinline__ void FillGroups(int kv_head, float* keys, float* values) const {
    const int group = p.layer.group_size;
    int phase = static_cast<int>(task.length % group), done = 0;
    for (int64_t completed = task.length / group; phase + task.path_length - done >= group; ++completed) {
      Fold(kv_head, done, phase, completed, keys, values);
      Append(kv_head, 1, done, done + group - phase, phase);
      __syncthreads();
      done += group - phase;
      phase = 0;
    }
    Append(kv_head, 1, done, task.path_length, phase);
  }
};

// Where a launch's layers are described: all with the same shape, tasks and paths.
struct OneLayer {
  AttentionParams params;
  __device__ __forceinline__ const AttentionParams& operator[](int) const { return params; }
};
struct Layers {
  const AttentionParams* params;
  __device__ __forceinline__ const AttentionParams& operator[](int layer) const { return params[layer]; }
};

// Index of the n-th lane whose bit is set, counted from 0. By a whole warp.
__device__ __forceinline__ int NthLane(unsigned votes, int n) {
  const unsigned lane = threadIdx.x % 32, before = votes & ((1u << lane) - 1);
  return __ffs(__ballot_sync(0xFFFFFFFFu, (votes >> lane & 1) != 0 && __popc(before) == n)) - 1;
}

// Requests by 32: a lane looks at one, in every warp alike.
template <int kDim, typename T, typename Source>
__global__ void __launch_bounds__(kThreads, kBlocks) CommitKernel(const Source source, int num_layers, int num_tasks) {
  extern __shared__ __align__(16) float shared[];
  const Task* tasks = source[0].tasks;
  const int heads = source[0].layer.num_kv_heads, group = source[0].layer.group_size;
  const int blocks = static_cast<int>(gridDim.x);
  int unit = static_cast<int>(blockIdx.x);
  for (int first = 0; first < num_tasks; first += 32) {
    const int mine = first + static_cast<int>(threadIdx.x) % 32;
    const Task task = tasks[min(mine, num_tasks - 1)];
    const bool any = mine < num_tasks && task.slot >= 0 && task.path_length > 0;
    const bool fills = any && static_cast<int>(task.length % group) + task.path_length >= group;
    const unsigned filling = __ballot_sync(0xFFFFFFFFu, fills), appending = __ballot_sync(0xFFFFFFFFu, any && !fills);
    const int folds = __popc(filling) * num_layers * heads, rows = __popc(appending) * num_layers;
    for (; unit < folds; unit += blocks) {
      const AttentionParams& p = source[unit / heads % num_layers];
      const Task own = tasks[first + NthLane(filling, unit / heads / num_layers)];
      const Commit<kDim, T> commit{p, own, p.states.template Slot<T>(own.slot)};
      commit.FillGroups(unit % heads, shared, shared + group * commit.kStride);
    }
    unit -= folds;  // the turns go on
    // Few rows are divided, for all blocks.
    const int part = max(1, min(heads, (rows * heads + blocks - 1) / blocks)), parts = (heads + part - 1) / part;
    for (; unit < rows * parts; unit += blocks) {
      const int head = unit % parts * part, row = unit / parts;
      const AttentionParams& p = source[row % num_layers];
      const Task own = tasks[first + NthLane(appending, row / num_layers)];
      const Commit<kDim, T> commit{p, own, p.states.template Slot<T>(own.slot)};
      commit.Append(head, min(part, heads - head), 0, own.path_length, static_cast<int>(own.length % group));
    }
    unit -= rows * parts;
  }
}

template <typename Source>
void Launch(const LayerParams& layer, bool bf16, const Source& source, int num_layers, int num_tasks,
            cudaStream_t stream) {
  const auto kernel =
      bf16 ? (layer.head_dim == 128 ? CommitKernel<128, uint16_t, Source> : CommitKernel<64, uint16_t, Source>)
           : (layer.head_dim == 128 ? CommitKernel<128, float, Source> : CommitKernel<64, float, Source>);
  const int bytes = layer.group_size * 2 * (layer.head_dim + 8) * static_cast<int>(sizeof(float));
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  const int64_t heads = int64_t{num_layers} * num_tasks * layer.num_kv_heads;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(heads, CurrentDevice().processors * kBlocks));
  kernel<<<blocks, kThreads, bytes, stream>>>(source, num_layers, num_tasks);
}

}  // namespace

void LaunchCommitTiles(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  Launch(p.layer, p.states.bf16, OneLayer{p}, 1, num_tasks, stream);
}

void LaunchCommitTilesOfLayers(const LayerParams& layer, bool bf16, const AttentionParams* params, int num_layers,
                               int num_tasks, cudaStream_t stream) {
  Launch(layer, bf16, Layers{params}, num_layers, num_tasks, stream);
}

}  // namespace linspec::cuda
