// tree_verify and decode on tensor cores, grid of items: (request, kv head, split of the rows). One block of 256 threads an
// item, two blocks a multiprocessor. S is asked for first, into registers (state_fragment.h), then ring, rows and queries
// into shared memory; S is used last. Window product: window_tile.h.
//
// Floor per request and head at d = 128, fp32: S 64 KB, ring 2 * 0.5 KB * (L % G, 31 values at least), a row 1.5 KB in and
// 0.5 KB out. Rejected, measured slower: a persistent grid that loads the next item's S into the registers of the present
// one (spills), S in predicated loads (the compiler copies, and waits).
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/window_tile.h"

namespace linspec::cuda {
namespace {

constexpr int kQueryRows = 8;  // columns of the tensor cores' B operand

struct Work {
  int items, splits, split_rows;  // split_rows: rows of an item, a multiple of the tile
  int tokens;                     // capacity: ring and nodes
};

// Shared memory, in floats.
template <int kDim, int kRows>
struct Layout {
  using Tile = WindowTile<kDim, kRows>;
  int tokens, split_rows, taps;
  __host__ __device__ Layout(const Work& work, const LayerParams& layer)
      : tokens(work.tokens),
        split_rows(work.split_rows),
        taps((layer.num_heads / layer.num_kv_heads * layer.conv_kernel + 3) / 4 * 4) {}
  __host__ __device__ int Masks() const { return 0; }
  __host__ __device__ int Taps() const { return 2 * kMaxNodes; }
  __host__ __device__ int Queries() const { return Taps() + taps; }
  __host__ __device__ int Keys() const { return Queries() + split_rows * Tile::kQueryStride; }
  __host__ __device__ int Values() const { return Keys() + tokens * Tile::kStride; }
  __host__ __device__ int Local() const { return Values() + tokens * Tile::kStride; }
  __host__ __device__ int Grouped() const { return Local() + tokens * kRows; }
  __host__ __device__ int Partial() const { return Grouped() + tokens * kRows; }
  __host__ __device__ int State() const { return Partial() + kClasses * kRows * kDim; }
  __host__ __device__ int Size() const { return State() + StateFragment<kDim>::kParts * kRows * kDim; }
};

template <int kDim, int kRows, bool kDecode>
struct Verifier {
  static constexpr int kColumns = kDim / 4, kChannels = kDim / 32;
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

  // Starts the copies of the item's window, queries, masks and taps.
  __device__ __forceinline__ void Fetch(const Task& task, const Item& item) const {
    const int thread = static_cast<int>(threadIdx.x), c = thread % kColumns * 4, ring = item.ring();
    float *keys = shared + layout.Keys() + c, *values = shared + layout.Values() + c;
    const float* from = Ring(task, item.kv_head) + c;
#pragma unroll 2
    for (int token = thread / kColumns; token < ring; token += kThreads / kColumns) {
      const int slot = (token - item.history) & (p.layer.group_size - 1);
      if (token >= item.history) CopyAsync16(keys + token * Tile::kStride, from + slot * kDim);
      CopyAsync16(values + token * Tile::kStride, from + RingValues() + slot * kDim);
    }
    from = Keys(task, item.kv_head) + c;
#pragma unroll 1
    for (int node = thread / kColumns; node < item.nodes; node += kThreads / kColumns) {
      CopyAsync16(keys + (ring + node) * Tile::kStride, from + node * Stride());
      CopyAsync16(values + (ring + node) * Tile::kStride,
                  from + static_cast<int64_t>(p.layer.num_kv_heads) * kDim + node * Stride());
    }
    float* queries = shared + layout.Queries() + c;
    from = p.qkv + task.row_begin * Stride() + static_cast<int64_t>(item.kv_head) * item.heads * kDim + c;
#pragma unroll 1
    for (int i = thread / kColumns; i < item.rows; i += kThreads / kColumns) {
      const int row = item.first_row + i;
      CopyAsync16(queries + i * Tile::kQueryStride, from + row / item.heads * Stride() + row % item.heads * kDim);
    }
    auto* masks = reinterpret_cast<uint64_t*>(shared + layout.Masks());
    if (thread < item.nodes) {
      if (p.ancestors != nullptr) {
        CopyAsync8(masks + thread, p.ancestors + task.row_begin + thread);
      } else {
        masks[thread] = ~uint64_t{0} >> (63 - thread);
      }
    }
    const int taps = item.heads * p.layer.conv_kernel;
#pragma unroll 1
    for (int i = thread; i < taps; i += kThreads) {
      CopyAsync4(shared + layout.Taps() + i, p.layer.conv_taps + item.kv_head * taps + i);
    }
    CommitCopies();
  }

  __device__ __forceinline__ void Add(const float* partial, int parts, int row, float (&sum)[kChannels]) const {
    const float* from = partial + row * kDim + Channel();
    for (int part = 0; part < parts; ++part) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sum[i] += from[part * kRows * kDim + i];
    }
  }
  __device__ __forceinline__ static int Channel() { return static_cast<int>(threadIdx.x) % 32 * kChannels; }

  // y of one row by one warp, lane l having channels l * kChannels + 0..
  __device__ __forceinline__ void Finish(const Task& task, const Item& item, int tile_row, int group,
                                         const float (&local)[kChannels], float (&z)[kChannels]) const {
    const int row = item.first_row + tile_row, head = item.kv_head * item.heads + row % item.heads;
    float scale = p.layer.global_factor;
    if (p.layer.global == Global::kRmsNorm) scale = p.layer.global_gain[head];
    if (NeedsState(item)) {
      float q_s[kChannels] = {};
      Add(shared + layout.State(), StateFragment<kDim>::kParts, static_cast<int>(threadIdx.x) / 32, q_s);
      const float decay = group > 0 && p.layer.decay != nullptr ? Power(p.layer.decay[item.kv_head], group) : 1.0f;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) z[i] = fmaf(decay, q_s[i], z[i]);
    }
    if (p.layer.global == Global::kRmsNorm) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) squares = fmaf(z[i], z[i], squares);
      for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, offset);
      scale = scale / sqrtf(squares / static_cast<float>(kDim) + p.layer.global_norm_eps);
    }
    const int64_t at =
        (static_cast<int64_t>(task.row_begin + row / item.heads) * p.layer.num_heads + head) * kDim + Channel();
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const float y = p.layer.global == Global::kNone ? local[i] : fmaf(scale, z[i], local[i]);
      if (p.out != nullptr) p.out[at + i] = y;
      if (p.out_bf16 != nullptr) p.out_bf16[at + i] = RoundToBf16(y);
    }
  }

  // Decoding: the row joins the ring.
  __device__ __forceinline__ void Append(const Task& task, const Item& item) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= 2 * kColumns) return;
    const int64_t value = thread / kColumns;
    const int c = thread % kColumns * 4;
    Store4(Ring(task, item.kv_head) + value * RingValues() + item.phase * kDim + c,
           Load4(Keys(task, item.kv_head) + value * p.layer.num_kv_heads * kDim + c));
  }

  // Decoding: S takes in the group that the row fills; its tokens are rows 0 to group_size - 1 of the window.
  __device__ __forceinline__ void Fold(const Task& task, const Item& item) const {
    StateFragment<kDim, kDim, 1> s;
    float* matrix = Head(task, item.kv_head);
    const float decay = p.layer.decay != nullptr ? p.layer.decay[item.kv_head] : 1.0f;
    const float *keys = shared + layout.Keys(), *values = shared + layout.Values();
#pragma unroll 1
    for (int step = 0; step < s.kSteps; ++step) {
      s.LoadStep(step, matrix);
      if (!item.folded) s.Clear();
      s.Fold(step, decay, keys, Tile::kStride, values, Tile::kStride, p.layer.group_size);
      s.StoreStep(step, matrix);
    }
  }
};

template <int kDim, int kRows, bool kDecode>
__global__ void __launch_bounds__(kThreads, 2) VerifyTileKernel(const AttentionParams p, const Work work) {
  extern __shared__ __align__(16) float shared[];
  using Program = Verifier<kDim, kRows, kDecode>;
  const int index = static_cast<int>(blockIdx.x), warp = static_cast<int>(threadIdx.x) / 32;
  // In shared memory, because S takes most of the registers.
  __shared__ Task task;
  __shared__ Item item;
  if (threadIdx.x == 0) {
    task = p.tasks[index / (p.layer.num_kv_heads * work.splits)];
    item = Item(p.layer, task, index, work.splits, work.split_rows);
  }
  __syncthreads();
  if (item.rows == 0) return;
  const Program program{p, work, Layout<kDim, kRows>(work, p.layer), shared};
  const Layout<kDim, kRows>& layout = program.layout;
  const bool needs_state = program.NeedsState(item);
  StateFragment<kDim> s;
  s.Load(needs_state ? program.Head(task, item.kv_head)
                     : p.states.base);  // else any one matrix, for its copy in the L2
  program.Fetch(task, item);
  const WindowTile<kDim, kRows> tile{p.layer,
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
  WaitCopies<0>();
  __syncthreads();
  for (int first = 0; first < item.rows; first += kRows) {
    tile.Score(first);
    __syncthreads();
    tile.Weigh(first);
    __syncthreads();
    const QueryRow own = tile.Row(first, static_cast<int>(threadIdx.x) % kRows);
    const uint64_t high = __reduce_or_sync(0xFFFFFFFFu, static_cast<uint32_t>(own.mask >> 32));
    const uint64_t seen = high << 32 | __reduce_or_sync(0xFFFFFFFFu, static_cast<uint32_t>(own.mask));
    tile.Accumulate(tile.local, seen);
    if (needs_state) {
      s.template Multiply<kRows>(tile.queries + first * tile.kQueryStride, tile.kQueryStride, shared + layout.State());
    }
    __syncthreads();
    const bool finishes = warp < min(kRows, item.rows - first);
    float local[Program::kChannels] = {}, z[Program::kChannels] = {};
    if (finishes) program.Add(tile.partial, kClasses, warp, local);
    if (__any_sync(0xFFFFFFFFu, own.group > 0) && p.layer.global != Global::kNone) {
      __syncthreads();
      tile.Accumulate(tile.grouped, seen);
      __syncthreads();
      if (finishes) program.Add(tile.partial, kClasses, warp, z);
    }
    if (finishes) program.Finish(task, item, first + warp, tile.Row(first, warp).group, local, z);
  }
  if constexpr (kDecode) {
    program.Append(task, item);
    if (item.phase + 1 == p.layer.group_size) program.Fold(task, item);
  }
}

template <int kDim, int kRows, bool kDecode>
void LaunchTiles(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  const DeviceLimits& device = CurrentDeviceLimits();
  const int heads = p.layer.num_heads / p.layer.num_kv_heads;
  const int nodes = kDecode ? 1 : p.max_rows > 0 && p.max_rows < kMaxNodes ? p.max_rows : kMaxNodes;
  Work work;
  work.tokens = (p.layer.group_size + nodes + 3) / 4 * 4;  // rows of weights stay aligned to 16 bytes
  const int tiles = (nodes * heads + kRows - 1) / kRows, blocks = num_tasks * p.layer.num_kv_heads;
  const int tiles_per_item = blocks * tiles > 4 * device.multiprocessors && tiles > 1 ? 2 : 1;
  work.splits = (tiles + tiles_per_item - 1) / tiles_per_item;
  work.split_rows = tiles_per_item * kRows;
  work.items = blocks * work.splits;
  const int bytes = Layout<kDim, kRows>(work, p.layer).Size() * static_cast<int>(sizeof(float));
  const auto kernel = VerifyTileKernel<kDim, kRows, kDecode>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<work.items, kThreads, bytes, stream>>>(p, work);
}

template <int kDim>
void LaunchVerifyOf(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  p.max_rows* p.layer.num_heads == p.layer.num_kv_heads ? LaunchTiles<kDim, 1, false>(p, num_tasks, stream)
                                                        : LaunchTiles<kDim, kQueryRows, false>(p, num_tasks, stream);
}

template <int kDim>
void LaunchDecodeOf(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  p.layer.num_heads == p.layer.num_kv_heads ? LaunchTiles<kDim, 1, true>(p, num_tasks, stream)
                                            : LaunchTiles<kDim, kQueryRows, true>(p, num_tasks, stream);
}

}  // namespace

void LaunchVerifyTiles(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  p.layer.head_dim == 128 ? LaunchVerifyOf<128>(p, num_tasks, stream) : LaunchVerifyOf<64>(p, num_tasks, stream);
}

void LaunchDecodeTiles(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  p.layer.head_dim == 128 ? LaunchDecodeOf<128>(p, num_tasks, stream) : LaunchDecodeOf<64>(p, num_tasks, stream);
}

}  // namespace linspec::cuda
