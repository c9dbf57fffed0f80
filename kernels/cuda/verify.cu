// tree_verify on tensor cores: a persistent grid over items (request, kv head, tile of 8 rows), two blocks of 8 warps a
// multiprocessor. S of an item lives in registers (held_state.h), its window in shared memory (verify_item.h,
// window_tile.h).
//
// The warps meet twice an item: q S and the scores of all rows are on tensor cores and spread over the warps; then a
// warp does a row alone, from its weights to its output. What has been used up is asked for again: S after q S, in four
// parts, since loads past what a multiprocessor can have outstanding hold up all reads of shared memory; keys and
// queries, then values, by one warp each that waits for the others at a barrier of its own. So loads are under way all
// the time. A block starts while the kernel before it runs: S, rings and tasks are older than that.
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

constexpr int kMaxRawTasks = 2;  // of VerifyTakesRawRows

// Warps with a task beside their rows, which are the last ones of a tile: the first to have none.
constexpr int kKeyWarp = 0, kValueWarp = 1, kItemWarp = 2;

// Shared memory, in floats. Where values and taps begin depends on the call.
template <int kDim, int kRows, typename T>
struct Layout {
  using Tile = WindowTile<kDim, kRows, T>;
  static constexpr int kMasks = 0, kQueries = kMasks + 2 * kMaxNodes, kState = kQueries + kRows * Tile::kQueryStride;
  static constexpr int kLocal = kState + HeldState<kDim, T>::kParts * kRows * kDim;  // after q S, by parts of the rows
  static constexpr int kGrouped = kLocal + kRows * Tile::kCapacity, kKeys = kGrouped + kRows * Tile::kCapacity;

  __host__ __device__ static int Values(const VerifyWork& work) { return kKeys + WindowSize(work); }
  __host__ __device__ static int Taps(const VerifyWork& work) { return kKeys + 2 * WindowSize(work); }
  __host__ static int Size(const VerifyWork& work, const LayerParams& layer) {
    return Taps(work) + layer.num_heads / layer.num_kv_heads * layer.conv_kernel;
  }

 private:
  __host__ __device__ static int WindowSize(const VerifyWork& work) {
    return work.tokens * Tile::kStride * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(float));
  }
};

// What a block shares about its items; round r is in items[r % 3]. Barriers of a round: what has landed, and what all
// threads have used up. Every thread arrives for itself: one arrival a warp, after __syncwarp, is as good in the memory
// model and no faster, but racecheck orders only what the arriving thread did itself.
template <int kRows>
struct Schedule {
  Item items[3];
  RowInfo rows[3][kRows];
  CopyBarrier keys, values, used_keys, used_values;

  __device__ __forceinline__ void Make() {
    keys.Make(1 + 32);
    values.Make(1 + 32);
    used_keys.Make(kThreads);
    used_values.Make(kThreads);
  }
};

template <int kDim, int kRows, typename T, bool kRaw>
struct Verifier {
  using Tile = WindowTile<kDim, kRows, T>;
  using State = HeldState<kDim, T>;
  using At = Layout<kDim, kRows, T>;
  static constexpr int kWarpRows = Tile::kWarpRows, kChannels = Tile::kChannels;
  using Sums = float[kWarpRows][kChannels];

  const AttentionParams& p;
  const VerifyWork& work;
  float* shared;
  Schedule<kRows>& schedule;

  __device__ __forceinline__ static int Lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ static int Warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ __forceinline__ int IndexOf(int round) const {
    return static_cast<int>(blockIdx.x) + round * static_cast<int>(gridDim.x);
  }
  __device__ __forceinline__ bool Has(int round) const { return IndexOf(round) < work.items; }
  __device__ __forceinline__ Task TaskOf(int round) const {
    return p.tasks[IndexOf(round) / (p.layer.num_kv_heads * work.splits)];
  }
  __device__ __forceinline__ const Item& ItemOf(int round) const { return schedule.items[round % 3]; }

  __device__ __forceinline__ WindowFetch<kDim, T, kRaw> FetchOf() const {
    return {p,
            reinterpret_cast<T*>(shared + At::kKeys),
            reinterpret_cast<T*>(shared + At::Values(work)),
            shared + At::kQueries,
            shared + At::Taps(work),
            reinterpret_cast<uint64_t*>(shared + At::kMasks),
            schedule.keys,
            schedule.values};
  }
  __device__ __forceinline__ Tile TileOf(int round) const {
    return {p.layer,
            ItemOf(round),
            schedule.rows[round % 3],
            reinterpret_cast<T*>(shared + At::kKeys),
            reinterpret_cast<T*>(shared + At::Values(work)),
            shared + At::kQueries,
            reinterpret_cast<const uint64_t*>(shared + At::kMasks),
            shared + At::Taps(work),
            shared + At::kLocal,
            shared + At::kGrouped,
            __ffs(p.layer.group_size) - 1};
  }

  // By one warp; the others see it after the next barrier.
  __device__ __forceinline__ void Publish(int round, const Task& task) const {
    const Item item(p, task, IndexOf(round), work, kRows);
    if (Lane() == 0) schedule.items[round % 3] = item;
    if (Lane() < item.rows) {
      const int row = item.first_row + Lane(), node = row / item.heads, head = row - node * item.heads;
      RowInfo& info = schedule.rows[round % 3][Lane()];
      info.node = node;
      info.head = head;
      info.out = (item.out_begin + node) * p.layer.num_heads + item.kv_head * item.heads + head;
    }
  }

  // The loads of the first item; rows of the step only once the kernel before this one has ended.
  __device__ __forceinline__ void Begin(State& s) const {
    const Task task = TaskOf(0);
    s.Load(static_cast<const T*>(Item(p, task, IndexOf(0), work, kRows).state));
    if (Warp() == kItemWarp) Publish(0, task);
    if (threadIdx.x == 0) schedule.Make();
    __syncthreads();
    const Item& item = ItemOf(0);
    const WindowFetch<kDim, T, kRaw> fetch = FetchOf();
    if (Warp() == kKeyWarp) fetch.OldKeys(item, schedule.rows[0]);
    if (Warp() == kValueWarp) fetch.OldValues(item);
    if (Warp() == kItemWarp && Has(1)) Publish(1, TaskOf(1));
    GridWait();
    if (Warp() == kKeyWarp) fetch.NewKeys(item, schedule.rows[0]);
    if (Warp() == kValueWarp) fetch.NewValues(item);
  }

  // By one warp: once the round's keys or values are used up, those of the next.
  __device__ __forceinline__ void FetchKeys(int round) const {
    schedule.used_keys.Wait(round);
    OrderAfterStores();
    FetchOf().OldKeys(ItemOf(round + 1), schedule.rows[(round + 1) % 3]);
    FetchOf().NewKeys(ItemOf(round + 1), schedule.rows[(round + 1) % 3]);
  }
  __device__ __forceinline__ void FetchValues(int round) const {
    schedule.values.Wait(round);  // of an item without rows nobody else has
    schedule.used_values.Wait(round);
    OrderAfterStores();
    FetchOf().OldValues(ItemOf(round + 1));
    FetchOf().NewValues(ItemOf(round + 1));
  }

  // z of a row and the lane's channels, given the grouped sum of its window.
  __device__ __forceinline__ void AddState(const Item& item, int row, int folds, float (&z)[kChannels]) const {
    const float* from = shared + At::kState + row * kDim + Tile::Channel();
    float sum[kChannels] = {};
#pragma unroll
    for (int part = 0; part < State::kParts; ++part) {
      float x[kChannels];
      LoadChannels(from + part * kRows * kDim, x);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sum[i] += x[i];
    }
#pragma unroll 1
    for (; folds > 0 && p.layer.decay != nullptr; --folds) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sum[i] *= p.layer.decay[item.kv_head];
    }
#pragma unroll
    for (int i = 0; i < kChannels; ++i) z[i] += sum[i];
  }

  // Outputs of a row.
  __device__ __forceinline__ void Finish(const RowInfo& row, const float (&local)[kChannels],
                                         const float (&z)[kChannels]) const {
    float scale = p.layer.global_factor;
    if (p.layer.global == Global::kRmsNorm) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) squares = fmaf(z[i], z[i], squares);
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, offset);
      scale = row.gain / sqrtf(squares / static_cast<float>(kDim) + p.layer.global_norm_eps);
    }
    const int64_t at = static_cast<int64_t>(row.out) * kDim + Tile::Channel();
#pragma unroll
    for (int i = 0; i < kChannels; i += 2) {
      float2 y = make_float2(local[i], local[i + 1]);
      if (p.layer.global != Global::kNone) y = make_float2(fmaf(scale, z[i], y.x), fmaf(scale, z[i + 1], y.y));
      if (p.out != nullptr) *reinterpret_cast<float2*>(p.out + at + i) = y;
      const uint32_t pair = RoundToBf16(y.x) | static_cast<uint32_t>(RoundToBf16(y.y)) << 16;
      if (p.out_bf16 != nullptr) *reinterpret_cast<uint32_t*>(p.out_bf16 + at + i) = pair;
    }
  }

  // The warp's rows of an item, from their scores and q S on, and its other task.
  template <bool kMore>
  __device__ __forceinline__ void FinishRows(int round, const T* next, State& s) const {
    const Item& item = ItemOf(round);
    const Tile tile = TileOf(round);
    const bool crosses = item.may_cross(p.layer.group_size), mine = Tile::RowOf(0) < item.rows;
    const bool publishes = kMore && Warp() == kItemWarp && Has(round + 2);
    Task task{};
    if (publishes) task = TaskOf(round + 2);
    int folds[kWarpRows] = {};
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      if (Tile::RowOf(i) >= item.rows) break;
      const auto row = tile.Row(Tile::RowOf(i));
      tile.Weigh(Tile::RowOf(i), row);
      folds[i] = row.group;
    }
    if (publishes) Publish(round + 2, task);
    if constexpr (kMore) {
      schedule.used_keys.Arrive();
      if (Warp() == kKeyWarp) FetchKeys(round);
      s.template LoadStep<2>(next);
    }
    Sums local = {}, z = {};
    if (mine) {
      schedule.values.Wait(round);
      tile.Accumulate(tile.local, local);
      if (crosses) tile.Accumulate(tile.grouped, z);
    }
    if constexpr (kMore) {
      s.template LoadStep<3>(next);
      schedule.used_values.Arrive();
      if (Warp() == kValueWarp) FetchValues(round);
    }
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      if (Tile::RowOf(i) >= item.rows) break;
      if (item.reads_state) AddState(item, Tile::RowOf(i), folds[i], z[i]);
      Finish(schedule.rows[round % 3][Tile::RowOf(i)], local[i], z[i]);
    }
  }

  // kMore: another round follows.
  template <bool kMore>
  __device__ __forceinline__ void Round(int round, State& s) const {
    const Item& item = ItemOf(round);
    const Tile tile = TileOf(round);
    Vec4 y[(kRows + 7) / 8 * 2];
    schedule.keys.Wait(round);
    s.template Multiply<kRows>(tile.queries, tile.kQueryStride, y);
    __syncthreads();  // no warp reads scores and q S of the round before any more
    const T* next = kMore ? static_cast<const T*>(ItemOf(round + 1).state) : nullptr;
    if constexpr (kMore) s.template LoadStep<0>(next);
    if (item.reads_state) State::template Store<kRows>(y, shared + At::kState);
    if (item.rows > 0) tile.Score();
    __syncthreads();
    if constexpr (kMore) s.template LoadStep<1>(next);
    FinishRows<kMore>(round, next, s);
  }
};

template <int kDim, int kRows, typename T, bool kRaw>
__global__ void __launch_bounds__(kThreads, kBlocks(kRows))
    VerifyTileKernel(const AttentionParams p, const VerifyWork work) {
  extern __shared__ __align__(16) float shared[];
  __shared__ __align__(16) Schedule<kRows> schedule;
  GridLaunchDependents();
  const Verifier<kDim, kRows, T, kRaw> program{p, work, shared, schedule};
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
  return Layout<kDim, kRows, T>::Size(WorkOf(p, 1, kRows), p.layer) * static_cast<int>(sizeof(float));
}

// Blocks of a multiprocessor.
template <int kDim, int kRows, typename T>
int Resident(const AttentionParams& p) {
  constexpr int kSystemBytes = 1024;  // of each block
  const int bytes = SharedBytes<kDim, kRows, T>(p) + static_cast<int>(sizeof(Schedule<kRows>)) + kSystemBytes;
  return std::clamp(CurrentDevice().shared_per_processor / bytes, 1, kBlocks(kRows));
}

template <int kDim, int kRows, typename T, bool kRaw = false>
void LaunchTiles(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  const VerifyWork work = WorkOf(p, num_tasks, kRows);
  const int bytes = SharedBytes<kDim, kRows, T>(p), resident = CurrentDevice().processors * Resident<kDim, kRows, T>(p);
  const auto kernel = VerifyTileKernel<kDim, kRows, T, kRaw>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  LaunchOverlapped(kernel, dim3(std::min(work.items, resident)), dim3(kThreads), bytes, stream, 1, p, work);
}

template <int kDim, typename T>
void LaunchVerifyOf(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  if (p.raw.angles != nullptr) return LaunchTiles<kDim, 1, T, true>(p, num_tasks, stream);
  const int nodes = p.last_rows > 0 ? p.last_rows : p.max_rows;
  if (nodes * p.layer.num_heads == p.layer.num_kv_heads) return LaunchTiles<kDim, 1, T>(p, num_tasks, stream);
  if (Resident<kDim, kTreeRows, T>(p) > 1) return LaunchTiles<kDim, kTreeRows, T>(p, num_tasks, stream);
  LaunchTiles<kDim, kLargeTreeRows, T>(p, num_tasks, stream);
}

}  // namespace

bool VerifyTakesRawRows(const LayerParams& layer, int num_tasks, int max_rows) {
  // Where it pays: with several items a block, S and a row's turning would share the registers.
  return num_tasks <= kMaxRawTasks && max_rows == 1 && layer.num_heads == layer.num_kv_heads && HasTiles(layer);
}

void LaunchVerifyTiles(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  const auto launch = p.states.bf16
                          ? (p.layer.head_dim == 128 ? LaunchVerifyOf<128, uint16_t> : LaunchVerifyOf<64, uint16_t>)
                          : (p.layer.head_dim == 128 ? LaunchVerifyOf<128, float> : LaunchVerifyOf<64, float>);
  launch(p, num_tasks, stream);
}

}  // namespace linspec::cuda
