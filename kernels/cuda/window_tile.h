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

struct TileRow {
  uint64_t mask;  // ancestors
  int position, group, head;
  bool valid;
};

// Keys and values have rows of kStride floats: at most two of a warp's reads meet in a bank, in folds as well.
template <int kDim, int kRows>
struct WindowTile {
  static constexpr int kStride = kDim + 8, kQueryStride = kDim + 4, kChannels = kDim / 64;

  const Window& w;
  const TileRow* rows;              // [kRows]
  const float *keys, *values, *queries;  // [tokens], [tokens], [8]
  float *local, *grouped;           // weights [tokens][kRows]
  float* partial;                   // [kClasses][kRows][kDim]
  const int* node_position;         // [nodes]
  int tokens, history;              // of the window; its first `history` precede the open group

  __device__ __forceinline__ void Weigh(int row, int token, float score) const {
    const LayerParams& layer = w.layer;
    const TileRow& r = rows[row];
    const int node = token - w.ring_tokens();
    float a = 0.0f, b = 0.0f;
    if (r.valid && (node < 0 || (r.mask >> node & 1) != 0)) {
      const int key = node < 0 ? w.ring_begin + token : node_position[node], lag = r.position - key;
      const int key_group = node < 0 ? 0 : key / layer.group_size;
      if (token >= history && key_group == r.group) {
        const float positive = layer.local != 0 ? fmaxf(score, 0.0f) : 0.0f;
        a = positive * positive;
      } else if (token >= history && layer.global != Global::kNone) {
        b = Power(layer.decay != nullptr ? layer.decay[w.kv_head] : 1.0f, r.group - 1 - key_group) * score;
      }
      if (lag < layer.conv_kernel) a += layer.conv_taps[r.head * layer.conv_kernel + lag];
    }
    local[token * kRows + row] = a;
    grouped[token * kRows + row] = b;
  }

  // Weights of every token; keys and queries are in shared memory.
  __device__ __forceinline__ void Score() const {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int g = lane / 4, c = lane % 4;
    for (int i = static_cast<int>(threadIdx.x); i < history * kRows; i += kThreads) Weigh(i % kRows, i / kRows, 0.0f);
    for (int first = history + warp * 16; first < tokens; first += kThreads / 2) {
      const float* k0 = keys + min(first + g, tokens - 1) * kStride + 4 * c;
      const float* k1 = keys + min(first + g + 8, tokens - 1) * kStride + 4 * c;
      Accumulators sum;
#pragma unroll 2
      for (int d = 0; d < kDim; d += 16) {
        Vec4 x{0, 0, 0, 0};
        if (g < kRows) x = Load4(queries + g * kQueryStride + d + 4 * c);
        const Vec4 a = Load4(k0 + d), b = Load4(k1 + d);
        sum.Add(Split<4>({a.x, b.x, a.y, b.y}), Split<2>({x.x, x.y}));
        sum.Add(Split<4>({a.z, b.z, a.w, b.w}), Split<2>({x.z, x.w}));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 2 * c + i % 2, token = first + g + i / 2 * 8;
        if (row < kRows && token < tokens) Weigh(row, token, sum[i]);
      }
    }
  }

  __device__ __forceinline__ void AddToken(const float* weights, int token, float (&sum)[kRows][kChannels]) const {
    const int channel = Channel();
    float v[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) v[i] = values[token * kStride + channel + i];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sum[row][i] = fmaf(weights[token * kRows + row], v[i], sum[row][i]);
    }
  }

  // partial = sums of the weighted values; `seen` holds the nodes that any row of the tile sees.
  __device__ __forceinline__ void Accumulate(const float* weights, uint64_t seen) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, own = static_cast<int>(threadIdx.x) / 32 % kClasses;
    float sum[kRows][kChannels] = {};
    const int ring = w.ring_tokens(), nodes = tokens - ring;
#pragma unroll 2
    for (int token = (own - w.ring_begin) & (kClasses - 1); token < ring; token += kClasses) {
      AddToken(weights, token, sum);
    }
    for (int begin = 0; begin < nodes; begin += 32) {
      const int node = begin + lane;
      const bool mine = node < nodes && (seen >> node & 1) != 0 && (node_position[node] & (kClasses - 1)) == own;
      for (unsigned set = __ballot_sync(0xFFFFFFFFu, mine); set != 0; set &= set - 1) {
        AddToken(weights, ring + begin + __ffs(static_cast<int>(set)) - 1, sum);
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) partial[(own * kRows + row) * kDim + Channel() + i] = sum[row][i];
    }
  }

 private:
  __device__ __forceinline__ static int Channel() {
    return static_cast<int>(threadIdx.x) / 128 * (kDim / 2) + static_cast<int>(threadIdx.x) % 32 * kChannels;
  }
};

}  // namespace linspec::cuda
