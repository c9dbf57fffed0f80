// What a block of tree_verify works on, and the copies that bring an item's window to shared memory.
#pragma once

#include "kernels/cuda/rope.h"
#include "kernels/cuda/tensor_core.h"
#include "kernels/cuda/window_attention.h"

namespace linspec::cuda {

struct VerifyWork {
  int items;
  int tokens;                        // capacity of a window: ring and nodes
  unsigned splits, kv_heads, heads;  // tiles of the largest task; kv heads; query heads of one
  int query_stride, kv_stride;       // of rows, in elements
  bool pairs = false;                // more blocks than multiprocessors
  unsigned splits_inverse = Inverse(splits), kv_heads_inverse = Inverse(kv_heads), heads_inverse = Inverse(heads);

  // index / value, of an index below 2^32 / value. multiply: the device's own division takes a hundred cycles, but
  // leaves S its registers where rows are single.
  __device__ __forceinline__ static unsigned Quotient(unsigned index, unsigned value, unsigned inverse, bool multiply) {
    if (!multiply) return index / value;
    return value == 1 ? index : __umulhi(index, inverse);
  }
  static unsigned Inverse(unsigned value) { return static_cast<unsigned>(((uint64_t{1} << 32) + value - 1) / value); }
};

// Some rows of one request and kv head. Positions are relative to the first of the open group; ring tokens before it
// are the history, which only taps reach.
struct Item {
  const void* state;                    // S of the head; base of all states where S is not read
  const void* ring;                     // keys of the head; its values follow all heads' keys
  int kv_head, heads, first_row, rows;  // heads: query heads of the kv head; rows: of the item, 0: nothing to do
  int phase, history, nodes;            // nodes: of the request that any row of the item can see
  int row_begin, out_begin;             // of the request: its first row of k and v; of queries and outputs
  const void* keys;                     // k of that first row; its v follows all heads' k
  const float* queries;                 // of the first row of queries, from the kv head's first query head on
  bool reads_state;

  __device__ Item() {}
  __device__ __forceinline__ Item(const AttentionParams& p, const Task& task, int index, const VerifyWork& work,
                                  int tile) {
    const LayerParams& layer = p.layer;
    const bool multiply = tile > 1;
    const unsigned place =
        VerifyWork::Quotient(static_cast<unsigned>(index), work.splits, work.splits_inverse, multiply);
    const unsigned task_index = VerifyWork::Quotient(place, work.kv_heads, work.kv_heads_inverse, multiply);
    kv_head = static_cast<int>(place - task_index * work.kv_heads);
    heads = static_cast<int>(work.heads);
    const int split = index - static_cast<int>(place * work.splits);
    first_row = (p.last_rows > 0 ? max(0, task.num_rows - p.last_rows) : 0) * heads + split * tile;
    rows = task.slot < 0 ? 0 : max(0, min(tile, task.num_rows * heads - first_row));
    nodes = rows > 0 ? NodeOf(rows - 1, work, multiply) + 1 : 0;
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
    const void* kv = p.kv != nullptr ? p.kv : p.qkv + layer.num_heads * d;
    keys = static_cast<const char*>(kv) + (int64_t{row_begin} * work.kv_stride + kv_head * d) * size;
    queries = p.qkv + int64_t{out_begin} * work.query_stride + kv_head * heads * d;
  }
  __device__ __forceinline__ int ring_tokens() const { return phase + history; }
  __device__ __forceinline__ int tokens() const { return ring_tokens() + nodes; }
  __device__ __forceinline__ int NodeOf(int row, const VerifyWork& work, bool multiply) const {  // of a row of the item
    const auto index = static_cast<unsigned>(first_row + row);
    if (!multiply && heads == 1) return static_cast<int>(index);
    return static_cast<int>(VerifyWork::Quotient(index, static_cast<unsigned>(heads), work.heads_inverse, multiply));
  }
  // Some row of the item may stand past the end of the open group.
  __device__ __forceinline__ bool may_cross(int group_size) const { return phase + nodes > group_size; }
};

struct RowInfo {   // of a row of an item
  int node, head;  // head: in the kv head's group
  int out;         // row of d channels in the output
  int query;       // from Item::queries on
  float gain;      // Global::kRmsNorm
};

// How the rows of the step come to shared memory.
enum class RowCopies {
  kRaw,   // AttentionParams::raw, one an item: a warp turns and stores them
  kBulk,  // of items of one row
  kLanes  // a bulk copy keeps its warp for 60 cycles: of items of many rows
};

// Copies of an item to shared memory, started by all warps of a block: rings in bulk, masks, taps and gains by the
// lanes of one warp. Where bulk copies and others write in turn, as with kRaw, a fence orders them, which waits for all
// that its warp has under way, parts of S among it. So rows come in bulk too, or to a place that no ring ever takes:
// with kLanes they stand at the group's size in a window, and what the ring has of it before them.
template <int kDim, typename T, RowCopies kCopies, int kQueryStride>
struct WindowFetch {
  static constexpr bool kRaw = kCopies == RowCopies::kRaw, kLanes = kCopies == RowCopies::kLanes;
  static constexpr int kWarp = 32, kWarps = kThreads / kWarp;
  static constexpr uint32_t kRowBytes = kDim * sizeof(T), kQueryBytes = kDim * sizeof(float);
  // Warps with a part of their own. The last warps have rows first (WindowTile), the first warps have nodes.
  static constexpr int kKeyRing = 1, kSmall = 2, kValueRing = 4, kRawKey = 0, kRawValue = 5;
  static constexpr int kRowArrivals = kLanes ? kThreads : kRaw ? kWarp : 0;
  static constexpr int kKeyArrivals = 1 + kRowArrivals + (kLanes ? 0 : kWarp), kValueArrivals = 1 + kRowArrivals;

  const AttentionParams& p;
  const VerifyWork& work;
  T *keys, *values;  // in shared memory
  float *queries, *taps;
  uint64_t* masks;
  CopyBarrier &keys_barrier, &values_barrier;

  __device__ __forceinline__ static int Lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ __forceinline__ static int Warp() { return static_cast<int>(threadIdx.x) / kWarp; }

  // Place of the item's first token in its window.
  __device__ __forceinline__ static int First(const Item& item, const LayerParams& layer) {
    return kLanes ? layer.group_size - item.ring_tokens() : 0;
  }

  // What is older than the kernel before this one: rings, masks, taps, gains.
  __device__ __forceinline__ void OldKeys(const Item& item, RowInfo* rows) const {
    if (Warp() == kKeyRing && Lane() == 0 && item.rows > 0) {
      keys_barrier.Copy(keys + (First(item, p.layer) + item.history) * kDim, item.ring, item.phase * kRowBytes);
    }
    if (Warp() != kSmall) return;
    if (item.rows > 0) CopySmall(item, rows);
    if constexpr (kLanes) ExpectKeys(item, 0);
  }
  __device__ __forceinline__ void OldValues(const Item& item) const {
    if (Warp() != kValueRing || Lane() > 0) return;
    if constexpr (kLanes) values_barrier.Expect(item.rows > 0 ? item.ring_tokens() * kRowBytes : 0);
    if (item.rows == 0) return;
    const T* ring =
        static_cast<const T*>(item.ring) + static_cast<int64_t>(p.layer.num_kv_heads) * p.layer.group_size * kDim;
    T* to = values + First(item, p.layer) * kDim;
    values_barrier.Copy(to + item.history * kDim, ring, item.phase * kRowBytes);
    values_barrier.Copy(to, ring + (p.layer.group_size - item.history) * kDim, item.history * kRowBytes);
  }

  // kLanes: the lane's part of the warp's first rows, found before the kernel ahead has ended.
  struct Rows {
    const T* key;        // of node Warp()
    const float* query;  // of row Warp(), where there is one
    int nodes, rows;
  };
  __device__ __forceinline__ Rows RowsOf(const Item& item, const RowInfo* rows) const {
    if constexpr (kLanes) {
      const auto key = static_cast<unsigned>(Warp() * work.kv_stride + Lane() * kOwn<T>);
      Rows own = {static_cast<const T*>(item.keys) + key, nullptr, item.nodes, item.rows};
      if (Warp() < own.rows) own.query = QueryOf(item, rows[Warp()]);
      return own;
    } else {
      return {};
    }
  }

  // The rows of this step; then all that the barrier waits for is under way.
  __device__ __forceinline__ void NewKeys(const Item& item, const RowInfo* rows, const Rows& own) const {
    if (!kLanes && Warp() == kSmall) {
      ExpectKeys(item, kRaw ? 0 : item.nodes * kRowBytes + item.rows * kQueryBytes);
      keys_barrier.ArriveAfterCopies();
    }
    if constexpr (kRaw) {
      if (Warp() != kRawKey) return;
      if (item.rows > 0) TurnRow(item);
      keys_barrier.Arrive();
    } else if constexpr (kLanes) {
      CopyNodes(keys, own.key, own.nodes);
      const float* query = own.query;
#pragma unroll 1
      for (int i = Warp(); i < own.rows;) {
        CopyRow(queries + i * kQueryStride, query);
        if ((i += kWarps) < own.rows) query = QueryOf(item, rows[i]);
      }
      keys_barrier.ArriveAfterCopies();
    } else {
      if (item.rows == 0 || Lane() > 0) return;
      CopyRows(keys, item, 0, keys_barrier);
#pragma unroll 1
      for (int i = Warp(); i < item.rows; i += kWarps) {
        keys_barrier.Copy(queries + i * kQueryStride, item.queries + rows[i].query, kQueryBytes);
      }
    }
  }
  __device__ __forceinline__ void NewValues(const Item& item, const Rows& own) const {
    if (!kLanes && Warp() == kValueRing && Lane() == 0) {
      const int tokens = item.ring_tokens() + (kRaw ? 0 : item.nodes);
      values_barrier.Expect(item.rows > 0 ? tokens * kRowBytes : 0);
    }
    if constexpr (kRaw) {
      if (Warp() != kRawValue) return;
      if (item.rows > 0) KeepValue(item);
      values_barrier.Arrive();
    } else if constexpr (kLanes) {
      CopyNodes(values, own.key + p.layer.num_kv_heads * kDim, own.nodes);
      values_barrier.ArriveAfterCopies();
    } else {
      if (item.rows > 0 && Lane() == 0) CopyRows(values, item, p.layer.num_kv_heads, values_barrier);
    }
  }

 private:
  template <typename E>
  static constexpr int kOwn = 16 / sizeof(E);  // elements of a lane of a row

  // By kSmall. Masks that lanes stored themselves are older than this arrival, unlike copies.
  __device__ __forceinline__ void ExpectKeys(const Item& item, uint32_t of_rows) const {
    __syncwarp();
    if (Lane() == 0) keys_barrier.Expect(item.rows > 0 ? item.phase * kRowBytes + of_rows : 0);
  }
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
  // Query and key of the row, which is also kept.
  __device__ __forceinline__ void TurnRow(const Item& item) const {
    RopeLane<kDim == 128> q, k, angles;
    const float* row = p.qkv + int64_t{item.row_begin} * work.query_stride;
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
    v.Load(p.qkv + int64_t{item.row_begin} * work.query_stride +
               (p.layer.num_heads + p.layer.num_kv_heads + item.kv_head) * kDim,
           Lane(), kDim / 2);
    Keep(v, item, p.layer.num_kv_heads, values);
  }
  __device__ __forceinline__ void Keep(const RopeLane<kDim == 128>& x, const Item& item, int heads_before,
                                       T* to) const {
    T* kept = static_cast<T*>(p.raw.kv) + int64_t{2} * item.row_begin * p.layer.num_kv_heads * kDim;
    x.Store(to + item.ring_tokens() * kDim, Lane(), kDim / 2);
    x.Store(kept + (heads_before + item.kv_head) * kDim, Lane(), kDim / 2);
  }
  __device__ __forceinline__ static const float* QueryOf(const Item& item, const RowInfo& row) {
    return item.queries + static_cast<unsigned>(row.query + Lane() * kOwn<float>);
  }
  // By the warp; from: of the lane.
  template <typename E>
  __device__ __forceinline__ static void CopyRow(E* to, const E* from) {
    if (kDim / kOwn<E> == kWarp || Lane() < kDim / kOwn<E>) CopyAsync16(to + Lane() * kOwn<E>, from);
  }
  // Keys or values of the warp's nodes. from: the lane's part of the first.
  __device__ __forceinline__ void CopyNodes(T* to, const T* from, int nodes) const {
    to += p.layer.group_size * kDim;
#pragma unroll 1
    for (int node = Warp(); node < nodes; node += kWarps, from += kWarps * work.kv_stride) {
      CopyRow(to + node * kDim, from);
    }
  }
  // Keys, or values with the kv heads before them, of the warp's nodes.
  __device__ __forceinline__ void CopyRows(T* to, const Item& item, int heads_before, CopyBarrier& barrier) const {
    const T* from = static_cast<const T*>(item.keys) + heads_before * kDim;
    to += item.ring_tokens() * kDim;
#pragma unroll 1
    for (int node = Warp(); node < item.nodes; node += kWarps) {
      barrier.Copy(to + node * kDim, from + node * work.kv_stride, kRowBytes);
    }
  }
};

}  // namespace linspec::cuda
