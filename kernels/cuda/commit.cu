// Appends accepted rows to the rings and folds S where a group fills, for one layer or all layers in one launch.
//
// Grid (blocks of kHeads kv heads, tasks, layers). A block whose request fills no group copies its heads' rows and is
// done: 2 KB read and written per row and head. Otherwise it stages each head's group (ring slots, then accepted rows)
// in shared memory, folds in registers (state_fragment.h) and writes S: 128 KB + 64 KB per head at d = 128.
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/state_fragment.h"

namespace linspec::cuda {
namespace {

constexpr int kHeads = 4;

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

  // Accepted rows [begin, end) of `heads` heads to their slots, from slot `slot` on.
  __device__ __forceinline__ void Append(int first_head, int heads, int begin, int end, int slot) const {
    for (int i = static_cast<int>(threadIdx.x); i < (end - begin) * 2 * heads * kColumns; i += kThreads) {
      const int c = i % kColumns * 4, head = first_head + i / kColumns % heads, part = i / kColumns / heads;
      StoreElements(Ring(head, part % 2) + (slot + part / 2) * kDim + c,
                    LoadElements(Row(begin + part / 2, head, part % 2) + c));
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
};

template <int kDim, typename T>
__device__ __forceinline__ void CommitHeads(const AttentionParams& p) {
  extern __shared__ __align__(16) float shared[];
  const Task task = p.tasks[blockIdx.y];
  if (task.slot < 0 || task.path_length == 0) return;
  const int first = static_cast<int>(blockIdx.x) * kHeads, group = p.layer.group_size;
  const int heads = min(kHeads, p.layer.num_kv_heads - first);
  const Commit<kDim, T> commit{p, task, p.states.Slot<T>(task.slot)};
  int phase = static_cast<int>(task.length % group), done = 0;
  int64_t completed = task.length / group;  // groups
  while (phase + task.path_length - done >= group) {
    for (int head = first; head < first + heads; ++head) {
      commit.Fold(head, done, phase, completed, shared, shared + group * commit.kStride);
    }
    commit.Append(first, heads, done, done + group - phase, phase);
    __syncthreads();
    done += group - phase;
    phase = 0;
    ++completed;
  }
  commit.Append(first, heads, done, task.path_length, phase);
}

template <int kDim, typename T>
__global__ void __launch_bounds__(kThreads, 2) CommitLayerKernel(const AttentionParams p) {
  CommitHeads<kDim, T>(p);
}

template <int kDim, typename T>
__global__ void __launch_bounds__(kThreads, 2) CommitLayersKernel(const AttentionParams* layers) {
  CommitHeads<kDim, T>(layers[blockIdx.z]);
}

template <typename Kernel, typename Argument>
void Launch(Kernel kernel, const LayerParams& layer, const Argument& argument, int tasks, int layers,
            cudaStream_t stream) {
  const int bytes = layer.group_size * 2 * (layer.head_dim + 8) * static_cast<int>(sizeof(float));
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<dim3((layer.num_kv_heads + kHeads - 1) / kHeads, tasks, layers), kThreads, bytes, stream>>>(argument);
}

}  // namespace

void LaunchCommitTiles(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  const auto kernel =
      p.states.bf16 ? (p.layer.head_dim == 128 ? CommitLayerKernel<128, uint16_t> : CommitLayerKernel<64, uint16_t>)
                    : (p.layer.head_dim == 128 ? CommitLayerKernel<128, float> : CommitLayerKernel<64, float>);
  Launch(kernel, p.layer, p, num_tasks, 1, stream);
}

void LaunchCommitTilesOfLayers(const LayerParams& layer, bool bf16, const AttentionParams* params, int num_layers,
                               int num_tasks, cudaStream_t stream) {
  const auto kernel =
      bf16 ? (layer.head_dim == 128 ? CommitLayersKernel<128, uint16_t> : CommitLayersKernel<64, uint16_t>)
           : (layer.head_dim == 128 ? CommitLayersKernel<128, float> : CommitLayersKernel<64, float>);
  Launch(kernel, layer, params, num_tasks, num_layers, stream);
}

}  // namespace linspec::cuda
