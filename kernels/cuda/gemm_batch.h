// A warp's part of a matrix product whose weights pass through registers: which k it sums, and its loads and products.
#pragma once

#include "kernels/cuda/gemm_tile.h"

namespace linspec::cuda {

inline constexpr int kBatch = 8;  // steps in registers

// A warp's share of the product: which k, and how much of it exists for this lane.
template <int kType>
struct Range {
  static constexpr int kParts = WeightTraits<kType>::kParts;
  static constexpr int kStepDepth = 32 * kParts;  // k of a step
  int begin, count;                               // steps
  int valid;                                      // steps of which this lane's 16 bytes lie inside the row

  __device__ Range(const LinspecCudaMatrix& w, int range) {
    const int steps = NumSteps(w), lane_byte = threadIdx.x % 4 * 16;
    begin = RangeBegin(steps, range);
    count = RangeBegin(steps, range + 1) - begin;
    const int64_t bytes = w.cols * 2 / kParts - int64_t{begin} * kStepBytes - lane_byte;
    valid = static_cast<int>(min(int64_t{count}, (bytes + kStepBytes - 1) / kStepBytes));
  }
  __device__ int batches() const { return (count + kBatch - 1) / kBatch; }
};

// kBatch steps of a tile in registers.
template <int kType>
struct Batch {
  uint4 low[kBatch], high[kBatch];  // rows g and g + 8

  __device__ __forceinline__ void Load(const LinspecCudaMatrix& w, const Range<kType>& range, int64_t tile, int first) {
    const int g = threadIdx.x % kWarpSize / 4, s = threadIdx.x % 4;
    const int64_t pitch = w.cols * 2 / Range<kType>::kParts, row = tile * kTileRows + g;
    const char* base = static_cast<const char*>(w.data) + int64_t{range.begin + first} * kStepBytes + s * 16;
    const char* low_row = base + min(row, w.rows - 1) * pitch;
    const char* high_row = base + min(row + 8, w.rows - 1) * pitch;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const bool inside = first + u < range.valid;
      low[u] = inside ? __ldcs(reinterpret_cast<const uint4*>(low_row + u * kStepBytes)) : uint4{};
      high[u] = inside ? __ldcs(reinterpret_cast<const uint4*>(high_row + u * kStepBytes)) : uint4{};
    }
  }

  // x(step, part, t): the lane's 8 values of token tile t.
  template <int kTiles, typename X>
  __device__ __forceinline__ void Multiply(int first, int count, const X& x, float (&sums)[kTiles][4]) const {
    constexpr int kParts = Range<kType>::kParts;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (first + u >= count) return;
      uint32_t a[4 * kParts], b[4 * kParts];
      WeightTraits<kType>::Widen(low[u], a);
      WeightTraits<kType>::Widen(high[u], b);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        uint4 tokens[kTiles];
        const int i = part * 4;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) tokens[t] = x(first + u, part, t);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) Mma(sums[t], a[i], b[i], a[i + 1], b[i + 1], tokens[t].x, tokens[t].y);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) Mma(sums[t], a[i + 2], b[i + 2], a[i + 3], b[i + 3], tokens[t].z, tokens[t].w);
      }
    }
  }
};

}  // namespace linspec::cuda
