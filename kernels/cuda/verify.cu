// tree_verify on tensor cores.
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/window_tile.h"

namespace linspec::cuda {
namespace {

constexpr int kQueryRows = 8;  // columns of the tensor cores' B operand

// Shared memory in floats.
template <int kDim, int kRows>
struct Layout {
  using Tile = WindowTile<kDim, kRows>;
  static constexpr int kStateParts = StateFragment<kDim>::kParts;
  int tokens;  // capacity: ring and nodes
  __host__ __device__ int Keys() const { return 0; }
  __host__ __device__ int Values() const { return tokens * Tile::kStride; }
  __host__ __device__ int Queries() const { return Values() + tokens * Tile::kStride; }
  __host__ __device__ int Local() const { return Queries() + kRows * Tile::kQueryStride; }
  __host__ __device__ int Grouped() const { return Local() + tokens * kRows; }
  __host__ __device__ int Partial() const { return Grouped() + tokens * kRows; }
  __host__ __device__ int State() const { return Partial() + kClasses * kRows * kDim; }
  __host__ __device__ int Size() const { return State() + kStateParts * kRows * kDim; }
};

template <int kDim>
__device__ __forceinline__ void CopyWindow(const Window& w, float* keys, float* values, int stride, int tokens,
                                           int history) {
  constexpr int kColumns = kDim / 4;
  for (int i = static_cast<int>(threadIdx.x) + history * kColumns; i < tokens * kColumns; i += kThreads) {
    CopyAsync16(keys + i / kColumns * stride + i % kColumns * 4, w.Key(i / kColumns) + i % kColumns * 4);
  }
  for (int i = static_cast<int>(threadIdx.x); i < tokens * kColumns; i += kThreads) {
    CopyAsync16(values + i / kColumns * stride + i % kColumns * 4, w.Value(i / kColumns) + i % kColumns * 4);
  }
  CommitCopies();
}

// y of one row, by one warp: lane l has kDim / 32 channels.
template <int kDim, int kRows>
struct RowSum {
  static constexpr int kChannels = kDim / 32;
  float local[kChannels], z[kChannels];

  __device__ __forceinline__ static int Channel() { return static_cast<int>(threadIdx.x) % 32 * kChannels; }
  __device__ __forceinline__ void Add(const float* partial, int parts, int row, float (&sum)[kChannels]) {
    for (int part = 0; part < parts; ++part) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sum[i] += partial[(part * kRows + row) * kDim + Channel() + i];
    }
  }
  __device__ __forceinline__ void Finish(const AttentionParams& p, int64_t row, int head) {
    float scale = p.layer.global_factor;
    if (p.layer.global == Global::kRmsNorm) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) squares = fmaf(z[i], z[i], squares);
      for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, offset);
      scale = p.layer.global_gain[head] / sqrtf(squares / static_cast<float>(kDim) + p.layer.global_norm_eps);
    }
    const int64_t at = (row * p.layer.num_heads + head) * kDim + Channel();
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const float y = p.layer.global == Global::kNone ? local[i] : fmaf(scale, z[i], local[i]);
      if (p.out != nullptr) p.out[at + i] = y;
      if (p.out_bf16 != nullptr) p.out_bf16[at + i] = RoundToBf16(y);
    }
  }
};

// Decoding: the only row of the call joins the ring, and S takes in the group that it fills.
template <int kDim, typename Tile>
__device__ __forceinline__ void AppendAndFold(const AttentionParams& p, const Window& w, const Tile& tile,
                                              StateFragment<kDim>& s, bool loaded, float* state) {
  const int thread = static_cast<int>(threadIdx.x), own = tile.tokens - 1, group = p.layer.group_size;
  if (thread < kDim / 2) {
    const bool key = thread < kDim / 4;
    const int c = thread % (kDim / 4) * 4;
    float* ring = const_cast<float*>(key ? w.ring_k : w.ring_v) + w.phase * kDim + c;
    Store4(ring, Load4((key ? tile.keys : tile.values) + own * tile.kStride + c));
  }
  if (w.phase + 1 < group) return;
  if (!w.folded) {
    s.Clear();
  } else if (!loaded) {
    s.Load(state);
  }
  const float decay = p.layer.decay != nullptr ? p.layer.decay[w.kv_head] : 1.0f;
  const float *keys = tile.keys + (tile.tokens - group) * tile.kStride;
  const float* values = tile.values + (tile.tokens - group) * tile.kStride;
#pragma unroll
  for (int step = 0; step < s.kSteps; ++step) {
    s.Fold(step, 0, decay, keys, tile.kStride, values, tile.kStride, group);
    s.Fold(step, 1, decay, keys, tile.kStride, values, tile.kStride, group);
    s.StoreStep(step, state);
  }
}

template <int kDim, int kRows, bool kDecode>
__global__ void __launch_bounds__(kThreads, 2)
    VerifyTileKernel(const AttentionParams p, int tiles_per_block, int capacity) {
  extern __shared__ __align__(16) float shared[];
  __shared__ TileRow rows[kRows];
  __shared__ int node_position[kMaxNodes];
  const Task task = p.tasks[blockIdx.y];
  if (task.slot < 0) return;
  const int kv_head = static_cast<int>(blockIdx.x), heads = p.layer.num_heads / p.layer.num_kv_heads;
  const int first_row = static_cast<int>(blockIdx.z) * tiles_per_block * kRows;
  const int end_row = min(first_row + tiles_per_block * kRows, task.num_rows * heads);
  if (first_row >= end_row) return;
  float* state = p.states.base + task.slot * p.states.floats_per_slot + p.states.layer_offset;
  const Window w(p, task.length, task.row_begin, task.num_rows, p.ancestors == nullptr, state, kv_head);
  const Layout<kDim, kRows> layout{capacity};
  const int ring = w.ring_tokens(), nodes = (end_row - 1) / heads + 1, history = -w.ring_begin;
  WindowTile<kDim, kRows> tile{w,
                               rows,
                               shared + layout.Keys(),
                               shared + layout.Values(),
                               shared + layout.Queries(),
                               shared + layout.Local(),
                               shared + layout.Grouped(),
                               shared + layout.Partial(),
                               node_position,
                               ring + nodes,
                               history};
  CopyWindow<kDim>(w, shared + layout.Keys(), shared + layout.Values(), tile.kStride, tile.tokens, history);
  StateFragment<kDim> s;
  const bool folded = w.folded && p.layer.global != Global::kNone;
  if (folded) s.Load(state + static_cast<int64_t>(kv_head) * kDim * kDim);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  if (thread < nodes) node_position[thread] = w.Position(thread);

  for (int row = first_row; row < end_row; row += kRows) {
    const int count = min(kRows, end_row - row);
    if (thread < kRows) {
      const bool valid = thread < count;
      const int node = valid ? (row + thread) / heads : 0, position = valid ? w.Position(node) : 0;
      rows[thread] = {valid ? w.Mask(node) : 0, position, position / p.layer.group_size,
                      kv_head * heads + (row + thread) % heads, valid};
    }
    for (int i = thread; i < count * (kDim / 4); i += kThreads) {
      const int r = row + i / (kDim / 4), c = i % (kDim / 4) * 4;
      Store4(shared + layout.Queries() + i / (kDim / 4) * tile.kQueryStride + c,
             Load4(w.row_q + r / heads * w.stride + r % heads * kDim + c));
    }
    WaitCopies<0>();
    __syncthreads();
    tile.Score();
    __syncthreads();
    uint64_t seen = 0;
    int last_group = 0;
    for (int r = 0; r < count; ++r) {
      seen |= rows[r].mask;
      last_group = max(last_group, rows[r].group);
    }
    tile.Accumulate(tile.local, seen);
    if (folded) s.template Multiply<kRows>(tile.queries, tile.kQueryStride, shared + layout.State());
    __syncthreads();
    RowSum<kDim, kRows> sum = {};
    if (warp < count) sum.Add(tile.partial, kClasses, warp, sum.local);
    if (last_group > 0 && p.layer.global != Global::kNone) {
      __syncthreads();
      tile.Accumulate(tile.grouped, seen);
      __syncthreads();
      if (warp < count) sum.Add(tile.partial, kClasses, warp, sum.z);
    }
    if (warp < count) {
      const TileRow& r = rows[warp];
      if (folded) {
        float q_s[kDim / 32] = {};
        sum.Add(shared + layout.State(), layout.kStateParts, warp, q_s);
        const float decay = Power(p.layer.decay != nullptr ? p.layer.decay[kv_head] : 1.0f, r.group);
#pragma unroll
        for (int i = 0; i < kDim / 32; ++i) sum.z[i] = fmaf(decay, q_s[i], sum.z[i]);
      }
      sum.Finish(p, task.row_begin + (row + warp) / heads, r.head);
    }
    __syncthreads();
  }
  if constexpr (kDecode) {
    AppendAndFold(p, w, tile, s, folded, state + static_cast<int64_t>(kv_head) * kDim * kDim);
  }
}

template <int kDim, int kRows, bool kDecode>
void LaunchTiles(const AttentionParams& p, int num_tasks, cudaStream_t stream) {
  const int heads = p.layer.num_heads / p.layer.num_kv_heads;
  const int nodes = kDecode ? 1 : p.max_rows > 0 && p.max_rows < kMaxNodes ? p.max_rows : kMaxNodes;
  const int tiles = (nodes * heads + kRows - 1) / kRows;
  const Layout<kDim, kRows> layout{(p.layer.group_size + nodes + 3) / 4 * 4};  // rows of 16 bytes
  const int bytes = layout.Size() * static_cast<int>(sizeof(float));
  constexpr int kMultiprocessors = 132, kSharedBytes = 227 * 1024;
  const int slots = kMultiprocessors * (bytes > kSharedBytes / 2 ? 1 : 2), blocks = num_tasks * p.layer.num_kv_heads;
  const int splits = kDecode || tiles <= 1 || blocks >= slots ? 1 : (slots / blocks < tiles ? slots / blocks : tiles);
  const int per_block = (tiles + splits - 1) / splits;
  const auto kernel = VerifyTileKernel<kDim, kRows, kDecode>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<dim3(p.layer.num_kv_heads, num_tasks, (tiles + per_block - 1) / per_block), kThreads, bytes, stream>>>(
      p, per_block, layout.tokens);
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
