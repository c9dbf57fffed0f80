// What a block of tree_verify works on, and the copies that bring an item's window to shared memory.
#pragma once

#include "kernels/cuda/rope.h"
#include "kernels/cuda/tensor_core.h"
#include "kernels/cuda/window_attention.h"

namespace linspec::cuda {

struct VerifyWork {
  int items;
  int tokens;  // capacity of a window: ring and nodes
  // Divisors, unsigned since divisions take long: tiles of the largest task; kv heads; query heads of one.
  unsigned splits, kv_heads, heads;
  bool pairs = false;  // more blocks than multiprocessors
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
    const unsigned place = static_cast<unsigned>(index) / work.splits;
    kv_head = static_cast<int>(place % work.kv_heads);
    heads = static_cast<int>(work.heads);
    const int split = index - static_cast<int>(place * work.splits);
    first_row = (p.last_rows > 0 ? max(0, task.num_rows - p.last_rows) : 0) * heads + split * tile;
    rows = task.slot < 0 ? 0 : max(0, min(tile, task.num_rows * heads - first_row));
    nodes = rows > 0 ? NodeOf(rows - 1) + 1 : 0;
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
  __device__ __forceinline__ int NodeOf(int row) const {  // of a row of the item
    const auto index = static_cast<unsigned>(first_row + row);
    return static_cast<int>(heads == 1 ? index : index / static_cast<unsigned>(heads));
  }
  __device__ __forceinline__ int HeadOf(int row) const { return first_row + row - NodeOf(row) * heads; }
  // Some row of the item may stand past the end of the open group.
  __device__ __forceinline__ bool may_cross(int group_size) const { return phase + nodes > group_size; }
};

struct RowInfo {   // of a row of an item
  int node, head;  // head: in the kv head's group
  int out;         // row of d channels in the output
  float gain;      // Global::kRmsNorm
};

// Copies of an item to shared memory, started by all warps of a block: masks, taps and gains by the lanes of one warp,
// everything else in bulk. Rows too: where bulk copies and others write in turn a fence orders them, which waits for
// all that its warp has under way, parts of S among it. kRaw: of AttentionParams::raw, one row an item, which a warp
// turns and stores; there the fence is needed.
template <int kDim, typename T, bool kRaw>
struct WindowFetch {
  static constexpr int kWarp = 32, kWarps = kThreads / kWarp, kQueryStride = kDim + 4;
  static constexpr uint32_t kRowBytes = kDim * sizeof(T), kQueryBytes = kDim * sizeof(float);
  // Warps with a part of their own. The last warps have rows first (WindowTile), the first warps have nodes.
  static constexpr int kKeyRing = 1, kSmall = 2, kValueRing = 4, kRawKey = 0, kRawValue = 5;
  static constexpr int kKeyArrivals = 1 + kWarp + (kRaw ? kWarp : 0), kValueArrivals = 1 + (kRaw ? kWarp : 0);

  const AttentionParams& p;
  T *keys, *values;  // in shared memory
  float *queries, *taps;
  uint64_t* masks;
  CopyBarrier &keys_barrier, &values_barrier;

  __device__ __forceinline__ static int Lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ __forceinline__ static int Warp() { return static_cast<int>(threadIdx.x) / kWarp; }

  // What is older than the kernel before this one: rings, masks, taps, gains.
  __device__ __forceinline__ void OldKeys(const Item& item, RowInfo* rows) const {
    if (item.rows == 0) return;
    if (Warp() == kKeyRing && Lane() == 0) {
      keys_barrier.Copy(keys + item.history * kDim, item.ring, item.phase * kRowBytes);
    }
    if (Warp() == kSmall) CopySmall(item, rows);
  }
  __device__ __forceinline__ void OldValues(const Item& item) const {
    if (item.rows == 0 || Warp() != kValueRing || Lane() > 0) return;
    const T* ring =
        static_cast<const T*>(item.ring) + static_cast<int64_t>(p.layer.num_kv_heads) * p.layer.group_size * kDim;
    values_barrier.Copy(values + item.history * kDim, ring, item.phase * kRowBytes);
    values_barrier.Copy(values, ring + (p.layer.group_size - item.history) * kDim, item.history * kRowBytes);
  }

  // The rows of this step; then all that the barrier waits for is under way.
  __device__ __forceinline__ void NewKeys(const Item& item) const {
    if (Warp() == kSmall) {
      __syncwarp();  // masks that lanes stored themselves are older than this arrival, unlike copies
      const uint32_t of_rows = kRaw ? 0 : item.nodes * kRowBytes + item.rows * kQueryBytes;
      if (Lane() == 0) keys_barrier.Expect(item.rows > 0 ? item.phase * kRowBytes + of_rows : 0);
      keys_barrier.ArriveAfterCopies();
    }
    if constexpr (kRaw) {
      if (Warp() != kRawKey) return;
      if (item.rows > 0) TurnRow(item);
      keys_barrier.Arrive();
    } else {
      if (item.rows == 0 || Lane() > 0) return;
      CopyRows(keys, item, 0, keys_barrier);
      const float* q = p.qkv + item.out_begin * QueryStride() + item.kv_head * item.heads * kDim;
#pragma unroll 1
      for (int i = Warp(); i < item.rows; i += kWarps) {
        keys_barrier.Copy(queries + i * kQueryStride, q + item.NodeOf(i) * QueryStride() + item.HeadOf(i) * kDim,
                          kQueryBytes);
      }
    }
  }
  __device__ __forceinline__ void NewValues(const Item& item) const {
    if (Warp() == kValueRing && Lane() == 0) {
      const int tokens = item.ring_tokens() + (kRaw ? 0 : item.nodes);
      values_barrier.Expect(item.rows > 0 ? tokens * kRowBytes : 0);
    }
    if constexpr (kRaw) {
      if (Warp() != kRawValue) return;
      if (item.rows > 0) KeepValue(item);
      values_barrier.Arrive();
    } else {
      if (item.rows > 0 && Lane() == 0) CopyRows(values, item, p.layer.num_kv_heads, values_barrier);
    }
  }

 private:
  __device__ __forceinline__ void CopySmall(const Item& item, RowInfo* rows) const {
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
  // Keys, or values with the kv heads before them, of the warp's nodes.
  __device__ __forceinline__ void CopyRows(T* to, const Item& item, int heads_before, CopyBarrier& barrier) const {
    const KvRows<T> kv = p.Kv<T>();
    const T* from = kv.data + item.row_begin * kv.stride + (heads_before + item.kv_head) * kDim;
    to += item.ring_tokens() * kDim;
#pragma unroll 1
    for (int node = Warp(); node < item.nodes; node += kWarps) {
      barrier.Copy(to + node * kDim, from + node * kv.stride, kRowBytes);
    }
  }
};

}  // namespace linspec::cuda
