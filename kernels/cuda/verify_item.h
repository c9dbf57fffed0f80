// What a block of tree_verify works on, and the copies that bring an item's window to shared memory.
#pragma once

#include "kernels/cuda/rope.h"
#include "kernels/cuda/tensor_core.h"
#include "kernels/cuda/window_attention.h"

namespace linspec::cuda {

struct VerifyWork {
  int items, splits;  // splits: tiles of the largest task
  int tokens;         // capacity of a window: ring and nodes
};

// Some rows of one request and kv head. Positions are relative to the first of the open group; ring tokens before it
// are the history, which only taps reach.
struct Item {
  const void* state;                    // S of the head; base of all states where S is not read
  const void* ring;                     // keys of the head; its values follow all heads' keys
  int kv_head, heads, first_row, rows;  // heads: query heads of the kv head; rows: of the item, 0: nothing to do
  int phase, history, nodes;            // nodes: of the request that any row of the item can see
  int row_begin, out_begin;             // of the request: its first row of k and v; of queries and outputs
  bool reads_state;

  __device__ Item() {}
  __device__ __forceinline__ Item(const AttentionParams& p, const Task& task, int index, const VerifyWork& work,
                                  int tile) {
    const LayerParams& layer = p.layer;
    kv_head = index / work.splits % layer.num_kv_heads;
    heads = layer.num_heads / layer.num_kv_heads;
    first_row = (p.last_rows > 0 ? max(0, task.num_rows - p.last_rows) : 0) * heads + index % work.splits * tile;
    rows = task.slot < 0 ? 0 : max(0, min(tile, task.num_rows * heads - first_row));
    nodes = (first_row + rows - 1) / heads + 1;
    row_begin = task.row_begin;
    out_begin = task.row_begin - task.out_shift;
    phase = static_cast<int>(task.length & (layer.group_size - 1));
    const bool folded = task.length >= layer.group_size;
    history = folded ? max(0, layer.conv_kernel - 1 - phase) : 0;
    reads_state = rows > 0 && folded && layer.global != Global::kNone;
    const int64_t d = layer.head_dim;
    const int64_t first = max(task.slot, 0) * p.states.per_slot + p.states.layer_offset, size = p.states.ElementBytes();
    const char* base = static_cast<const char*>(p.states.base);
    state = base + (reads_state ? first + kv_head * d * d : 0) * size;
    ring = base + (first + layer.num_kv_heads * d * d + kv_head * layer.group_size * d) * size;
  }
  __device__ __forceinline__ int ring_tokens() const { return phase + history; }
  __device__ __forceinline__ int tokens() const { return ring_tokens() + nodes; }
  // Some row of the item may stand past the end of the open group.
  __device__ __forceinline__ bool may_cross(int group_size) const { return phase + nodes > group_size; }
};

struct RowInfo {   // of a row of an item
  int node, head;  // head: in the kv head's group
  int out;         // row of d channels in the output
  float gain;      // Global::kRmsNorm
};

// Copies of an item to shared memory, started by one warp: rings in bulk, everything else by the lanes, since a warp
// issues its lanes' bulk copies one after the other. Both barriers are of 1 + kWarp arrivals: the first of keys,
// queries, masks, taps and gains, the second of values. kRaw: of AttentionParams::raw, one row an item.
template <int kDim, typename T, bool kRaw>
struct WindowFetch {
  static constexpr int kWarp = 32, kQueryStride = kDim + 4;
  static constexpr uint32_t kRowBytes = kDim * sizeof(T);

  const AttentionParams& p;
  T *keys, *values;  // in shared memory
  float *queries, *taps;
  uint64_t* masks;
  CopyBarrier &keys_barrier, &values_barrier;

  __device__ __forceinline__ static int Lane() { return static_cast<int>(threadIdx.x) % kWarp; }

  // What is older than the kernel before this one: rings, masks, taps, gains.
  __device__ __forceinline__ void OldKeys(const Item& item, RowInfo* rows) const {
    if (item.rows == 0) return;
    if (Lane() == 0) keys_barrier.Copy(keys + item.history * kDim, item.ring, item.phase * kRowBytes);
#pragma unroll 1
    for (int node = Lane(); node < item.nodes; node += kWarp) {
      if (p.ancestors != nullptr) {
        CopyAsync8(masks + node, p.ancestors + item.row_begin + node);
      } else {
        masks[node] = ~uint64_t{0} >> (63 - node);
      }
    }
    const int size = item.heads * p.layer.conv_kernel;
#pragma unroll 1
    for (int i = Lane(); i < size; i += kWarp) CopyAsync4(taps + i, p.layer.conv_taps + item.kv_head * size + i);
    if (p.layer.global == Global::kRmsNorm && Lane() < item.rows) {
      RowInfo& row = rows[Lane()];
      CopyAsync4(&row.gain, p.layer.global_gain + item.kv_head * item.heads + row.head);
    }
  }
  __device__ __forceinline__ void OldValues(const Item& item) const {
    if (item.rows == 0 || Lane() > 0) return;
    const T* ring =
        static_cast<const T*>(item.ring) + static_cast<int64_t>(p.layer.num_kv_heads) * p.layer.group_size * kDim;
    values_barrier.Copy(values + item.history * kDim, ring, item.phase * kRowBytes);
    values_barrier.Copy(values, ring + (p.layer.group_size - item.history) * kDim, item.history * kRowBytes);
  }

  // The rows of this step; then all that the barrier waits for is under way.
  __device__ __forceinline__ void NewKeys(const Item& item, const RowInfo* rows) const {
    if (kRaw && item.rows > 0) TurnRow(item);
    if (!kRaw && item.rows > 0) {
      CopyRows(keys, item, 0);
      const float* q = p.qkv + item.out_begin * QueryStride() + item.kv_head * item.heads * kDim;
      constexpr int kLanes = kDim / 4;  // of a row
#pragma unroll 1
      for (int i = Lane() / kLanes; i < item.rows; i += kWarp / kLanes) {
        const int column = Lane() % kLanes * 4;
        CopyAsync16(queries + i * kQueryStride + column,
                    q + rows[i].node * QueryStride() + rows[i].head * kDim + column);
      }
    }
    Arrive(keys_barrier, item.rows > 0 ? item.phase : 0);
  }
  __device__ __forceinline__ void NewValues(const Item& item) const {
    if (kRaw && item.rows > 0) KeepValue(item);
    if (!kRaw && item.rows > 0) CopyRows(values, item, p.layer.num_kv_heads);
    Arrive(values_barrier, item.rows > 0 ? item.ring_tokens() : 0);
  }

 private:
  // What the lanes stored themselves is seen by who waits for the barrier too.
  __device__ __forceinline__ void Arrive(CopyBarrier& barrier, int bulk_rows) const {
    __syncwarp();
    if (Lane() == 0) barrier.Expect(bulk_rows * kRowBytes);
    barrier.ArriveAfterCopies();
  }
  __device__ __forceinline__ int64_t QueryStride() const {
    return static_cast<int64_t>(p.layer.num_heads + 2 * p.layer.num_kv_heads) * kDim;
  }
  // Query and key of the row, which is also kept.
  __device__ __forceinline__ void TurnRow(const Item& item) const {
    RopeLane<kDim == 128> q, k, angles;
    const float* row = p.qkv + item.row_begin * QueryStride();
    q.Load(row + item.kv_head * kDim, Lane(), kDim / 2);
    k.Load(row + (p.layer.num_heads + item.kv_head) * kDim, Lane(), kDim / 2);
    const auto* of_rows = reinterpret_cast<const float2*>(p.raw.angles);
    angles.LoadAngles(of_rows + static_cast<int64_t>(item.row_begin) * (kDim / 2), Lane(), kDim / 2);
    q.TurnAndNormalize(angles, Lane(), kDim / 2, p.raw.eps);
    k.TurnAndNormalize(angles, Lane(), kDim / 2, p.raw.eps);
    q.Store(queries, Lane(), kDim / 2);
    Keep(k, item, 0, keys);
  }
  __device__ __forceinline__ void KeepValue(const Item& item) const {
    RopeLane<kDim == 128> v;
    v.Load(p.qkv + item.row_begin * QueryStride() + (p.layer.num_heads + p.layer.num_kv_heads + item.kv_head) * kDim,
           Lane(), kDim / 2);
    Keep(v, item, p.layer.num_kv_heads, values);
  }
  __device__ __forceinline__ void Keep(const RopeLane<kDim == 128>& x, const Item& item, int heads_before,
                                       T* to) const {
    T* kept = static_cast<T*>(p.raw.kv) + int64_t{2} * item.row_begin * p.layer.num_kv_heads * kDim;
    x.Store(to + item.ring_tokens() * kDim, Lane(), kDim / 2);
    x.Store(kept + (heads_before + item.kv_head) * kDim, Lane(), kDim / 2);
  }
  // Keys, or values with the kv heads before them, of the item's nodes.
  __device__ __forceinline__ void CopyRows(T* to, const Item& item, int heads_before) const {
    constexpr int kElements = 16 / sizeof(T), kLanes = kDim / kElements;  // of a copy; of a row
    const KvRows<T> kv = p.Kv<T>();
    const int column = Lane() % kLanes * kElements;
    const T* from = kv.data + item.row_begin * kv.stride + (heads_before + item.kv_head) * kDim + column;
    to += item.ring_tokens() * kDim + column;
#pragma unroll 2
    for (int node = Lane() / kLanes; node < item.nodes; node += kWarp / kLanes) {
      CopyAsync16(to + node * kDim, from + node * kv.stride);
    }
  }
};

}  // namespace linspec::cuda
