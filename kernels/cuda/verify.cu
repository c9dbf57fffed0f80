// tree_verify on tensor cores: a persistent grid over items (request, kv head, tile of 8 rows), two blocks of 256
// threads a multiprocessor. S of an item lives in registers (held_state.h), its window in shared memory
// (verify_item.h, window_tile.h).
//
// An item is two phases with a barrier after each, and what a phase has used up is asked for again at once: q S and the
// weights (then S, keys and queries of the next item travel), then the weighted values (then its values). So loads are
// under way all the time, and a block waits for memory only. A block starts while the kernel before it runs: S, rings
// and tasks are older than that.
//
// Floor per request and head at d = 128, fp32: S 64 KB, ring 2 * 0.5 KB * (L % G, 31 values at least), a row 1.5 KB in
// and 0.5 KB out. Reached: docs/cuda_attention.md.
#include <algorithm>

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/held_state.h"
#include "kernels/cuda/pdl.h"
#include "kernels/cuda/window_tile.h"

namespace linspec::cuda {
namespace {

// Rows of an item: 1; 8, the columns of the tensor cores' B operand; or 16 where two blocks have no room for the window
// of a large tree, and one has registers to spare.
constexpr int kTreeRows = 8, kLargeTreeRows = 16;
constexpr int kBlocks(int rows) { return rows == kLargeTreeRows ? 1 : 2; }  // of a multiprocessor

// Shared memory, in floats.
template <int kDim, int kRows, typename T>
struct Layout {
  using Tile = WindowTile<kDim, kRows, T>;
  int tokens, taps_size;
  __host__ __device__ Layout(const VerifyWork& work, const LayerParams& layer)
      : tokens(work.tokens), taps_size((layer.num_heads / layer.num_kv_heads * layer.conv_kernel + 3) / 4 * 4) {}
  __host__ __device__ int Masks() const { return 0; }
  __host__ __device__ int Taps() const { return 2 * kMaxNodes; }
  __host__ __device__ int Queries() const { return Taps() + taps_size; }
  __host__ __device__ int State() const { return Queries() + kRows * Tile::kQueryStride; }  // q S, by parts of the rows
  __host__ __device__ int Local() const { return State() + HeldState<kDim, T>::kParts * kRows * kDim; }
  __host__ __device__ int Grouped() const { return Local() + tokens * kRows; }
  __host__ __device__ int Keys() const { return Grouped() + tokens * kRows; }
  __host__ __device__ int Values() const { return Keys() + WindowSize(); }
  __host__ __device__ int Size() const { return Values() + WindowSize(); }

 private:
  __host__ __device__ int WindowSize() const { return tokens * Tile::kStride * sizeof(T) / sizeof(float); }
};

// What a block shares about its items; round r is in items[r % 3] and came from tasks[r % 4].
template <int kRows>
struct Schedule {
  Task tasks[4];
  Item items[3];
  RowInfo rows[3][kRows];
  CopyBarrier keys, values;
  int folds[kRows];
  float squares[kRows][kMaxHeadDim / 32];  // of z, by the warps that share a row
};

template <int kDim, int kRows, typename T>
struct Verifier {
  using Tile = WindowTile<kDim, kRows, T>;
  static constexpr int kThreadRows = Tile::kThreadRows;

  const AttentionParams& p;
  const VerifyWork& work;
  Layout<kDim, kRows, T> layout;
  float* shared;
  Schedule<kRows>& schedule;

  __device__ __forceinline__ static int Warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ __forceinline__ static bool Fetches() { return Warp() == kThreads / 32 - 1; }  // it scores the least
  __device__ __forceinline__ static bool Sums() { return kRows > 1 || Warp() < Tile::kChannelWarps; }
  __device__ __forceinline__ int IndexOf(int round) const {
    return static_cast<int>(blockIdx.x) + round * static_cast<int>(gridDim.x);
  }
  __device__ __forceinline__ bool Has(int round) const { return IndexOf(round) < work.items; }
  __device__ __forceinline__ const Task* TaskOf(int round) const {
    return p.tasks + IndexOf(round) / (p.layer.num_kv_heads * work.splits);
  }
  __device__ __forceinline__ const Item& ItemOf(int round) const { return schedule.items[round % 3]; }

  __device__ __forceinline__ WindowFetch<kDim, T> Fetch() const {
    return {p,
            reinterpret_cast<T*>(shared + layout.Keys()),
            reinterpret_cast<T*>(shared + layout.Values()),
            shared + layout.Queries(),
            shared + layout.Taps(),
            reinterpret_cast<uint64_t*>(shared + layout.Masks()),
            schedule.keys,
            schedule.values};
  }
  __device__ __forceinline__ Tile TileOf(int round) const {
    return {p.layer,
            ItemOf(round),
            schedule.rows[round % 3],
            reinterpret_cast<T*>(shared + layout.Keys()),
            reinterpret_cast<T*>(shared + layout.Values()),
            shared + layout.Queries(),
            reinterpret_cast<const uint64_t*>(shared + layout.Masks()),
            shared + layout.Taps(),
            shared + layout.Local(),
            shared + layout.Grouped(),
            schedule.folds,
            __ffs(p.layer.group_size) - 1};
  }

  // By one warp: the item of a round, whose task has landed. The gains land with the copies of tasks.
  __device__ __forceinline__ void Prepare(int round) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (!Has(round)) return;
    const Item item(p, schedule.tasks[round % 4], IndexOf(round), work, kRows);
    if (lane == 0) schedule.items[round % 3] = item;
    if (lane < item.rows) {
      const int row = item.first_row + lane, node = row / item.heads, head = row - node * item.heads;
      RowInfo& info = schedule.rows[round % 3][lane];
      const int query_head = item.kv_head * item.heads + head;
      info.node = node;
      info.head = head;
      info.out = (item.out_begin + node) * p.layer.num_heads + query_head;
      if (p.layer.global == Global::kRmsNorm) CopyAsync4(&info.gain, p.layer.global_gain + query_head);
    }
    __syncwarp();
  }
  __device__ __forceinline__ void FetchTask(int round) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane < 2 && Has(round)) {
      CopyAsync16(reinterpret_cast<float*>(&schedule.tasks[round % 4]) + 4 * lane,
                  reinterpret_cast<const float*>(TaskOf(round)) + 4 * lane);
    }
  }

  // The loads of the first item; rows of the step only once the kernel before this one has ended.
  __device__ __forceinline__ void Begin(HeldState<kDim, T>& s) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) {
      schedule.keys.Make(1 + 32);
      schedule.values.Make(1);
    }
    if (thread < 6 && Has(thread / 2)) {
      Store4(reinterpret_cast<float*>(&schedule.tasks[thread / 2]) + thread % 2 * 4,
             Load4(reinterpret_cast<const float*>(TaskOf(thread / 2)) + thread % 2 * 4));
    }
    __syncthreads();
    s.Load(static_cast<const T*>(Item(p, schedule.tasks[0], IndexOf(0), work, kRows).state));
    const WindowFetch<kDim, T> fetch = Fetch();
    if (Fetches()) {
      Prepare(0);
      fetch.ExpectKeys(ItemOf(0));
      fetch.ExpectValues(ItemOf(0));
      fetch.OldKeys(ItemOf(0));
      fetch.OldValues(ItemOf(0));
      Prepare(1);
      WaitAllCopies();  // gains
    }
    GridWait();
    if (Fetches()) {
      OrderAfterStores();
      fetch.NewKeys(ItemOf(0), schedule.rows[0]);
      fetch.NewValues(ItemOf(0));
    }
    __syncthreads();  // items
  }

  // Between the phases, by one warp: keys and queries of the next item, and what later ones are.
  __device__ __forceinline__ void FetchNext(int round) const {
    WaitAllCopies();  // the task of round + 2, the gains of round + 1
    __syncwarp();
    const WindowFetch<kDim, T> fetch = Fetch();
    const Item& next = ItemOf(round + 1);
    fetch.ExpectKeys(next);
    fetch.NewKeys(next, schedule.rows[(round + 1) % 3]);
    fetch.OldKeys(next);
    Prepare(round + 2);
    FetchTask(round + 3);
  }
  __device__ __forceinline__ void FetchNextValues(int round) const {
    const WindowFetch<kDim, T> fetch = Fetch();
    const Item& next = ItemOf(round + 1);
    fetch.ExpectValues(next);
    fetch.OldValues(next);
    fetch.NewValues(next);
  }

  // z of the thread's rows and channel, given the grouped sum of its window, and its squares.
  __device__ __forceinline__ void AddState(const Item& item, float (&z)[kThreadRows]) const {
    const float* from = shared + layout.State() + Tile::FirstRow() * kDim + Tile::Channel();
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int part = 0; part < HeldState<kDim, T>::kParts; ++part) sum += from[(part * kRows + i) * kDim];
      if (item.may_cross(p.layer.group_size) && p.layer.decay != nullptr) {
#pragma unroll 1
        for (int fold = schedule.folds[Tile::FirstRow() + i]; fold > 0; --fold) sum *= p.layer.decay[item.kv_head];
      }
      z[i] += sum;
    }
  }
  __device__ __forceinline__ void Square(const float (&z)[kThreadRows]) const {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      float squares = z[i] * z[i];
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, offset);
      if (threadIdx.x % 32 == 0) schedule.squares[Tile::FirstRow() + i][Warp() % Tile::kChannelWarps] = squares;
    }
  }

  // y of the thread's rows and channel.
  __device__ __forceinline__ void Finish(int round, const float (&local)[kThreadRows],
                                         const float (&z)[kThreadRows]) const {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const int row = Tile::FirstRow() + i;
      if (row >= ItemOf(round).rows) return;
      const RowInfo& info = schedule.rows[round % 3][row];
      float scale = p.layer.global_factor;
      if (p.layer.global == Global::kRmsNorm) {
        float squares = 0.0f;
#pragma unroll
        for (int warp = 0; warp < Tile::kChannelWarps; ++warp) squares += schedule.squares[row][warp];
        scale = info.gain / sqrtf(squares / static_cast<float>(kDim) + p.layer.global_norm_eps);
      }
      const int64_t at = static_cast<int64_t>(info.out) * kDim + Tile::Channel();
      const float y = p.layer.global == Global::kNone ? local[i] : fmaf(scale, z[i], local[i]);
      if (p.out != nullptr) p.out[at] = y;
      if (p.out_bf16 != nullptr) p.out_bf16[at] = RoundToBf16(y);
    }
  }

  // kMore: another round follows.
  template <bool kMore>
  __device__ __forceinline__ void Round(int round, HeldState<kDim, T>& s) const {
    const Item& item = ItemOf(round);
    const Tile tile = TileOf(round);
    PreciseSums scores[Tile::kTiles];
    schedule.keys.Wait(round);
    if (item.reads_state) s.template Multiply<kRows>(tile.queries, tile.kQueryStride, shared + layout.State());
    if (item.rows > 0) tile.Score(scores);
    if constexpr (kMore) s.Load(static_cast<const T*>(ItemOf(round + 1).state));
    if (item.rows > 0) tile.Weigh(scores);
    __syncthreads();
    if constexpr (kMore) {
      if (Fetches()) FetchNext(round);
    }
    schedule.values.Wait(round);
    float local[kThreadRows] = {}, z[kThreadRows] = {};
    if (Sums() && item.rows > 0) {
      tile.Accumulate(tile.local, local);
      if (item.may_cross(p.layer.group_size)) tile.Accumulate(tile.grouped, z);
      if (item.reads_state) AddState(item, z);
      if (p.layer.global == Global::kRmsNorm) Square(z);
    }
    __syncthreads();
    if constexpr (kMore) {
      if (Fetches()) FetchNextValues(round);
    }
    if (Sums()) Finish(round, local, z);
  }
};

template <int kDim, int kRows, typename T>
__global__ void __launch_bounds__(kThreads, kBlocks(kRows))
    VerifyTileKernel(const AttentionParams p, const VerifyWork work) {
  extern __shared__ __align__(16) float shared[];
  __shared__ __align__(16) Schedule<kRows> schedule;
  GridLaunchDependents();
  const Verifier<kDim, kRows, T> program{p, work, Layout<kDim, kRows, T>(work, p.layer), shared, schedule};
  HeldState<kDim, T> s;
  program.Begin(s);
  int round = 0;
#pragma unroll 1
  for (; program.Has(round + 1); ++round) program.template Round<true>(round, s);
  program.template Round<false>(round, s);
}

VerifyWork WorkOf(const AttentionParams& p, int num_tasks, int rows) {
  const int heads = p.layer.num_heads / p.layer.num_kv_heads;
  const int nodes = p.max_rows > 0 && p.max_rows < kMaxNodes ? p.max_rows : kMaxNodes;
  VerifyWork work;
  work.tokens = (p.layer.group_size + nodes + 3) / 4 * 4;  // rows of weights stay aligned to 16 bytes
  const int queries = p.last_rows > 0 && p.last_rows < nodes ? p.last_rows : nodes;
  work.splits = (queries * heads + rows - 1) / rows;
  work.items = num_tasks * p.layer.num_kv_heads * work.splits;
  return work;
}

template <int kDim, int kRows, typename T>
int SharedBytes(const AttentionParams& p) {
  return Layout<kDim, kRows, T>(WorkOf(p, 1, kRows), p.layer).Size() * static_cast<int>(sizeof(float));
}

// Blocks of a multiprocessor.
template <int kDim, int kRows, typename T>
int Resident(const AttentionParams& p) {
  constexpr int kSystemBytes = 1024;  // of each block
  const int bytes = SharedBytes<kDim, kRows, T>(p) + static_cast<int>(sizeof(Schedule<kRows>)) + kSystemBytes;
  return std::clamp(CurrentDevice().shared_per_processor / bytes, 1, kBlocks(kRows));
}

template <int kDim, int kRows, typename T>
void LaunchTiles(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  const VerifyWork work = WorkOf(p, num_tasks, kRows);
  const int bytes = SharedBytes<kDim, kRows, T>(p), resident = CurrentDevice().processors * Resident<kDim, kRows, T>(p);
  const auto kernel = VerifyTileKernel<kDim, kRows, T>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  LaunchOverlapped(kernel, dim3(std::min(work.items, resident)), dim3(kThreads), bytes, stream, 1, p, work);
}

template <int kDim, typename T>
void LaunchVerifyOf(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  const int nodes = p.last_rows > 0 ? p.last_rows : p.max_rows;
  if (nodes * p.layer.num_heads == p.layer.num_kv_heads) return LaunchTiles<kDim, 1, T>(p, num_tasks, stream);
  if (Resident<kDim, kTreeRows, T>(p) > 1) return LaunchTiles<kDim, kTreeRows, T>(p, num_tasks, stream);
  LaunchTiles<kDim, kLargeTreeRows, T>(p, num_tasks, stream);
}

}  // namespace

void LaunchVerifyTiles(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  const auto launch = p.states.bf16
                          ? (p.layer.head_dim == 128 ? LaunchVerifyOf<128, uint16_t> : LaunchVerifyOf<64, uint16_t>)
                          : (p.layer.head_dim == 128 ? LaunchVerifyOf<128, float> : LaunchVerifyOf<64, float>);
  launch(p, num_tasks, stream);
}

}  // namespace linspec::cuda
