// The window product of one tile of query rows on a block of 8 warps: scores on the tensor cores, weights in
// registers, weighted values as fp32 FMAs in an order fixed by absolute positions.
//
// Rows of a tile are (node, query head) pairs of one kv head, node-major. Token t of the window (ring, then tree rows
// of the call) has its key and value in shared memory at row t. Values are summed in four classes, position mod 4,
// each by ascending position, then class 0 to 3: a token enters the sum at the same place whether it comes from the
// ring or is an ancestor in the tree, and tokens of weight 0 change no bit. So a row's bits depend on its own path only.
#pragma once

#include "kernels/cuda/state_fragment.h"
#include "kernels/cuda/window_attention.h"

namespace linspec::cuda {

inline constexpr int kClasses = 4;

// What one block works on at a time: some rows of one request and kv head. Positions are relative to the first of the
// open group; ring tokens before it are the history, which only taps reach.
struct Item {
  int kv_head, heads, first_row, rows;  // heads: query heads of the kv head; rows: of the item
  int phase, history, nodes;            // nodes: of the request that any row of the item can see
  bool folded;                          // S holds at least one group

  __device__ Item() {}
  // last_rows: as AttentionParams; 0: all.
  __device__ __forceinline__ Item(const LayerParams& layer, const Task& task, int index, int splits, int split_rows,
                                  int last_rows) {
    kv_head = index / splits % layer.num_kv_heads;
    heads = layer.num_heads / layer.num_kv_heads;
    first_row = (last_rows > 0 ? max(0, task.num_rows - last_rows) : 0) * heads + index % splits * split_rows;
    rows = task.slot < 0 ? 0 : max(0, min(split_rows, task.num_rows * heads - first_row));
    nodes = (first_row + rows - 1) / heads + 1;
    phase = static_cast<int>(task.length & (layer.group_size - 1));
    folded = task.length >= layer.group_size;
    history = folded ? max(0, layer.conv_kernel - 1 - phase) : 0;
  }
  __device__ __forceinline__ int ring() const { return phase + history; }
  __device__ __forceinline__ int tokens() const { return ring() + nodes; }
};

struct QueryRow {
  uint64_t mask;  // ancestors
  int position, group;
  bool valid;
};

template <int kDim, int kRows>
struct WindowTile {
  // Keys and values lie as in the ring, for copies in one piece: two of a warp's reads meet in a bank.
  static constexpr int kStride = kDim, kQueryStride = kDim + 4, kChannels = kDim / 64;

  const LayerParams& layer;
  const Item& item;
  const float *keys, *values, *queries;  // [tokens], [tokens], [rows of the item]
  const uint64_t* masks;                 // [nodes]
  const float* taps;                     // [heads, conv_kernel]
  float *local, *grouped;                // weights [tokens][kRows]
  float* partial;                        // [kClasses][kRows][kDim]
  int group_shift;                       // log2 of the group size

  __device__ __forceinline__ int Position(int node) const { return item.phase + __popcll(masks[node]) - 1; }

  __device__ __forceinline__ QueryRow Row(int row) const {
    QueryRow result{0, 0, 0, row < item.rows};
    if (!result.valid) return result;
    result.mask = masks[(item.first_row + row) / item.heads];
    result.position = item.phase + __popcll(result.mask) - 1;
    result.group = result.position >> group_shift;
    return result;
  }

  // Scores of every token for every row, two halves of the channels apart: in `local` and `grouped`.
  __device__ __forceinline__ void Score() const {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, c = lane % 4, last = item.tokens() - 1;
    const int begin = item.history & ~15;
#pragma unroll 1
    for (int unit = static_cast<int>(threadIdx.x) / 32; begin + unit / 2 * 16 <= last; unit += kThreads / 32) {
      const int first = begin + unit / 2 * 16, channel = unit % 2 * (kDim / 2) + 4 * c;
      const float* k0 = keys + min(first + g, last) * kStride + channel;
      const float* k1 = keys + min(first + g + 8, last) * kStride + channel;
      const float* q = queries + min(g, kRows - 1) * kQueryStride + channel;
      Accumulators sum;
#pragma unroll 1
      for (int d = 0; d < kDim / 2; d += 16) AddProduct(Load4(k0 + d), Load4(k1 + d), Load4(q + d), sum);
      float* out = unit % 2 == 0 ? local : grouped;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = first + g + i / 2 * 8, row = 2 * c + i % 2;
        if (row < kRows && token <= last) out[token * kRows + row] = sum[i];
      }
    }
  }

  // Scores become weights in y (`local`) and in z (`grouped`).
  __device__ __forceinline__ void Weigh() const {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < item.tokens() * kRows; i += kThreads) {
      const int token = i / kRows, node = token - item.ring();
      const QueryRow r = Row(i % kRows);
      float a = 0.0f, b = 0.0f;
      if (r.valid && (node < 0 || (r.mask >> node & 1) != 0)) {
        const int key = node < 0 ? token - item.history : Position(node), lag = r.position - key;
        const float score = local[i] + grouped[i];
        if (token >= item.history && key >> group_shift == r.group) {
          const float positive = layer.local != 0 ? fmaxf(score, 0.0f) : 0.0f;
          a = positive * positive;
        } else if (token >= item.history && layer.global != Global::kNone) {
          const int folds = r.group - 1 - (key >> group_shift);
          b = folds > 0 && layer.decay != nullptr ? Power(layer.decay[item.kv_head], folds) * score : score;
        }
        if (lag < layer.conv_kernel) {
          a += taps[(item.first_row + i % kRows) % item.heads * layer.conv_kernel + lag];
        }
      }
      local[i] = a;
      grouped[i] = b;
    }
  }

  // partial = sums of the weighted values; `seen` holds the nodes that any row of the tile sees.
  __device__ __forceinline__ void Accumulate(const float* weights, uint64_t seen) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, own = static_cast<int>(threadIdx.x) / 32 % kClasses;
    float sum[kRows][kChannels] = {};
    const int ring = item.ring();
#pragma unroll 2
    for (int token = (own + item.history) & (kClasses - 1); token < ring; token += kClasses) {
      AddToken(weights, token, sum);
    }
#pragma unroll 1
    for (int begin = 0; begin < item.nodes; begin += 32) {
      const int node = begin + lane;
      const bool mine = node < item.nodes && (seen >> node & 1) != 0 && (Position(node) & (kClasses - 1)) == own;
      for (unsigned set = __ballot_sync(0xFFFFFFFFu, mine); set != 0; set &= set - 1) {
        AddToken(weights, ring + begin + __ffs(static_cast<int>(set)) - 1, sum);
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float* out = partial + (own * kRows + row) * kDim + Channel();
      if constexpr (kChannels == 2) {
        *reinterpret_cast<float2*>(out) = make_float2(sum[row][0], sum[row][1]);
      } else {
        *out = sum[row][0];
      }
    }
  }

 private:
  __device__ __forceinline__ static int Channel() {
    return static_cast<int>(threadIdx.x) / 128 * (kDim / 2) + static_cast<int>(threadIdx.x) % 32 * kChannels;
  }
  __device__ __forceinline__ static void AddProduct(const Vec4& a, const Vec4& b, const Vec4& q, Accumulators& sum) {
    sum.Add(Split<4>({a.x, b.x, a.y, b.y}), Split<2>({q.x, q.y}));
    sum.Add(Split<4>({a.z, b.z, a.w, b.w}), Split<2>({q.z, q.w}));
  }
  __device__ __forceinline__ void AddToken(const float* weights, int token, float (&sum)[kRows][kChannels]) const {
    float v[kChannels], weight[kRows];
    if constexpr (kChannels == 2) {
      const float2 x = *reinterpret_cast<const float2*>(values + token * kStride + Channel());
      v[0] = x.x;
      v[1] = x.y;
    } else {
      v[0] = values[token * kStride + Channel()];
    }
    if constexpr (kRows == 1) {
      weight[0] = weights[token];
    } else {
#pragma unroll
      for (int i = 0; i < kRows; i += 4) {
        const Vec4 x = Load4(weights + token * kRows + i);
        weight[i] = x.x;
        weight[i + 1] = x.y;
        weight[i + 2] = x.z;
        weight[i + 3] = x.w;
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sum[row][i] = fmaf(weight[row], v[i], sum[row][i]);
    }
  }
};

}  // namespace linspec::cuda
