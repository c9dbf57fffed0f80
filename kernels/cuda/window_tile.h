// The window product of one tile of query rows on a block of 8 warps: scores on the tensor cores, weighted values as
// fp32 FMAs in the order of the tokens.
//
// Rows of a tile are (node, query head) pairs of one kv head, node-major. Token t of the window (ring, then tree rows
// of the call) has its key and value in shared memory at row t. A row's ancestors stand by ascending position, and
// tokens of weight 0 change no bit: so a row's bits depend on its own path only.
#pragma once

#include "kernels/cuda/state_element.h"
#include "kernels/cuda/verify_item.h"

namespace linspec::cuda {

struct QueryRow {
  uint64_t mask;  // ancestors; 0: no such row
  int position, group;
  const float* taps;
};

template <int kDim, int kRows, typename T>
struct WindowTile {
  // Keys and values lie as in the ring, for copies in one piece: two of a warp's reads meet in a bank.
  static constexpr int kStride = kDim, kQueryStride = kDim + 4;
  // Of the sums, a thread has one channel of kThreadRows rows; with one row, half or more of the warps have none.
  static constexpr int kChannelWarps = kDim / 32, kRowGroups = kThreads / 32 / kChannelWarps;
  static constexpr int kThreadRows = kRows == 1 ? 1 : kRows / kRowGroups;
  static constexpr int kTiles = (kRows + 7) / 8;  // of 8 rows, the columns of an instruction

  const LayerParams& layer;
  const Item& item;
  const RowInfo* rows;     // [rows of the item]
  const T *keys, *values;  // [tokens]
  const float* queries;    // [rows of the item]
  const uint64_t* masks;   // [nodes]
  const float* taps;       // [heads, conv_kernel]
  float *local, *grouped;  // weights [tokens][kRows]; the latter where a row may cross a group's end
  int* folds;              // [kRows] groups that a row stands past the open one
  int group_shift;         // log2 of the group size

  __device__ __forceinline__ static int Channel() {
    return static_cast<int>(threadIdx.x) / 32 % kChannelWarps * 32 + static_cast<int>(threadIdx.x) % 32;
  }
  __device__ __forceinline__ static int FirstRow() {
    return static_cast<int>(threadIdx.x) / 32 / kChannelWarps * kThreadRows;
  }

  // A warp has 16 tokens: row i of a product is token FirstToken() + i, its columns are the query rows.
  static_assert((2 * kMaxNodes + 15) / 16 <= kThreads / 32);
  __device__ __forceinline__ static int FirstToken() { return static_cast<int>(threadIdx.x) / 32 * 16; }

  __device__ __forceinline__ void Score(PreciseSums (&sum)[kTiles]) const {
    const int g = static_cast<int>(threadIdx.x) % 32 / 4, c = static_cast<int>(threadIdx.x) % 4;
    const int first = FirstToken(), last = item.tokens() - 1;
    if (first > last || first + 15 < item.history) return;  // the history has taps only
    const T* k0 = keys + min(first + g, last) * kStride;
    const T* k1 = keys + min(first + g + 8, last) * kStride;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int d = 8 * c; d < kDim; d += 32) AddScores(k0, k1, d, sum);
    } else {
#pragma unroll
      for (int d = 4 * c; d < kDim; d += 16) AddScores(k0, k1, d, sum);
    }
  }

  // Scores become the weights of every token for every row.
  __device__ __forceinline__ void Weigh(const PreciseSums (&scores)[kTiles]) const {
    if (FirstToken() >= item.tokens()) return;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int row = 8 * tile + 2 * (static_cast<int>(threadIdx.x) % 4);
      const QueryRow r[2] = {Row(row), Row(row + 1)};
      if (threadIdx.x < 4) {
        if (row < kRows) folds[row] = r[0].group;
        if (row + 1 < kRows) folds[row + 1] = r[1].group;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = FirstToken() + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * half;
        const float score[2] = {scores[tile][2 * half], scores[tile][2 * half + 1]};
        if (token < item.tokens() && row < kRows) WeighToken(r, row, token, score);
      }
    }
  }

  // The thread's channel of the weighted values of its rows.
  __device__ __forceinline__ void Accumulate(const float* weights, float (&sum)[kThreadRows]) const {
    const T* v = values + Channel();
    const float* w = weights + FirstRow();
    const int tokens = item.tokens();
#pragma unroll 4
    for (int token = 0; token < tokens; ++token) {
      const float value = Widen(v[token * kStride]);
      float weight[kThreadRows];
      if constexpr (kThreadRows >= 4) {
#pragma unroll
        for (int row = 0; row < kThreadRows; row += 4) {
          const Vec4 x = Load4(w + token * kRows + row);
          weight[row] = x.x, weight[row + 1] = x.y, weight[row + 2] = x.z, weight[row + 3] = x.w;
        }
      } else if constexpr (kThreadRows == 2) {
        const float2 x = *reinterpret_cast<const float2*>(w + token * kRows);
        weight[0] = x.x, weight[1] = x.y;
      } else {
        weight[0] = w[token * kRows];
      }
#pragma unroll
      for (int row = 0; row < kThreadRows; ++row) sum[row] = fmaf(weight[row], value, sum[row]);
    }
  }

 private:
  __device__ __forceinline__ int Position(int node) const { return item.phase + __popcll(masks[node]) - 1; }

  __device__ __forceinline__ QueryRow Row(int index) const {
    if (index >= item.rows) return {0, 0, 0, taps};
    const RowInfo& row = rows[index];
    const uint64_t mask = masks[row.node];
    const int position = item.phase + __popcll(mask) - 1;
    return {mask, position, position >> group_shift, taps + row.head * layer.conv_kernel};
  }

  // Channels d to d + 3 of the lane: two steps of the tensor cores.
  __device__ __forceinline__ void AddScores(const float* k0, const float* k1, int d, PreciseSums (&sum)[kTiles]) const {
    const Vec4 a = Load4(k0 + d), b = Load4(k1 + d);
    const Split<4> even({a.x, b.x, a.y, b.y}), odd({a.z, b.z, a.w, b.w});
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const Vec4 x = Query(tile, d);
      sum[tile].Add(even, Split<2>({x.x, x.y}));
      sum[tile].Add(odd, Split<2>({x.z, x.w}));
    }
  }
  // Channels d to d + 7 of the lane: four steps.
  __device__ __forceinline__ void AddScores(const uint16_t* k0, const uint16_t* k1, int d,
                                            PreciseSums (&sum)[kTiles]) const {
    const uint4 a = *reinterpret_cast<const uint4*>(k0 + d), b = *reinterpret_cast<const uint4*>(k1 + d);
    const ExactOperand keys[4] = {OfColumnPairs(a.x, b.x), OfColumnPairs(a.y, b.y), OfColumnPairs(a.z, b.z),
                                  OfColumnPairs(a.w, b.w)};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const Vec4 x = Query(tile, d), y = Query(tile, d + 4);
      sum[tile].Add(keys[0], Split<2>({x.x, x.y}));
      sum[tile].Add(keys[1], Split<2>({x.z, x.w}));
      sum[tile].Add(keys[2], Split<2>({y.x, y.y}));
      sum[tile].Add(keys[3], Split<2>({y.z, y.w}));
    }
  }
  __device__ __forceinline__ Vec4 Query(int tile, int d) const {
    return Load4(queries + min(8 * tile + static_cast<int>(threadIdx.x) % 32 / 4, kRows - 1) * kQueryStride + d);
  }

  // Two rows' weights of one token.
  __device__ __forceinline__ void WeighToken(const QueryRow (&r)[2], int row, int token,
                                             const float (&score)[2]) const {
    const int node = token - item.ring_tokens();
    const int key = node < 0 ? token - item.history : Position(node);
    const bool crosses = item.may_cross(layer.group_size);
    float a[2], b[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool seen = node < 0 ? r[i].mask != 0 : (r[i].mask >> node & 1) != 0;
      const int lag = r[i].position - key;
      a[i] = seen && layer.local != 0 && token >= item.history ? fmaxf(score[i], 0.0f) : 0.0f;
      a[i] *= a[i];
      if (crosses) MoveAcross(r[i].group, key >> group_shift, seen && token >= item.history, score[i], a[i], b[i]);
      if (seen && lag < layer.conv_kernel) a[i] += r[i].taps[lag];
    }
    if constexpr (kRows == 1) {
      local[token] = a[0];
      if (crosses) grouped[token] = b[0];
    } else {
      *reinterpret_cast<float2*>(local + token * kRows + row) = make_float2(a[0], a[1]);
      if (crosses) *reinterpret_cast<float2*>(grouped + token * kRows + row) = make_float2(b[0], b[1]);
    }
  }

  // A token of a group that the row's position has left behind counts in z (`b`) instead of y (`a`).
  __device__ __forceinline__ void MoveAcross(int group, int key_group, bool counts, float score, float& a,
                                             float& b) const {
    if (key_group == group) return;
    a = 0.0f;
    if (!counts || layer.global == Global::kNone) return;
    b = score;
    if (layer.decay == nullptr) return;
#pragma unroll 1
    for (int passed = group - 1 - key_group; passed > 0; --passed) b *= layer.decay[item.kv_head];
  }
};

}  // namespace linspec::cuda
