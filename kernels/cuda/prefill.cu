// Prefill by groups, in three launches: S before every group (one walk over the groups per slice of columns), then all
// groups at once (prefill_group.h), then the last rows to the rings.
//
// The walk is the only serial part: it folds K^T V of 64 tokens a step, in the arithmetic of commit and decode
// (state_fragment.h), so states have the bits of token-by-token decoding. It writes S before each group to a scratch of
// 64 KB per (group, kv head) at d = 128, which the groups read. Bytes per token and layer at 32 heads: q, k, v, out 64
// KB; scratch 32 KB written and read.
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/prefill_group.h"
#include "kernels/cuda/state_fragment.h"

namespace linspec::cuda {
namespace {

// Grid (slices of columns, kv heads, tasks): walks the groups with a slice of S in registers, writes S before each
// group to the scratch and the last S to the state. Keys and values travel two groups ahead.
constexpr int kStages = 3;
template <int kDim>
constexpr int kSlice = 4096 / kDim;  // columns: 16 elements of S a thread

template <int kDim>
struct ScanStage {
  static constexpr int kValue = kSlice<kDim> + 8;
  float keys[kGroup * (kDim + 8)], values[kGroup * kValue];
};

template <int kDim, typename T>
__device__ __forceinline__ void LoadGroup(const Chain<T>& chain, int first, int column, ScanStage<kDim>& stage) {
  const int group = chain.p.layer.group_size, thread = static_cast<int>(threadIdx.x), begin = chain.phase - first;
  constexpr int kColumns = kDim / 4, kOwn = kSlice<kDim> / 4;
  const int key_head = chain.p.layer.num_heads + chain.kv_head;
  int c = thread % kColumns * 4;
  const auto copy = [&](float* to, const T* slot, const float* row, int token) {
    if (token < begin) {
      CopyElements(to, slot + token * kDim);
    } else {
      CopyAsync16(to, row + token * chain.RowStride(kDim));
    }
  };
  const T* slot = chain.Ring(0, 0, kDim) + c;
  const float* row = chain.Row(-begin, key_head, kDim) + c;
#pragma unroll 4
  for (int token = thread / kColumns; token < group; token += kThreads / kColumns) {
    copy(stage.keys + token * (kDim + 8) + c, slot, row, token);
  }
  c = thread % kOwn * 4;
  slot = chain.Ring(0, 1, kDim) + column + c;
  row = chain.Row(-begin, key_head + chain.p.layer.num_kv_heads, kDim) + column + c;
#pragma unroll 2
  for (int token = thread / kOwn; token < group; token += kThreads / kOwn) {
    copy(stage.values + token * stage.kValue + c, slot, row, token);
  }
}

template <int kDim, typename T>
__global__ void __launch_bounds__(kThreads) ScanKernel(const AttentionParams p) {
  extern __shared__ __align__(16) float shared[];
  auto* stages = reinterpret_cast<ScanStage<kDim>*>(shared);
  const Task task = p.tasks[blockIdx.z];
  const int groups = Groups(task, p.layer.group_size), column = static_cast<int>(blockIdx.x) * kSlice<kDim>;
  if (groups == 0) return;
  const Chain<T> chain(p, task, static_cast<int>(blockIdx.y));
  const int group = p.layer.group_size, complete = chain.end() / group;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < complete) LoadGroup<kDim>(chain, i * group, column, stages[i]);
    CommitCopies();
  }
  StateFragment<kDim, kSlice<kDim>> s;
  s.Load(chain.Matrix(kDim) + column);
  if (task.length < group) s.Clear();
  const int64_t matrix = int64_t{kDim} * kDim;
  const int first = GroupsBefore(p, static_cast<int>(blockIdx.z));
  float* scratch = p.scratch + (int64_t{first} * p.layer.num_kv_heads + chain.kv_head) * matrix + column;
  const float decay = p.layer.decay != nullptr ? p.layer.decay[chain.kv_head] : 1.0f;
  for (int i = 0; i < groups; ++i) {
#pragma unroll
    for (int step = 0; step < s.kSteps; ++step) s.StoreStep(step, scratch + i * p.layer.num_kv_heads * matrix);
    if (i == complete) break;
    WaitCopies<kStages - 2>();
    __syncthreads();
    if (i + kStages - 1 < complete) {
      LoadGroup<kDim>(chain, (i + kStages - 1) * group, column, stages[(i + kStages - 1) % kStages]);
    }
    CommitCopies();
    const ScanStage<kDim>& stage = stages[i % kStages];
#pragma unroll
    for (int step = 0; step < s.kSteps; ++step) {
      s.Fold(step, decay, stage.keys, kDim + 8, stage.values, stage.kValue, group);
      if constexpr (sizeof(T) == 2) {
        s.RoundStep(step, HeadRoundingKey(p.layer, task.length / group + i, chain.kv_head) + column);
      }
    }
  }
  if (complete == 0) return;
#pragma unroll
  for (int step = 0; step < s.kSteps; ++step) s.StoreStep(step, chain.Matrix(kDim) + column);
}

// The task that group `index` of the call belongs to and the number of groups before it, by one warp; num_tasks: none.
__device__ __forceinline__ void FindTask(const AttentionParams& p, int num_tasks, int index, int* task, int* before) {
  constexpr unsigned kAll = 0xFFFFFFFFu;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int passed = 0;
  for (int first = 0; first < num_tasks; first += 32) {
    const int groups = first + lane < num_tasks ? Groups(p.tasks[first + lane], p.layer.group_size) : 0;
    int end = passed + groups;  // groups up to the lane's task
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(kAll, end - passed, offset);
      if (lane >= offset) end += other;
    }
    const unsigned past = __ballot_sync(kAll, end > index);
    if (past != 0) {
      const int owner = __ffs(static_cast<int>(past)) - 1;
      if (lane == owner) {
        *task = first + lane;
        *before = end - groups;
      }
      return;
    }
    passed = __shfl_sync(kAll, end, 31);
  }
  if (lane == 0) *task = num_tasks;
}

template <int kDim, bool kExact, typename T>
__global__ void __launch_bounds__(kThreads, 2) GroupKernel(const AttentionParams p, int num_tasks) {
  extern __shared__ __align__(16) float memory[];
  __shared__ int found, before;
  const int index = static_cast<int>(blockIdx.y), group = p.layer.group_size;
  if (threadIdx.x < 32) FindTask(p, num_tasks, index, &found, &before);
  __syncthreads();
  if (found == num_tasks) return;
  const Task task = p.tasks[found];
  const int head = static_cast<int>(blockIdx.x), kv_head = head / (p.layer.num_heads / p.layer.num_kv_heads);
  const Chain<T> chain(p, task, kv_head);
  const int first = (index - before) * group;
  OutShared<kDim>& shared = *reinterpret_cast<OutShared<kDim>*>(memory);
  const GroupProgram<kDim, kExact, T> program{p,
                                              chain,
                                              shared,
                                              head,
                                              first,
                                              min(group, chain.end() - first),
                                              max(0, chain.phase - first),
                                              task.length - chain.phase + first > 0 && p.layer.global != Global::kNone};
  float y[program.kBlocks][4][4] = {}, z[program.kBlocks][4][4] = {}, scores[4][4] = {};
  program.LoadQueries();
  program.LoadTaps();
  if (program.folded) {
    program.LoadState(p.scratch + (static_cast<int64_t>(index) * p.layer.num_kv_heads + kv_head) * kDim * kDim);
    CommitCopies();
    WaitCopies<0>();
    __syncthreads();
    program.Multiply(shared.queries, shared.kQuery, shared.state, 0, kDim, z);
    __syncthreads();
  }
  program.Square(z);
  program.LoadKeys();
  program.LoadValues(shared.kLate, kHistory + kGroup);
  CommitCopies();
  WaitCopies<0>();
  __syncthreads();
  program.Score(scores);
  __syncthreads();
  program.LoadValues(0, shared.kLate);
  CommitCopies();
  program.Weigh(scores);
  WaitCopies<0>();
  __syncthreads();
  const int tile = program.Tile();
  program.Multiply(shared.y.weights, shared.kWeight, shared.y.values, tile < kHistory ? 0 : kHistory,
                   kHistory + tile + 16, y);
  program.Store(y, z);
}

// Grid (kv heads, tasks): the last rows of a call to their ring slots.
template <int kDim, typename T>
__global__ void __launch_bounds__(kThreads) RingKernel(const AttentionParams p) {
  const Task task = p.tasks[blockIdx.y];
  if (task.slot < 0) return;
  const Chain<T> chain(p, task, static_cast<int>(blockIdx.x));
  const int group = p.layer.group_size, begin = max(0, task.num_rows - group);
  constexpr int kColumns = kDim / 4;
  for (int i = static_cast<int>(threadIdx.x); i < (task.num_rows - begin) * 2 * kColumns; i += kThreads) {
    const int row = begin + i / (2 * kColumns), value = i / kColumns % 2, c = i % kColumns * 4;
    const int head = p.layer.num_heads + value * p.layer.num_kv_heads + chain.kv_head;
    StoreElements(chain.Ring((chain.phase + row) % group, value, kDim) + c, Load4(chain.Row(row, head, kDim) + c));
  }
}

template <int kDim, typename T>
void Launch(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  constexpr int kScanBytes = kStages * sizeof(ScanStage<kDim>), kOutBytes = sizeof(OutShared<kDim>);
  const auto scan_kernel = ScanKernel<kDim, T>;
  const auto group_kernel = p.exact_prefill ? GroupKernel<kDim, true, T> : GroupKernel<kDim, false, T>;
  cudaFuncSetAttribute(scan_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kScanBytes);
  cudaFuncSetAttribute(group_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kOutBytes);
  scan_kernel<<<dim3(kDim / kSlice<kDim>, p.layer.num_kv_heads, num_tasks), kThreads, kScanBytes, stream>>>(p);
  group_kernel<<<dim3(p.layer.num_heads, p.num_groups), kThreads, kOutBytes, stream>>>(p, num_tasks);
  RingKernel<kDim, T><<<dim3(p.layer.num_kv_heads, num_tasks), kThreads, 0, stream>>>(p);
}

}  // namespace

void LaunchPrefillTiles(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  const auto launch = p.states.bf16 ? (p.layer.head_dim == 128 ? Launch<128, uint16_t> : Launch<64, uint16_t>)
                                    : (p.layer.head_dim == 128 ? Launch<128, float> : Launch<64, float>);
  launch(p, num_tasks, stream);
}

}  // namespace linspec::cuda
