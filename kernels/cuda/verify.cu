// tree_verify on tensor cores: a persistent grid over items (request, kv head, tile of 8 rows), two blocks of 8 warps a
// multiprocessor. S of an item lives in registers (held_state.h), its window in shared memory (verify_item.h,
// window_tile.h).
//
// The warps meet three times an item: when q S and the scores are done, which are spread over the warps, when the
// weights are, a row by one warp, and when their values are summed. What has been used up by then all warps ask for
// again: keys and queries, then values; and S after q S, in four parts, since loads past what a multiprocessor can have
// outstanding hold up all reads of shared memory. So loads are under way all the time. A block starts while the kernel
// before it runs: S, rings and tasks are older than that.
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

constexpr int kLine = 128;  // bytes that the banks hold side by side: windows begin with one

// The warp that finds out what the items of the next rounds are. It is none of WindowFetch's.
constexpr int kItemWarp = 3;

// Shared memory, in floats. Where values and taps begin depends on the call.
template <int kDim, int kRows, typename T>
struct Layout {
  using Tile = WindowTile<kDim, kRows, T>;
  // Masks and taps of two rounds: the next ones arrive while these are in use. kState: q S, by parts of the rows; then
  // z and the local sum of each row in its first two parts. Eight lanes store q S together, pairs two rows apart.
  static constexpr int kStateStride = kRows > 1 ? kDim + 4 : kDim;
  static constexpr int kMasks = 0, kQueries = kMasks + 4 * kMaxNodes, kState = kQueries + kRows * Tile::kQueryStride;
  static constexpr int kLocal = kState + HeldState<kDim, T>::kParts * kRows * kStateStride;
  static constexpr int kGrouped = kLocal + kRows * Tile::kCapacity;
  static constexpr int kKeys = (kGrouped + kRows * Tile::kCapacity + kLine / 4 - 1) / (kLine / 4) * (kLine / 4);

  __host__ __device__ static int Values(const VerifyWork& work) { return kKeys + WindowSize(work); }
  __host__ __device__ static int Taps(const VerifyWork& work) { return kKeys + 2 * WindowSize(work); }
  __host__ static int Size(const VerifyWork& work, const LayerParams& layer) {
    return Taps(work) + 2 * TapCount(layer);
  }
  __host__ __device__ static int TapCount(const LayerParams& layer) {  // of the query heads of a kv head
    return layer.num_heads / layer.num_kv_heads * layer.conv_kernel;
  }

 private:
  __host__ __device__ static int WindowSize(const VerifyWork& work) {
    return work.tokens * Tile::kStride * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(float));
  }
};

// What a block shares about its items; round r is in items[r % 3]. Barriers of a round: what has landed.
template <int kRows>
struct alignas(kLine) Schedule {
  Item items[3];
  RowInfo rows[3][kRows];
  CopyBarrier keys, values;
};

template <int kDim, int kRows, typename T, bool kRaw>
struct Verifier {
  using Tile = WindowTile<kDim, kRows, T>;
  using State = HeldState<kDim, T>;
  using At = Layout<kDim, kRows, T>;
  static constexpr int kWarpRows = Tile::kWarpRows, kChannels = Tile::kChannels;
  static constexpr RowCopies kPrepared = kRows == 1 ? RowCopies::kBulk : RowCopies::kLanes;
  using Fetch = WindowFetch<kDim, T, kRaw ? RowCopies::kRaw : kPrepared, Tile::kQueryStride>;
  using Sums = float[Tile::kSumRows][Tile::kSumChannels];

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
    const auto index = static_cast<unsigned>(IndexOf(round));
    const unsigned place = VerifyWork::Quotient(index, work.splits, work.splits_inverse, kRows > 1);
    return p.tasks[VerifyWork::Quotient(place, work.kv_heads, work.kv_heads_inverse, kRows > 1)];
  }
  __device__ __forceinline__ const Item& ItemOf(int round) const { return schedule.items[round % 3]; }

  __device__ __forceinline__ uint64_t* Masks(int round) const {
    return reinterpret_cast<uint64_t*>(shared + At::kMasks) + round % 2 * kMaxNodes;
  }
  __device__ __forceinline__ float* Taps(int round) const {
    return shared + At::Taps(work) + round % 2 * At::TapCount(p.layer);
  }
  __device__ __forceinline__ Fetch FetchOf(int round) const {
    return {p,
            work,
            reinterpret_cast<T*>(shared + At::kKeys),
            reinterpret_cast<T*>(shared + At::Values(work)),
            shared + At::kQueries,
            Taps(round),
            Masks(round),
            schedule.keys,
            schedule.values};
  }
  __device__ __forceinline__ Tile TileOf(int round, const Item& item) const {
    const int first = Fetch::First(item, p.layer) * kDim;
    return {p.layer,
            item,
            schedule.rows[round % 3],
            reinterpret_cast<T*>(shared + At::kKeys) + first,
            reinterpret_cast<T*>(shared + At::Values(work)) + first,
            shared + At::kQueries,
            Masks(round),
            Taps(round),
            shared + At::kLocal,
            shared + At::kGrouped,
            __ffs(p.layer.group_size) - 1};
  }

  // By one warp; the others see it after the next barrier.
  __device__ __forceinline__ void Publish(int round, const Item& item) const {
    if (Lane() == 0) schedule.items[round % 3] = item;
    if (Lane() < item.rows) {
      RowInfo& info = schedule.rows[round % 3][Lane()];
      info.node = item.NodeOf(Lane(), work, kRows > 1);
      info.head = item.first_row + Lane() - info.node * item.heads;
      info.query = info.node * work.query_stride + info.head * kDim;
      info.out = (item.out_begin + info.node) * p.layer.num_heads + item.kv_head * item.heads + info.head;
    }
  }

  // Of the two blocks of a multiprocessor, the one to stay behind: it asks for a part of its first S when it has the
  // part before. In step both would wait for S at once and compute at once, with nothing under way in the last round;
  // apart, one's S travels while the other computes, over the end of the kernel. A hint: only the warps' places on the
  // multiprocessor tell its blocks apart.
  __device__ __forceinline__ bool StaysBehind() const {
    uint32_t place;
    asm volatile("mov.u32 %0, %%warpid;" : "=r"(place));
    return work.pairs && place / Tile::kWarps % 2 != 0;
  }
  template <int step>
  __device__ __forceinline__ static void AwaitStep(const State& s, bool behind) {
    if constexpr (sizeof(T) == sizeof(float) && !kRaw) {
      if (behind) s.template AwaitStep<step>();
    }
  }

  // The loads of the first item; rows of the step only once the kernel before this one has ended. What others wait for
  // is stored first: it would stand behind the loads of S.
  __device__ __forceinline__ void Begin(State& s) const {
    const bool publishes_second = Warp() == kItemWarp + 1 && Has(1);
    const Task task = TaskOf(0);
    Task second{};
    if (publishes_second) second = TaskOf(1);
    if (threadIdx.x == 0) {
      schedule.keys.Make(Fetch::kKeyArrivals);
      schedule.values.Make(Fetch::kValueArrivals);
    }
    const Item own(p, task, IndexOf(0), work, kRows);
    if (Warp() == kItemWarp) Publish(0, own);
    if (publishes_second) Publish(1, Item(p, second, IndexOf(1), work, kRows));
    const T* state = static_cast<const T*>(own.state);
    const bool behind = StaysBehind();
    s.template LoadStep<0>(state);
    AwaitStep<0>(s, behind);
    if constexpr (kRows == 1) s.template LoadStep<1>(state);  // nothing to copy but one row
    __syncthreads();
    const Fetch fetch = FetchOf(0);
    const Item& item = ItemOf(0);
    fetch.OldKeys(item, schedule.rows[0]);
    fetch.OldValues(item);
    const auto rows = fetch.RowsOf(item, schedule.rows[0]);
    if constexpr (kRows > 1) s.template LoadStep<1>(state);
    AwaitStep<1>(s, behind);
    s.template LoadStep<2>(state);
    AwaitStep<2>(s, behind);
    s.template LoadStep<3>(state);
    GridWait();
    fetch.NewKeys(item, schedule.rows[0], rows);
    fetch.NewValues(item, rows);
  }

  // Once no warp needs the round's any more, those of the next.
  __device__ __forceinline__ void FetchKeys(int round) const {
    if constexpr (kRaw) OrderAfterStores();
    const Fetch fetch = FetchOf(round + 1);
    const Item& item = ItemOf(round + 1);
    RowInfo* rows = schedule.rows[(round + 1) % 3];
    fetch.OldKeys(item, rows);
    fetch.NewKeys(item, rows, fetch.RowsOf(item, rows));
  }
  __device__ __forceinline__ void FetchValues(int round) const {
    if constexpr (kRaw) OrderAfterStores();
    const Fetch fetch = FetchOf(round + 1);
    const Item& item = ItemOf(round + 1);
    fetch.OldValues(item);
    fetch.NewValues(item, fetch.RowsOf(item, schedule.rows[(round + 1) % 3]));
  }

  // z of a row and some channels, given the grouped sum of its window. from: q S of them.
  __device__ __forceinline__ void AddState(const Item& item, const float* from, int folds,
                                           float (&z)[Tile::kSumChannels]) const {
    float sum[Tile::kSumChannels] = {};
#pragma unroll
    for (int part = 0; part < State::kParts; ++part) {
      float x[Tile::kSumChannels];
      LoadChannels(from + part * kRows * At::kStateStride, x);
#pragma unroll
      for (int i = 0; i < Tile::kSumChannels; ++i) sum[i] += x[i];
    }
#pragma unroll 1
    for (; folds > 0 && p.layer.decay != nullptr; --folds) {
#pragma unroll
      for (int i = 0; i < Tile::kSumChannels; ++i) sum[i] *= p.layer.decay[item.kv_head];
    }
#pragma unroll
    for (int i = 0; i < Tile::kSumChannels; ++i) z[i] += sum[i];
  }

  // Local sums and z at the thread's place, over the q S that z needs.
  __device__ __forceinline__ void Sum(const Item& item, const Tile& tile) const {
    const bool crosses = item.may_cross(p.layer.group_size);
    const int first = Tile::SumPlace().row;
    float* to = shared + At::kState + first * At::kStateStride + Tile::SumPlace().channel;
    Sums local = {}, z = {};
    tile.Accumulate(tile.local, local);
    if (crosses) tile.Accumulate(tile.grouped, z);
#pragma unroll
    for (int i = 0; i < Tile::kSumRows; ++i) {
      const int folds = crosses && first + i < item.rows ? tile.Row(first + i).group : 0;
      if (item.reads_state) AddState(item, to + i * At::kStateStride, folds, z[i]);
      StoreChannels(to + i * At::kStateStride, z[i]);
      StoreChannels(to + (kRows + i) * At::kStateStride, local[i]);
    }
  }

  // Outputs of a row, by one warp.
  __device__ __forceinline__ void Finish(const RowInfo& row, const float* sums) const {
    float local[kChannels], z[kChannels];
    LoadChannels(sums, z);
    LoadChannels(sums + kRows * At::kStateStride, local);
    float scale = p.layer.global_factor;
    if (p.layer.global == Global::kRmsNorm) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) squares = fmaf(z[i], z[i], squares);
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, offset);
      scale = row.gain / sqrtf(squares / static_cast<float>(kDim) + p.layer.global_norm_eps);
    }
    if (p.layer.global != Global::kNone) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) local[i] = fmaf(scale, z[i], local[i]);
    }
    const int64_t at = static_cast<int64_t>(row.out) * kDim + Tile::Channel();
    if (p.out != nullptr) StoreChannels(p.out + at, local);
    if (p.out_bf16 == nullptr) return;
#pragma unroll
    for (int i = 0; i < kChannels; i += 2) {
      const uint32_t pair = RoundToBf16(local[i]) | static_cast<uint32_t>(RoundToBf16(local[i + 1])) << 16;
      *reinterpret_cast<uint32_t*>(p.out_bf16 + at + i) = pair;
    }
  }

  // kMore: another round follows.
  template <bool kMore>
  __device__ __forceinline__ void Round(int round, State& s) const {
    const Item item = ItemOf(round);
    const Tile tile = TileOf(round, item);
    const T* next = kMore ? static_cast<const T*>(ItemOf(round + 1).state) : nullptr;
    Vec4 y[(kRows + 7) / 8 * 2];
    schedule.keys.Wait(round);
    s.template Multiply<kRows>(tile.queries, tile.kQueryStride, y);
    if constexpr (kRows == 1) __syncwarp();  // keeps nvcc from changing the order of the loads, which costs up to 5 %
    if constexpr (kMore) s.template LoadStep<0>(next);
    if (item.rows > 0) tile.Score();
    __syncthreads();  // keys and queries are used up, and no warp is in the round before any more
    if constexpr (kMore) s.template LoadStep<1>(next);
    if constexpr (kMore) FetchKeys(round);
    if (item.reads_state) State::template Store<kRows, At::kStateStride>(y, shared + At::kState);
    const bool publishes = kMore && Warp() == kItemWarp && Has(round + 2);
    Task task{};
    if (publishes) task = TaskOf(round + 2);
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      if (Tile::RowOf(i) < item.rows) tile.Weigh(Tile::RowOf(i), tile.Row(Tile::RowOf(i)));
    }
    if (publishes) Publish(round + 2, Item(p, task, IndexOf(round + 2), work, kRows));
    __syncthreads();
    if constexpr (kMore) s.template LoadStep<2>(next);
    if (Tile::SumPlace().row < item.rows) {
      schedule.values.Wait(round);
      Sum(item, tile);
    }
    if constexpr (kMore) s.template LoadStep<3>(next);
    __syncthreads();  // values are used up
    if constexpr (kMore) FetchValues(round);
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      if (Tile::RowOf(i) >= item.rows) break;
      Finish(schedule.rows[round % 3][Tile::RowOf(i)],
             shared + At::kState + Tile::RowOf(i) * At::kStateStride + Tile::Channel());
    }
  }
};

template <int kDim, int kRows, typename T, bool kRaw>
__global__ void __launch_bounds__(kThreads, kBlocks(kRows))
    VerifyTileKernel(const AttentionParams p, const VerifyWork work) {
  extern __shared__ __align__(kLine) float shared[];
  __shared__ Schedule<kRows> schedule;
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
  const int queries = p.last_rows > 0 && p.last_rows < nodes ? p.last_rows : nodes;
  const int splits = (queries * heads + rows - 1) / rows;
  const int of_keys = 2 * p.layer.num_kv_heads * p.layer.head_dim;
  const int of_row = p.layer.num_heads * p.layer.head_dim + of_keys;
  return {num_tasks * p.layer.num_kv_heads * splits,
          (p.layer.group_size + nodes + 3) / 4 * 4,  // rows of weights stay aligned to 16 bytes
          static_cast<unsigned>(splits),
          static_cast<unsigned>(p.layer.num_kv_heads),
          static_cast<unsigned>(heads),
          of_row,
          p.kv != nullptr ? of_keys : of_row};
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
  VerifyWork work = WorkOf(p, num_tasks, kRows);
  const int bytes = SharedBytes<kDim, kRows, T>(p), resident = CurrentDevice().processors * Resident<kDim, kRows, T>(p);
  work.pairs = std::min(work.items, resident) > CurrentDevice().processors;
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
