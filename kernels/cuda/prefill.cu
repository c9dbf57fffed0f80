// Prefill by groups: S before every group first, then all groups at once.
#include <type_traits>

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
  __device__ __forceinline__ int64_t RowStride(int d) const {
    return static_cast<int64_t>(p.layer.num_heads + 2 * p.layer.num_kv_heads) * d;
  }
  __device__ __forceinline__ const float* Row(int row, int head, int d) const {
    return p.qkv + static_cast<int64_t>(task.row_begin + row) * RowStride(d) + head * d;
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
  const int group = chain.p.layer.group_size, thread = static_cast<int>(threadIdx.x), begin = chain.phase - first;
  constexpr int kColumns = kDim / 4, kOwn = kSlice<kDim> / 4;
  const int key_head = chain.p.layer.num_heads + chain.kv_head;
  int c = thread % kColumns * 4;
  const float *slot = chain.Ring(0, 0, kDim) + c, *row = chain.Row(-begin, key_head, kDim) + c;
#pragma unroll 4
  for (int token = thread / kColumns; token < group; token += kThreads / kColumns) {
    CopyAsync16(stage.keys + token * (kDim + 8) + c,
                token < begin ? slot + token * kDim : row + token * chain.RowStride(kDim));
  }
  c = thread % kOwn * 4;
  slot = chain.Ring(0, 1, kDim) + column + c;
  row = chain.Row(-begin, key_head + chain.p.layer.num_kv_heads, kDim) + column + c;
#pragma unroll 2
  for (int token = thread / kOwn; token < group; token += kThreads / kOwn) {
    CopyAsync16(stage.values + token * stage.kValue + c,
                token < begin ? slot + token * kDim : row + token * chain.RowStride(kDim));
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
      LoadGroup(chain, (i + kStages - 1) * group, column, stages[(i + kStages - 1) % kStages]);
    }
    CommitCopies();
    const ScanStage<kDim>& stage = stages[i % kStages];
#pragma unroll
    for (int step = 0; step < s.kSteps; ++step) {
      s.Fold(step, decay, stage.keys, kDim + 8, stage.values, stage.kValue, group);
    }
  }
  if (complete == 0) return;
#pragma unroll
  for (int step = 0; step < s.kSteps; ++step) s.StoreStep(step, chain.Matrix(kDim) + column);
}

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

template <int kDim, bool kExact>
struct GroupProgram {
  static constexpr int kColumns = kDim / 4, kBlocks = kDim / 64;  // blocks of 32 columns a warp
  using Shared = OutShared<kDim>;
  using A = std::conditional_t<kExact, Split<4>, Rounded<4>>;
  using B = std::conditional_t<kExact, Split<2>, Rounded<2>>;

  const AttentionParams& p;
  const Chain& chain;
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
    const float *row = chain.Row(first - chain.phase, p.layer.num_heads + chain.kv_head, kDim) + Column(),
                *slot = chain.Ring(0, 0, kDim) + Column();
    float* to = shared.keys + Column();
#pragma unroll 4
    for (int i = FirstRow(); i < kGroup; i += kRowsAtOnce) {
      if (i < tokens) CopyAsync16(to + i * Shared::kQuery, i < begin ? slot + i * kDim : row + i * chain.RowStride(kDim));
    }
  }
  // Rows [from, to) of the values: the history, then the group. Zeros where there is no token.
  __device__ __forceinline__ void LoadValues(int from, int to) const {
    const float* row =
        chain.Row(first - chain.phase, p.layer.num_heads + p.layer.num_kv_heads + chain.kv_head, kDim) + Column();
    const float* slot = chain.Ring(0, 1, kDim) + Column();
#pragma unroll 2
    for (int i = from + FirstRow(); i < to; i += kRowsAtOnce) {
      const int token = i - kHistory, at = first + token;
      float* target = shared.y.values + i * Shared::kValue + Column();
      if (token >= tokens || !chain.Has(at)) {
        Store4(target, {0, 0, 0, 0});
      } else if (at >= chain.phase) {
        CopyAsync16(target, row + token * chain.RowStride(kDim));
      } else {
        CopyAsync16(target, slot + (at < 0 ? at + p.layer.group_size : at) * kDim);
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
        const Vec4 y0 = Load4(y + k * Shared::kValue + 32 * block), y1 = Load4(y + (k + 4) * Shared::kValue + 32 * block);
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

template <int kDim, bool kExact>
__global__ void __launch_bounds__(kThreads, 2) GroupKernel(const AttentionParams p, int num_tasks) {
  extern __shared__ __align__(16) float memory[];
  __shared__ int found, before;
  const int index = static_cast<int>(blockIdx.y), group = p.layer.group_size;
  if (threadIdx.x < 32) FindTask(p, num_tasks, index, &found, &before);
  __syncthreads();
  if (found == num_tasks) return;
  const Task task = p.tasks[found];
  const int head = static_cast<int>(blockIdx.x), kv_head = head / (p.layer.num_heads / p.layer.num_kv_heads);
  const Chain chain(p, task, kv_head);
  const int first = (index - before) * group;
  OutShared<kDim>& shared = *reinterpret_cast<OutShared<kDim>*>(memory);
  const GroupProgram<kDim, kExact> program{p,
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
  const auto group_kernel = p.exact_prefill ? GroupKernel<kDim, true> : GroupKernel<kDim, false>;
  cudaFuncSetAttribute(group_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kOutBytes);
  ScanKernel<kDim><<<dim3(kDim / kSlice<kDim>, p.layer.num_kv_heads, num_tasks), kThreads, kScanBytes, stream>>>(p);
  group_kernel<<<dim3(p.layer.num_heads, p.num_groups), kThreads, kOutBytes, stream>>>(p, num_tasks);
  RingKernel<kDim><<<dim3(p.layer.num_kv_heads, num_tasks), kThreads, 0, stream>>>(p);
}

}  // namespace

void LaunchPrefillTiles(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  p.layer.head_dim == 128 ? Launch<128>(p, num_tasks, stream) : Launch<64>(p, num_tasks, stream);
}

}  // namespace linspec::cuda
