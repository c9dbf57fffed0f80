// Prefill by groups: S before every group first, then all groups at once.
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/state_fragment.h"

namespace linspec::cuda {
namespace {

constexpr int kGroup = 64, kHistory = 32;  // largest group; values before it that taps reach

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

// The tokens of a call: ring slots first, then its rows. Index 0 is the first position of the open group.
struct Chain {
  const AttentionParams& p;
  const Task& task;
  float* state;
  int kv_head, phase;

  __device__ __forceinline__ Chain(const AttentionParams& params, const Task& t, int head)
      : p(params), task(t), kv_head(head), phase(static_cast<int>(t.length % params.layer.group_size)) {
    state = p.states.base + t.slot * p.states.floats_per_slot + p.states.layer_offset;
  }
  __device__ __forceinline__ int end() const { return phase + task.num_rows; }
  // Zero: before the start of the sequence, or no longer in the ring and out of every tap's reach.
  __device__ __forceinline__ bool Has(int token) const {
    return token < end() && token >= phase - p.layer.group_size && task.length - phase + token >= 0;
  }
  __device__ __forceinline__ float* Matrix(int d) const { return state + static_cast<int64_t>(kv_head) * d * d; }
  __device__ __forceinline__ float* Ring(int slot, int value, int d) const {
    const int64_t heads = p.layer.num_kv_heads, group = p.layer.group_size;
    return state + heads * d * d + ((value * heads + kv_head) * group + slot) * d;
  }
  __device__ __forceinline__ const float* Row(int row, int head, int d) const {
    return p.qkv + (static_cast<int64_t>(task.row_begin + row) * (p.layer.num_heads + 2 * p.layer.num_kv_heads) + head) * d;
  }
  __device__ __forceinline__ const float* Token(int token, int value, int d) const {
    if (token < phase) return Ring(token < 0 ? token + p.layer.group_size : token, value, d);
    return Row(token - phase, p.layer.num_heads + value * p.layer.num_kv_heads + kv_head, d);
  }
};

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

template <int kDim>
__device__ __forceinline__ void LoadGroup(const Chain& chain, int first, int column, ScanStage<kDim>& stage) {
  const int group = chain.p.layer.group_size;
  constexpr int kColumns = kDim / 4;
  for (int i = static_cast<int>(threadIdx.x); i < group * kColumns; i += kThreads) {
    const int token = i / kColumns, c = i % kColumns * 4;
    CopyAsync16(stage.keys + token * (kDim + 8) + c, chain.Token(first + token, 0, kDim) + c);
  }
  constexpr int kOwn = kSlice<kDim> / 4;
  for (int i = static_cast<int>(threadIdx.x); i < group * kOwn; i += kThreads) {
    const int token = i / kOwn, c = i % kOwn * 4;
    CopyAsync16(stage.values + token * stage.kValue + c, chain.Token(first + token, 1, kDim) + column + c);
  }
}

template <int kDim>
__global__ void __launch_bounds__(kThreads) ScanKernel(const AttentionParams p) {
  extern __shared__ __align__(16) float shared[];
  auto* stages = reinterpret_cast<ScanStage<kDim>*>(shared);
  const Task task = p.tasks[blockIdx.z];
  const int groups = Groups(task, p.layer.group_size), column = static_cast<int>(blockIdx.x) * kSlice<kDim>;
  if (groups == 0) return;
  const Chain chain(p, task, static_cast<int>(blockIdx.y));
  const int group = p.layer.group_size, complete = chain.end() / group;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < complete) LoadGroup(chain, i * group, column, stages[i]);
    CommitCopies();
  }
  StateFragment<kDim, kSlice<kDim>> s;
  s.Clear();
  if (task.length >= group) s.Load(chain.Matrix(kDim) + column);
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
      LoadGroup(chain, (i + kStages - 1) * group, column, stages[(i + kStages - 1) % kStages]);
    }
    CommitCopies();
    const ScanStage<kDim>& stage = stages[i % kStages];
#pragma unroll
    for (int step = 0; step < s.kSteps; ++step) {
      s.Fold(step, 0, decay, stage.keys, kDim + 8, stage.values, stage.kValue, group);
      s.Fold(step, 1, decay, stage.keys, kDim + 8, stage.values, stage.kValue, group);
    }
  }
  if (complete == 0) return;
#pragma unroll
  for (int step = 0; step < s.kSteps; ++step) s.StoreStep(step, chain.Matrix(kDim) + column);
}

// Grid (query heads, groups): 16 warps, warp w has rows 16 (w % 4) + 0..15 and a quarter w / 4 of keys, then of columns.
constexpr int kOutThreads = 512;

template <int kDim>
struct OutShared {
  static constexpr int kQuery = kDim + 4, kValue = kDim + 8, kWeight = kHistory + kGroup + 4;
  float queries[kGroup * kQuery];
  union {
    float keys[kGroup * kQuery];
    float weights[kGroup * kWeight];  // [row][history, group]
  };
  float values[(kHistory + kGroup) * kValue];
  float state[kDim * kValue];
  float taps[kHistory], squares[4][kGroup];
};

template <int kDim>
struct GroupProgram {
  static constexpr int kTiles = kDim / 32;  // column tiles of 8 a warp
  using Shared = OutShared<kDim>;

  const AttentionParams& p;
  const Chain& chain;
  Shared& shared;
  int head, first, tokens, begin;  // rows [begin, tokens) of the group are rows of the call
  bool folded;

  __device__ __forceinline__ static int Warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ __forceinline__ static int G() { return static_cast<int>(threadIdx.x) % 32 / 4; }
  __device__ __forceinline__ static int C() { return static_cast<int>(threadIdx.x) % 4; }
  __device__ __forceinline__ static int Tile() { return Warp() % 4 * 16; }

  __device__ __forceinline__ void Load(const float* state) const {
    constexpr int kColumns = kDim / 4;
    for (int i = static_cast<int>(threadIdx.x); i < tokens * kColumns; i += kOutThreads) {
      const int token = i / kColumns, c = i % kColumns * 4;
      CopyAsync16(shared.keys + token * Shared::kQuery + c, chain.Token(first + token, 0, kDim) + c);
      if (token < begin) continue;
      CopyAsync16(shared.queries + token * Shared::kQuery + c, chain.Row(first + token - chain.phase, head, kDim) + c);
    }
    CommitCopies();
    for (int i = static_cast<int>(threadIdx.x); i < (kHistory + kGroup) * kColumns; i += kOutThreads) {
      const int token = i / kColumns - kHistory, c = i % kColumns * 4;
      float* to = shared.values + i / kColumns * Shared::kValue + c;
      if (token < tokens && chain.Has(first + token)) {
        CopyAsync16(to, chain.Token(first + token, 1, kDim) + c);
      } else {
        Store4(to, {0, 0, 0, 0});
      }
    }
    for (int i = static_cast<int>(threadIdx.x); folded && i < kDim * kColumns; i += kOutThreads) {
      CopyAsync16(shared.state + i / kColumns * Shared::kValue + i % kColumns * 4, state + i * 4);
    }
    CommitCopies();
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kHistory) {
      shared.taps[thread] =
          thread < p.layer.conv_kernel ? p.layer.conv_taps[head * p.layer.conv_kernel + thread] : 0.0f;
    }
  }

  __device__ __forceinline__ Split<4> A(const float* matrix, int stride, int k) const {
    const float* a = matrix + (Tile() + G()) * stride + k + C();
    return Split<4>({a[0], a[8 * stride], a[4], a[8 * stride + 4]});
  }

  // Scores of 16 rows and 16 keys.
  __device__ __forceinline__ void Score(Accumulators (&sum)[2]) const {
    const int key = Warp() / 4 * 16;
    if (key > Tile()) return;
#pragma unroll 4
    for (int k = 0; k < kDim; k += 8) {
      const Split<4> a = A(shared.queries, Shared::kQuery, k);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float* b = shared.keys + (key + 8 * n + G()) * Shared::kQuery + k + C();
        sum[n].Add(a, Split<2>({b[0], b[4]}));
      }
    }
  }

  __device__ __forceinline__ void Weigh(const Accumulators (&sum)[2]) const {
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < kHistory * kHistory; i += kOutThreads) {
      const int row = i / kHistory, lag = row + kHistory - i % kHistory;
      shared.weights[row * Shared::kWeight + i % kHistory] = lag < kHistory ? shared.taps[lag] : 0.0f;
    }
    if (Warp() / 4 * 16 > Tile()) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = Tile() + G() + i / 2 % 2 * 8, key = Warp() / 4 * 16 + i / 4 * 8 + 2 * C() + i % 2;
      float weight = 0.0f;
      if (key <= row && row < tokens) {
        const float positive = p.layer.local != 0 ? fmaxf(sum[i / 4][i % 4], 0.0f) : 0.0f;
        weight = positive * positive + (row - key < kHistory ? shared.taps[row - key] : 0.0f);
      }
      shared.weights[row * Shared::kWeight + kHistory + key] = weight;
    }
  }

  // sum += A[16 rows][k] * b[k][columns of the warp] over [begin, end).
  __device__ __forceinline__ void Multiply(const float* a, int a_stride, const float* b, int k_begin, int k_end,
                                           Accumulators (&sum)[kTiles]) const {
#pragma unroll 2
    for (int k = k_begin; k < k_end; k += 8) {
      const Split<4> x = A(a, a_stride, k);
      const float* y = b + (k + C()) * Shared::kValue + Warp() / 4 * (kDim / 4) + G();
#pragma unroll
      for (int n = 0; n < kTiles; ++n) sum[n].Add(x, Split<2>({y[8 * n], y[8 * n + 4 * Shared::kValue]}));
    }
  }

  // Scale of z for rows Tile() + G() and + 8.
  __device__ __forceinline__ void Scale(const Accumulators (&z)[kTiles], float (&scale)[2]) const {
    scale[0] = scale[1] = p.layer.global_factor;
    if (p.layer.global != Global::kRmsNorm) return;
    float squares[2] = {};
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i) {
      const float x = z[i / 4][i % 4];
      squares[i / 2 % 2] = fmaf(x, x, squares[i / 2 % 2]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      squares[r] += __shfl_xor_sync(0xFFFFFFFFu, squares[r], 1);
      squares[r] += __shfl_xor_sync(0xFFFFFFFFu, squares[r], 2);
      if (C() == 0) shared.squares[Warp() / 4][Tile() + G() + 8 * r] = squares[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = 0.0f;
      for (const auto& quarter : shared.squares) sum += quarter[Tile() + G() + 8 * r];
      scale[r] = p.layer.global_gain[head] / sqrtf(sum / static_cast<float>(kDim) + p.layer.global_norm_eps);
    }
  }

  __device__ __forceinline__ void Store(const Accumulators (&y)[kTiles], const Accumulators (&z)[kTiles],
                                        const float (&scale)[2]) const {
#pragma unroll
    for (int i = 0; i < kTiles * 2; ++i) {
      const int n = i / 2, r = i % 2, row = Tile() + G() + 8 * r;
      if (row < begin || row >= tokens) continue;
      const int64_t at =
          (static_cast<int64_t>(task_row(row)) * p.layer.num_heads + head) * kDim + Warp() / 4 * (kDim / 4) + 8 * n + 2 * C();
      const float x0 = fmaf(scale[r], z[n][2 * r], y[n][2 * r]), x1 = fmaf(scale[r], z[n][2 * r + 1], y[n][2 * r + 1]);
      if (p.out != nullptr) *reinterpret_cast<float2*>(p.out + at) = make_float2(x0, x1);
      if (p.out_bf16 != nullptr) {
        *reinterpret_cast<uint32_t*>(p.out_bf16 + at) = RoundToBf16(x0) | static_cast<uint32_t>(RoundToBf16(x1)) << 16;
      }
    }
  }
  __device__ __forceinline__ int task_row(int row) const { return chain.task.row_begin + first + row - chain.phase; }
};

template <int kDim>
__global__ void __launch_bounds__(kOutThreads) GroupKernel(const AttentionParams p, int num_tasks) {
  extern __shared__ __align__(16) float shared[];
  __shared__ int found, before;
  const int index = static_cast<int>(blockIdx.y), group = p.layer.group_size;
  if (threadIdx.x == 0) {
    int sum = 0, task = 0;
    for (; task < num_tasks; ++task) {
      const int groups = Groups(p.tasks[task], group);
      if (sum + groups > index) break;
      sum += groups;
    }
    found = task;
    before = sum;
  }
  __syncthreads();
  if (found == num_tasks) return;
  const Task task = p.tasks[found];
  const int head = static_cast<int>(blockIdx.x), kv_head = head / (p.layer.num_heads / p.layer.num_kv_heads);
  const Chain chain(p, task, kv_head);
  const int first = (index - before) * group;
  const GroupProgram<kDim> program{p,
                                   chain,
                                   *reinterpret_cast<OutShared<kDim>*>(shared),
                                   head,
                                   first,
                                   min(group, chain.end() - first),
                                   max(0, chain.phase - first),
                                   task.length - chain.phase + first > 0 && p.layer.global != Global::kNone};
  program.Load(p.scratch + (static_cast<int64_t>(index) * p.layer.num_kv_heads + kv_head) * kDim * kDim);
  WaitCopies<1>();
  __syncthreads();
  Accumulators score[2];
  program.Score(score);
  __syncthreads();
  program.Weigh(score);
  WaitCopies<0>();
  __syncthreads();
  Accumulators y[program.kTiles], z[program.kTiles];
  const int tile = program.Tile();
  program.Multiply(program.shared.weights, program.shared.kWeight, program.shared.values, tile < kHistory ? 0 : kHistory,
                   kHistory + tile + 16, y);
  if (program.folded) program.Multiply(program.shared.queries, program.shared.kQuery, program.shared.state, 0, kDim, z);
  float scale[2];
  program.Scale(z, scale);
  program.Store(y, z, scale);
}

// Grid (kv heads, tasks): the last rows of a call to their ring slots.
template <int kDim>
__global__ void __launch_bounds__(kThreads) RingKernel(const AttentionParams p) {
  const Task task = p.tasks[blockIdx.y];
  if (task.slot < 0) return;
  const Chain chain(p, task, static_cast<int>(blockIdx.x));
  const int group = p.layer.group_size, begin = max(0, task.num_rows - group);
  constexpr int kColumns = kDim / 4;
  for (int i = static_cast<int>(threadIdx.x); i < (task.num_rows - begin) * 2 * kColumns; i += kThreads) {
    const int row = begin + i / (2 * kColumns), value = i / kColumns % 2, c = i % kColumns * 4;
    Store4(chain.Ring((chain.phase + row) % group, value, kDim) + c, Load4(chain.Token(chain.phase + row, value, kDim) + c));
  }
}

template <int kDim>
void Launch(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  constexpr int kScanBytes = kStages * sizeof(ScanStage<kDim>), kOutBytes = sizeof(OutShared<kDim>);
  cudaFuncSetAttribute(ScanKernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kScanBytes);
  cudaFuncSetAttribute(GroupKernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kOutBytes);
  ScanKernel<kDim><<<dim3(kDim / kSlice<kDim>, p.layer.num_kv_heads, num_tasks), kThreads, kScanBytes, stream>>>(p);
  GroupKernel<kDim><<<dim3(p.layer.num_heads, p.num_groups), kOutThreads, kOutBytes, stream>>>(p, num_tasks);
  RingKernel<kDim><<<dim3(p.layer.num_kv_heads, num_tasks), kThreads, 0, stream>>>(p);
}

}  // namespace

void LaunchPrefillTiles(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  p.layer.head_dim == 128 ? Launch<128>(p, num_tasks, stream) : Launch<64>(p, num_tasks, stream);
}

}  // namespace linspec::cuda
