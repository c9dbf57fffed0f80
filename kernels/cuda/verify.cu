// tree_verify on tensor cores: a persistent grid over items (request, kv head, tile of 8 rows), two blocks of 256
// threads a multiprocessor. S of an item lives in registers (state_fragment.h), its window in shared memory
// (window_tile.h). As soon as an item's sums are formed, S and window of the next are asked for: S by 16-byte loads, the
// window by bulk copies that one warp prepared while the others scored.
//
// Floor per request and head at d = 128, fp32: S 64 KB, ring 2 * 0.5 KB * (L % G, 31 values at least), a row 1.5 KB in and
// 0.5 KB out. Reached on an H200, 2026-11-27, in (requests, nodes): 83 % at (256, 1), 69 % at (64, 1), 60 % at (64, 4),
// 48 % at (16, 8); 7.6 us at (1, 1); docs/cuda_attention.md.
// Slower, measured: one item a block (71 %); S in predicated loads (copies that wait: 56 %); two tiles an item.
#include <algorithm>

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/pdl.h"
#include "kernels/cuda/window_tile.h"

namespace linspec::cuda {
namespace {

constexpr int kQueryRows = 8;  // columns of the tensor cores' B operand

struct Work {
  int items, splits;  // splits: tiles of the largest task
  int tokens;         // capacity: ring and nodes
};

// Shared memory, in floats.
template <int kDim, int kRows>
struct Layout {
  using Tile = WindowTile<kDim, kRows>;
  int tokens, taps;
  __host__ __device__ Layout(const Work& work, const LayerParams& layer)
      : tokens(work.tokens), taps((layer.num_heads / layer.num_kv_heads * layer.conv_kernel + 3) / 4 * 4) {}
  __host__ __device__ int Masks() const { return 0; }
  __host__ __device__ int Taps() const { return 2 * kMaxNodes; }
  __host__ __device__ int Queries() const { return Taps() + taps; }
  __host__ __device__ int Keys() const { return Queries() + kRows * Tile::kQueryStride; }
  __host__ __device__ int Values() const { return KeysEnd() > Sums() ? KeysEnd() : Sums(); }
  __host__ __device__ int Local() const { return Values() + tokens * Tile::kStride; }
  __host__ __device__ int Grouped() const { return Local() + tokens * kRows; }
  __host__ __device__ int End() const { return Grouped() + tokens * kRows; }
  // Sums of the warps: in place of the keys, which are scored by then.
  __host__ __device__ int Partial() const { return Keys(); }
  __host__ __device__ int State() const { return Partial() + kClasses * kRows * kDim; }
  __host__ __device__ int Size() const { return End(); }

 private:
  static constexpr int kSums = (kClasses + StateFragment<kDim>::kParts) * kRows * kDim;
  __host__ __device__ int KeysEnd() const { return Keys() + tokens * Tile::kStride; }
  __host__ __device__ int Sums() const { return Keys() + kSums; }
};

struct BulkCopy {
  int to;  // in shared memory, in floats
  uint32_t bytes;
  const float* from;
};

// What a block shares about its present and its next items; round r is in tasks[r % 3] and items[r % 2].
struct Schedule {
  Task tasks[3];
  Item items[2];
  CopyBarrier barrier;
};

template <int kDim, int kRows>
struct Verifier {
  static constexpr int kChannels = kDim / 32;
  using Tile = WindowTile<kDim, kRows>;

  const AttentionParams& p;
  const Work& work;
  Layout<kDim, kRows> layout;
  float* shared;

  __device__ __forceinline__ float* Head(const Task& task, int kv_head) const {
    return p.states.base + task.slot * p.states.floats_per_slot + p.states.layer_offset +
           static_cast<int64_t>(kv_head) * kDim * kDim;
  }
  // Ring of keys; the values follow all heads' keys.
  __device__ __forceinline__ float* Ring(const Task& task, int kv_head) const {
    const int64_t group = p.layer.group_size, heads = p.layer.num_kv_heads;
    return Head(task, 0) + heads * kDim * kDim + kv_head * group * kDim;
  }
  __device__ __forceinline__ int64_t RingValues() const {
    return static_cast<int64_t>(p.layer.num_kv_heads) * p.layer.group_size * kDim;
  }
  __device__ __forceinline__ int64_t Stride() const {
    return static_cast<int64_t>(p.layer.num_heads + 2 * p.layer.num_kv_heads) * kDim;
  }
  __device__ __forceinline__ const float* Keys(const Task& task, int kv_head) const {
    return p.qkv + task.row_begin * Stride() + static_cast<int64_t>(p.layer.num_heads + kv_head) * kDim;
  }
  __device__ __forceinline__ bool NeedsState(const Item& item) const {
    return item.folded && p.layer.global != Global::kNone;
  }

  // Copy i of an item's window: ring of keys, of values, values of the history, then rows of keys, values and queries.
  __device__ __forceinline__ BulkCopy Describe(const Task& task, const Item& item, int i) const {
    constexpr uint32_t kRowBytes = kDim * sizeof(float);
    const float* ring = Ring(task, item.kv_head);
    const int keys = layout.Keys(), values = layout.Values(), begin = item.history * kDim, node = (i - 3) / 2;
    if (i == 0) return {keys + begin, item.phase * kRowBytes, ring};
    if (i == 1) return {values + begin, item.phase * kRowBytes, ring + RingValues()};
    if (i == 2) {
      return {values, item.history * kRowBytes, ring + RingValues() + (p.layer.group_size - item.history) * kDim};
    }
    const float* row = p.qkv + task.row_begin * Stride();
    if (node < item.nodes) {
      const int value = (i - 3) % 2, head = p.layer.num_heads + value * p.layer.num_kv_heads + item.kv_head;
      return {(value != 0 ? values : keys) + (item.ring() + node) * kDim, kRowBytes,
              row + node * Stride() + head * kDim};
    }
    const int query = i - 3 - 2 * item.nodes, at = item.first_row + query;
    return {layout.Queries() + query * Tile::kQueryStride, kRowBytes,
            row + at / item.heads * Stride() + (item.kv_head * item.heads + at % item.heads) * kDim};
  }
  __device__ __forceinline__ static int NumCopies(const Item& item) {
    return item.rows > 0 ? 3 + 2 * item.nodes + item.rows : 0;
  }

  // Starts the copies, by one warp whose lanes hold copy `lane` ready.
  __device__ __forceinline__ void FetchWindow(const Task& task, const Item& item, const BulkCopy& ready,
                                              CopyBarrier& barrier) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, copies = NumCopies(item);
    const int rows = item.phase + item.ring() + 2 * item.nodes + item.rows;
    if (lane == 0) barrier.Expect(copies > 0 ? rows * static_cast<int>(kDim * sizeof(float)) : 0);
    __syncwarp();
    if (lane < copies) barrier.Copy(shared + ready.to, ready.from, ready.bytes);
#pragma unroll 1
    for (int i = lane + 32; i < copies; i += 32) {
      const BulkCopy copy = Describe(task, item, i);
      barrier.Copy(shared + copy.to, copy.from, copy.bytes);
    }
  }

  // Starts the copies of masks and taps; by one warp.
  __device__ __forceinline__ void FetchConstants(const Task& task, const Item& item) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int nodes = item.rows > 0 ? item.nodes : 0, taps = nodes > 0 ? item.heads * p.layer.conv_kernel : 0;
    auto* masks = reinterpret_cast<uint64_t*>(shared + layout.Masks());
#pragma unroll 1
    for (int node = lane; node < nodes; node += 32) {
      if (p.ancestors != nullptr) {
        CopyAsync8(masks + node, p.ancestors + task.row_begin + node);
      } else {
        masks[node] = ~uint64_t{0} >> (63 - node);
      }
    }
#pragma unroll 1
    for (int i = lane; i < taps; i += 32) {
      CopyAsync4(shared + layout.Taps() + i, p.layer.conv_taps + item.kv_head * taps + i);
    }
  }

  // Sums of the warps for the row of this warp.
  __device__ __forceinline__ void Add(const float* partial, int parts, float (&sum)[kChannels]) const {
    const float* from = partial + static_cast<int>(threadIdx.x) / 32 * kDim + Channel();
    for (int part = 0; part < parts; ++part) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sum[i] += from[part * kRows * kDim + i];
    }
  }
  __device__ __forceinline__ void AddState(int kv_head, int group, float (&z)[kChannels]) const {
    float q_s[kChannels] = {};
    Add(shared + layout.State(), StateFragment<kDim>::kParts, q_s);
    const float decay = group > 0 && p.layer.decay != nullptr ? Power(p.layer.decay[kv_head], group) : 1.0f;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) z[i] = fmaf(decay, q_s[i], z[i]);
  }
  __device__ __forceinline__ static int Channel() { return static_cast<int>(threadIdx.x) % 32 * kChannels; }

  // The item of an index, and what the lane copies for it; by one warp.
  __device__ __forceinline__ BulkCopy Prepare(int index, const Task& task, Item& item) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane == 0) item = Item(p.layer, task, index, work.splits, kRows, p.last_rows);
    __syncwarp();
    return lane < NumCopies(item) ? Describe(task, item, lane) : BulkCopy{};
  }
  // S of the item, or some matrix where it is not used.
  __device__ __forceinline__ const float* Matrix(const Task& task, const Item& item) const {
    return item.rows > 0 && NeedsState(item) ? Head(task, item.kv_head) : p.states.base;
  }

  // The loads of the first item. Tasks and S are older than the kernel before this one; everything else may be its work.
  __device__ __forceinline__ void Begin(int index, bool fetches, Schedule& schedule, BulkCopy& ready,
                                        StateFragment<kDim>& s) const {
    const Task& task = schedule.tasks[0];
    Item& item = schedule.items[0];
    if (fetches) ready = Prepare(index, task, item);
    __syncthreads();
    s.Load(Matrix(task, item));
    GridWait();
    if (fetches) {
      FetchWindow(task, item, ready, schedule.barrier);
      FetchConstants(task, item);
    }
    CommitCopies();
  }

  // The two sums of the warp's row. All threads.
  __device__ __forceinline__ void Compute(const Item& item, const StateFragment<kDim>& s, float (&local)[kChannels],
                                          float (&z)[kChannels]) const {
    constexpr unsigned kAll = 0xFFFFFFFFu;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
    const bool needs_state = NeedsState(item);
    const Tile tile{p.layer,
                    item,
                    shared + layout.Keys(),
                    shared + layout.Values(),
                    shared + layout.Queries(),
                    reinterpret_cast<const uint64_t*>(shared + layout.Masks()),
                    shared + layout.Taps(),
                    shared + layout.Local(),
                    shared + layout.Grouped(),
                    shared + layout.Partial(),
                    __ffs(p.layer.group_size) - 1};
    tile.Score();
    __syncthreads();
    tile.Weigh();
    __syncthreads();
    const QueryRow own = tile.Row(thread % kRows);
    const uint64_t high = __reduce_or_sync(kAll, static_cast<uint32_t>(own.mask >> 32));
    const uint64_t seen = high << 32 | __reduce_or_sync(kAll, static_cast<uint32_t>(own.mask));
    const int group = __shfl_sync(kAll, own.group, warp % kRows);
    tile.Accumulate(tile.local, seen);
    if (needs_state) s.template Multiply<kRows>(tile.queries, tile.kQueryStride, shared + layout.State());
    __syncthreads();
    if (warp < kRows) Add(tile.partial, kClasses, local);
    if (__any_sync(kAll, own.group > 0) && p.layer.global != Global::kNone) {  // the same in every warp
      __syncthreads();
      tile.Accumulate(tile.grouped, seen);
      __syncthreads();
      if (warp < kRows) Add(tile.partial, kClasses, z);
    }
    if (warp < kRows && needs_state) AddState(item.kv_head, group, z);
  }

  // y of one row by one warp, lane l having channels l * kChannels + 0..; z is complete.
  __device__ __forceinline__ void Finish(const Task& task, const Item& item, const float (&local)[kChannels],
                                         const float (&z)[kChannels]) const {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp >= kRows || warp >= item.rows) return;
    const int row = item.first_row + warp, head = item.kv_head * item.heads + row % item.heads;
    float scale = p.layer.global_factor;
    if (p.layer.global == Global::kRmsNorm) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) squares = fmaf(z[i], z[i], squares);
      for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, offset);
      scale = p.layer.global_gain[head] / sqrtf(squares / static_cast<float>(kDim) + p.layer.global_norm_eps);
    }
    const int64_t at =
        (static_cast<int64_t>(task.row_begin - task.out_shift + row / item.heads) * p.layer.num_heads + head) * kDim +
        Channel();
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const float y = p.layer.global == Global::kNone ? local[i] : fmaf(scale, z[i], local[i]);
      if (p.out != nullptr) p.out[at + i] = y;
      if (p.out_bf16 != nullptr) p.out_bf16[at + i] = RoundToBf16(y);
    }
  }
};

template <int kDim, int kRows>
__global__ void __launch_bounds__(kThreads, 2) VerifyTileKernel(const AttentionParams p, const Work work) {
  extern __shared__ __align__(16) float shared[];
  __shared__ __align__(16) Schedule schedule;
  using Program = Verifier<kDim, kRows>;
  const Program program{p, work, Layout<kDim, kRows>(work, p.layer), shared};
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, stride = static_cast<int>(gridDim.x);
  const int per_task = p.layer.num_kv_heads * work.splits;
  const bool fetches = warp == kThreads / 32 - 1;  // the last warp: it has the least to score and to finish
  int index = static_cast<int>(blockIdx.x);
  if (thread == 0) schedule.barrier.Make();
  if (thread < 2 && index + thread * stride < work.items) {
    schedule.tasks[thread] = p.tasks[(index + thread * stride) / per_task];
  }
  __syncthreads();
  BulkCopy ready;
  StateFragment<kDim> s;
  program.Begin(index, fetches, schedule, ready, s);
  for (int round = 0;; index += stride, ++round) {
    const int buffer = round & 1, next = index + stride, after = next + stride;
    const Task& next_task = schedule.tasks[(round + 1) % 3];
    Item& next_item = schedule.items[buffer ^ 1];
    WaitCopies<0>();
    schedule.barrier.Wait(round);
    __syncthreads();
    if (thread < 2 && after < work.items) {
      CopyAsync16(reinterpret_cast<float*>(&schedule.tasks[(round + 2) % 3]) + 4 * thread,
                  reinterpret_cast<const float*>(p.tasks + after / per_task) + 4 * thread);
    }
    CommitCopies();
    if (fetches && next < work.items) ready = program.Prepare(next, next_task, next_item);
    const Task& task = schedule.tasks[round % 3];
    const Item& item = schedule.items[buffer];
    float local[Program::kChannels] = {}, z[Program::kChannels] = {};
    if (item.rows > 0) program.Compute(item, s, local, z);
    CopyBarrier::OrderStores();  // the sums lie where the next keys go
    __syncthreads();
    if (next >= work.items) {
      program.Finish(task, item, local, z);
      return;
    }
    s.Load(program.Matrix(next_task, next_item));
    if (fetches) {
      program.FetchWindow(next_task, next_item, ready, schedule.barrier);
      program.FetchConstants(next_task, next_item);
    }
    CommitCopies();
    program.Finish(task, item, local, z);
  }
}

template <int kDim, int kRows>
void LaunchTiles(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  const Device& device = CurrentDevice();
  const int heads = p.layer.num_heads / p.layer.num_kv_heads;
  const int nodes = p.max_rows > 0 && p.max_rows < kMaxNodes ? p.max_rows : kMaxNodes;
  Work work;
  work.tokens = (p.layer.group_size + nodes + 3) / 4 * 4;  // rows of weights stay aligned to 16 bytes
  const int queries = p.last_rows > 0 && p.last_rows < nodes ? p.last_rows : nodes;
  work.splits = (queries * heads + kRows - 1) / kRows;
  work.items = num_tasks * p.layer.num_kv_heads * work.splits;
  const int bytes = Layout<kDim, kRows>(work, p.layer).Size() * static_cast<int>(sizeof(float));
  const auto kernel = VerifyTileKernel<kDim, kRows>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  const int resident = device.processors * (2 * (bytes + 2048) <= device.shared_per_processor ? 2 : 1);
  const int blocks = std::min(work.items, resident);
  LaunchOverlapped(kernel, dim3(blocks), dim3(kThreads), bytes, stream, 1, p, work);
}

template <int kDim>
void LaunchVerifyOf(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  const int rows = p.last_rows > 0 ? p.last_rows : p.max_rows;
  rows* p.layer.num_heads == p.layer.num_kv_heads ? LaunchTiles<kDim, 1>(p, num_tasks, stream)
                                                  : LaunchTiles<kDim, kQueryRows>(p, num_tasks, stream);
}

}  // namespace

void LaunchVerifyTiles(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  p.layer.head_dim == 128 ? LaunchVerifyOf<128>(p, num_tasks, stream) : LaunchVerifyOf<64>(p, num_tasks, stream);
}

}  // namespace linspec::cuda
