// The end of a tile in a block of the warpgroup product (gemm_wgmma.cu): what becomes of its sums. sm_90a only.
//
// The sums meet in shared memory, from where a warp takes the tile's 128 rows of a token at once: accesses to memory
// are whole lines, sums of squares are a warp's own, a tile of qkv is a head of 128 that RoPE can turn. 64 tokens take
// 1.6 us at the end of a launch with a norm behind, 1.0 without; from registers 4.1 and 2.1 (an H100).
#pragma once

#include "kernels/cuda/gemm_wgmma_block.h"
#include "kernels/cuda/rope.h"

namespace linspec::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

static_assert(kUnitRows == 2 * kNormPart && kUnitRows == 4 * kWarpSize);

// In shared memory. kChunk: tokens at a time.
template <int kTokens>
struct TileEnd {
  static constexpr int kChunk = kTokens > 64 ? 32 : kTokens;
  float sums[kChunk][kUnitRows + 4];  // banks: the four lanes that hold a row's tokens 2 s write 8 apart
  float scales[kTokens];              // of tokens: 1 / rms of x, for a norm in front (launch.h)
};

// By the warps that multiply.
template <int kTokens, bool kNorms>
struct Epilogue {
  using Shared = TileEnd<kTokens>;
  static constexpr int kEach = Shared::kChunk / kConsumers;  // tokens of a warp
  static constexpr int kColumns = Shared::kChunk / 8;

  const GemmParams& p;
  const int rows;
  Shared& shared;
  // Of the lane's four rows, asked for while other blocks' sums are waited for.
  float row_scales[4], norm_weights[4];
  float4 old[kEach];  // of y, where the product is added to it; or the angles of the lane's two pairs of a head
  bool whole;         // all rows exist, and those of a token are aligned to 16 bytes

  __device__ static int Warp() { return static_cast<int>(threadIdx.x) / kWarpSize; }
  __device__ static int Lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  __device__ __forceinline__ int64_t At(int tile, int token) const {  // of the lane's first row, in y
    return token * p.w.rows + int64_t{tile} * kUnitRows + Lane() * 4;
  }
  // The lane's i-th row within the tile: consecutive, two pairs of a head, or two of a gate and the same two of up.
  __device__ __forceinline__ int Row(int i) const {
    if (p.rope.qkv != nullptr) return Lane() * 2 + i % 2 + i / 2 * (kUnitRows / 2);
    return p.silu_mul ? Lane() / 4 * kTileRows + Lane() % 4 * 2 + i % 2 + i / 2 * 8 : Lane() * 4 + i;
  }

  __device__ __forceinline__ void ReadAhead(int tile) {
    whole = p.w.rows % 4 == 0 && int64_t{tile + 1} * kUnitRows <= p.w.rows;
    if (!whole) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = int64_t{tile} * kUnitRows + Row(i);
      row_scales[i] = p.w.scales != nullptr ? __ldg(p.w.scales + row) : 1.0f;
      if (kNorms && p.norm_after.weight != nullptr) norm_weights[i] = __ldg(p.norm_after.weight + row);
    }
    ReadOld(tile, 0);
  }

  // sums[j]: of 8 tokens, as OutputTile takes them.
  template <int kAll>
  __device__ __forceinline__ void Write(int tile, const float (&sums)[kAll][4]) {
    const int row = Warp() * kTileRows + Lane() / 4, token = Lane() % 4 * 2;
#pragma unroll
    for (int chunk = 0; chunk < kAll / kColumns; ++chunk) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          shared.sums[j * 8 + token + i % 2][row + i / 2 * 8] = sums[chunk * kColumns + j][i];
        }
      }
      ConsumerBarrier();
      if (chunk > 0 && whole) ReadOld(tile, chunk * Shared::kChunk);
      const int first = chunk * Shared::kChunk;
      if (!whole) {
        WritePart(tile, first);
      } else if (p.silu_mul) {
        WriteSiluMul(tile, first);
      } else if (p.rope.qkv != nullptr) {
        WriteHead(tile, first);
      } else {
        WriteRows(tile, first);
      }
      ConsumerBarrier();
    }
  }

 private:
  __device__ __forceinline__ void ReadOld(int tile, int first) {
    if (!p.accumulate && p.rope.qkv == nullptr) return;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int token = min(first + Warp() + i * kConsumers, rows - 1);
      old[i] = p.accumulate ? __ldcg(reinterpret_cast<const float4*>(p.y + At(tile, token)))
                            : __ldcg(reinterpret_cast<const float4*>(p.rope.angles + token * (kUnitRows / 2)) + Lane());
    }
  }
  __device__ __forceinline__ float TokenScale(int token) const {
    return kNorms && p.norm_before.squares != nullptr ? shared.scales[token] : 1.0f;
  }

  __device__ __forceinline__ void WriteRows(int tile, int first) {
    float squares[kEach] = {};
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = Warp() + i * kConsumers, token = first + at;
      if (token >= rows) break;
      float4 v = *reinterpret_cast<const float4*>(&shared.sums[at][Lane() * 4]);
      const float scale = TokenScale(token);
      const float4 before = p.accumulate ? old[i] : float4{};
      v.x = fmaf(v.x, row_scales[0] * scale, before.x), v.y = fmaf(v.y, row_scales[1] * scale, before.y);
      v.z = fmaf(v.z, row_scales[2] * scale, before.z), v.w = fmaf(v.w, row_scales[3] * scale, before.w);
      if (p.y_bf16 != nullptr) {
        StoreBf16(p.y_bf16 + At(tile, token), v.x, v.y, v.z, v.w);
        continue;
      }
      __stcg(reinterpret_cast<float4*>(p.y + At(tile, token)), v);
      if (!kNorms || p.norm_after.weight == nullptr) continue;
      StoreBf16(p.norm_after.out + At(tile, token), v.x * norm_weights[0], v.y * norm_weights[1], v.z * norm_weights[2],
                v.w * norm_weights[3]);
      squares[i] = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, v.w * v.w)));
    }
    if (kNorms && p.norm_after.weight != nullptr) LeaveSquares(tile, first, squares);
  }

  // y is the residual stream: sums of squares of these two parts of it, for the norm behind.
  __device__ __forceinline__ void LeaveSquares(int tile, int first, float (&squares)[kEach]) const {
#pragma unroll
    for (int lanes = kWarpSize / 4; lanes > 0; lanes /= 2) {
#pragma unroll
      for (float& sum : squares) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int token = first + Warp() + i * kConsumers;
      if (Lane() % 16 != 0 || token >= rows) continue;
      p.norm_after.squares[token * NormParts(p.w.rows) + tile * 2 + Lane() / 16] = squares[i];
    }
  }

  __device__ __forceinline__ void WriteSiluMul(int tile, int first) const {
    uint16_t* to = p.y_bf16 + int64_t{tile} * (kUnitRows / 2) + Lane() * 2;
#pragma unroll 2
    for (int at = Warp(); at < Shared::kChunk; at += kConsumers) {
      const int token = first + at;
      if (token >= rows) break;
      const float2 gate = *reinterpret_cast<const float2*>(&shared.sums[at][Row(0)]);
      const float2 up = *reinterpret_cast<const float2*>(&shared.sums[at][Row(2)]);
      const float scale = TokenScale(token);
      const __nv_bfloat162 out =
          __floats2bfloat162_rn(Silu(gate.x * (row_scales[0] * scale)) * (up.x * (row_scales[2] * scale)),
                                Silu(gate.y * (row_scales[1] * scale)) * (up.y * (row_scales[3] * scale)));
      *reinterpret_cast<__nv_bfloat162*>(to + token * (p.w.rows / 2)) = out;
    }
  }

  // A head of q, k or v, as RopeNormalizeKernel would leave it.
  __device__ __forceinline__ void WriteHead(int head, int first) const {
    const RopeRows& rope = p.rope;
    const int turned = rope.num_heads + rope.num_kv_heads, kv_heads = turned + rope.num_kv_heads - rope.num_heads;
    constexpr int kHalf = kUnitRows / 2;
    RopeLane<true> x[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {  // no branches, so that tokens overlap
      x[i].Load(shared.sums[Warp() + i * kConsumers], Lane(), kHalf);
      const float scale = TokenScale(first + Warp() + i * kConsumers);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        x[i].low[part] *= row_scales[part] * scale;
        x[i].high[part] *= row_scales[2 + part] * scale;
      }
    }
    if (head < turned) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const RopeLane<true> angles{{old[i].x, old[i].z}, {old[i].y, old[i].w}};
        x[i].TurnAndNormalize(angles, Lane(), kHalf, rope.eps);
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int token = first + Warp() + i * kConsumers;
      if (token >= rows) break;
      float* own = p.y + int64_t{token} * p.w.rows + int64_t{head} * kUnitRows;
      if (head < rope.num_heads) {
        x[i].Store(own, Lane(), kHalf);
        continue;
      }
      const int64_t to = rope.kv_rows != nullptr ? rope.kv_rows[token] : token;
      const int64_t kept = (to * kv_heads + head - rope.num_heads) * kUnitRows;
      if (to < 0) continue;
      if (rope.kv != nullptr && rope.bf16) {
        x[i].Store(static_cast<uint16_t*>(rope.kv) + kept, Lane(), kHalf);
        continue;
      }
      if (rope.bf16) x[i].Round();
      x[i].Store(rope.kv != nullptr ? static_cast<float*>(rope.kv) + kept : own, Lane(), kHalf);
    }
  }

  // The same row by row, for the last tile of odd sizes.
  __device__ __forceinline__ void WritePart(int tile, int first) const {
#pragma unroll 1
    for (int at = Warp(); at < Shared::kChunk && first + at < rows; at += kConsumers) {
#pragma unroll 1
      for (int half = 0; half < kUnitRows; half += kNormPart) WriteNormPart(tile, half, at, first + at);
    }
  }
  __device__ __forceinline__ void WriteNormPart(int tile, int begin, int at, int64_t token) const {
    float squares = 0.0f;
    const int64_t first_row = int64_t{tile} * kUnitRows + begin;
#pragma unroll 1
    for (int i = begin + Lane(); i < begin + kNormPart; i += kWarpSize) {
      const int64_t row = int64_t{tile} * kUnitRows + i, place = token * p.w.rows + row;
      if (row >= p.w.rows) break;
      const auto scale = [&](int64_t r) {
        return (p.w.scales != nullptr ? __ldg(p.w.scales + r) : 1.0f) * TokenScale(static_cast<int>(token));
      };
      float v = shared.sums[at][i] * scale(row);
      if (p.silu_mul) {
        if (i % kTileRows >= 8) continue;
        const float up = shared.sums[at][i + 8] * scale(row + 8);
        p.y_bf16[token * (p.w.rows / 2) + row / kTileRows * 8 + i % 8] = Bf16Bits(Silu(v) * up);
        continue;
      }
      if (p.y_bf16 != nullptr) {
        p.y_bf16[place] = Bf16Bits(v);
        continue;
      }
      if (p.accumulate) v += __ldcg(p.y + place);
      p.y[place] = v;
      if (!kNorms || p.norm_after.weight == nullptr) continue;
      p.norm_after.out[place] = Bf16Bits(v * __ldg(p.norm_after.weight + row));
      squares = fmaf(v, v, squares);
    }
    if (!kNorms || p.norm_after.weight == nullptr || first_row >= p.w.rows) return;
    __syncwarp();
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, lanes);
    if (Lane() == 0) p.norm_after.squares[token * NormParts(p.w.rows) + first_row / kNormPart] = squares;
  }
};

#endif

}  // namespace linspec::cuda
