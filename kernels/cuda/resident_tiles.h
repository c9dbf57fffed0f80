// A block's tiles of a matrix that stay in shared memory, and their products with up to eight tokens: the bits of
// gemm_tile.h, whose lanes these are (rows g and g + 8 of a tile, slice s of a step, tokens 2 s and 2 s + 1 of a sum).
// The block has kSplit warps, the ranges of k; warp t ends tile t.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/gemm_tile.h"
#include "kernels/cuda/recurrent.h"
#include "kernels/cuda/tensor_core.h"

namespace linspec::cuda {

inline constexpr int kMostResidentTiles = kSplit;  // of a matrix in a block

// Pitches such that 8 lanes that read 16 bytes each, of two rows, meet 32 banks: of weights, and of tokens in bf16.
inline int ResidentPitch(int64_t row_bytes) { return static_cast<int>((row_bytes + 127) / 128 * 128) + 64; }
inline int TokenPitch(int64_t values, bool bf16_weights) {
  return static_cast<int>((values * 2 + 127) / 128 * 128) + (bf16_weights ? 64 : 16);
}

template <int kType>
struct ResidentTiles {
  static constexpr int kParts = WeightTraits<kType>::kParts;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, g = lane / 4, s = lane % 4;
  int first, count;         // tiles of the matrix
  int row;                  // of the tile that this warp ends, this lane's first one
  int pitch, steps, valid;  // steps of this warp's range of k, and of them those with weights for this lane
  int token_offset;         // bytes to the first of them, for this lane, in a row of tokens
  const uint8_t* weights;   // of it in the block's first tile
  float scales[2] = {1.0f, 1.0f};

  // The rank-th part of w. Asks for the weights as one group of copies.
  __device__ ResidentTiles(const LinspecCudaMatrix& w, const ResidentPlan& plan, int rank, uint8_t* memory)
      : first(rank * plan.tiles), pitch(plan.pitch) {
    const int all = NumSteps(w), begin = RangeBegin(all, warp);
    const int row_bytes = static_cast<int>(w.cols) * 2 / kParts;
    count = max(0, min(plan.tiles, static_cast<int>((w.rows + kTileRows - 1) / kTileRows) - first));
    row = (first + warp) * kTileRows + g;
    steps = RangeBegin(all, warp + 1) - begin;
    valid = min(steps, (row_bytes - begin * kStepBytes - s * 16 + kStepBytes - 1) / kStepBytes);
    token_offset = (begin * kStepBytes + s * 16) * kParts;
    weights = memory + plan.offset + g * pitch + begin * kStepBytes + s * 16;
    Fetch(w, row_bytes, memory + plan.offset);
    for (int half = 0; half < 2 && w.scales != nullptr && warp < count; ++half) {
      scales[half] = row + half * 8 < w.rows ? __ldg(w.scales + row + half * 8) : 1.0f;
    }
  }

  // Sums of this warp's range of all tiles, kTiles at once, to partial [kSplit, most_tiles, kWarpSize]. tokens: rows of
  // token_pitch bytes.
  template <int kTiles>
  __device__ void Multiply(const uint8_t* tokens, int token_pitch, int rows, float4* partial, int most_tiles) const {
    const uint8_t* x = tokens + min(g, rows - 1) * token_pitch + token_offset;
    for (int begin = 0; begin < count; begin += kTiles) {
      float sums[kTiles][4] = {};
      AddRange<kTiles>(begin, x, sums);
      if (2 * s >= rows) continue;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (begin + t >= count) break;
        partial[(warp * most_tiles + begin + t) * kWarpSize + lane] =
            make_float4(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
      }
    }
  }

  // The ranges of this warp's tile added up; of tokens beyond `rows` anything.
  __device__ void End(const float4* partial, int most_tiles, int rows, float (&total)[4]) const {
    for (float& sum : total) sum = 0.0f;
    if (2 * s >= rows) return;
#pragma unroll
    for (int from = 0; from < kSplit; ++from) {
      const float4 part = partial[(from * most_tiles + warp) * kWarpSize + lane];
      total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
    }
    // Rounded here even if added to something next, as in OutputTile.
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] = __fmul_rn(total[i], scales[i / 2]);
  }

 private:
  __device__ void Fetch(const LinspecCudaMatrix& w, int row_bytes, uint8_t* to) const {
    for (int r = warp; r < count * kTileRows; r += kSplit) {
      const int64_t from_row = min(int64_t{first} * kTileRows + r, w.rows - 1);
      const char* from = static_cast<const char*>(w.data) + from_row * row_bytes;
      for (int at = lane * 16; at < row_bytes; at += kWarpSize * 16) CopyAsync16(to + r * pitch + at, from + at);
    }
    CommitCopies();
  }

  // Of tiles begin, begin + 1, ...; what is beyond the last is computed like it.
  template <int kTiles>
  __device__ __forceinline__ void AddRange(int begin, const uint8_t* x, float (&sums)[kTiles][4]) const {
    const uint8_t* at[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) at[t] = weights + min(begin + t, count - 1) * kTileRows * pitch;
#pragma unroll(kTiles == 1 ? 2 : 1)
    for (int step = 0; step < steps; ++step) {
      uint4 tokens[kParts] = {}, low[kTiles] = {}, high[kTiles] = {};
      if (step < valid) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          tokens[part] = *reinterpret_cast<const uint4*>(x + step * kStepBytes * kParts + part * 16);
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          low[t] = *reinterpret_cast<const uint4*>(at[t] + step * kStepBytes);
          high[t] = *reinterpret_cast<const uint4*>(at[t] + step * kStepBytes + 8 * pitch);
        }
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        uint32_t a[4 * kParts], b[4 * kParts];
        WeightTraits<kType>::Widen(low[t], a);
        WeightTraits<kType>::Widen(high[t], b);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const int i = part * 4;
          Mma(sums[t], a[i], b[i], a[i + 1], b[i + 1], tokens[part].x, tokens[part].y);
          Mma(sums[t], a[i + 2], b[i + 2], a[i + 3], b[i + 3], tokens[part].z, tokens[part].w);
        }
      }
    }
  }
};

}  // namespace linspec::cuda
