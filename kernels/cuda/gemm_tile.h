// Device pieces shared by the matrix-product kernels: weight widening, the tensor-core instruction and the epilogue.
//
// Operand layout. mma.m16n8k16 with 16 weight rows as the first operand and 8 tokens as the second. A sum over k may
// take its terms in any order if both operands agree, so a lane treats 16 consecutive bytes of its weight row as the k
// indices that the instruction assigns to it: lane l = 4 g + s holds weight rows g and g + 8, token g, and slice s of a
// step. A step is 64 bytes of a weight row: 32 k in bf16, 64 k in int8 or fp8 (two parts of 8 k per lane). The result
// of a lane is rows g and g + 8 times tokens 2 s and 2 s + 1.
#pragma once

#include <cuda_bf16.h>

#include "kernels/cuda/launch.h"

namespace linspec::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr int kTileRows = 16, kTileTokens = 8;
inline constexpr int kStepBytes = 64;  // of a weight row

// The number of a thread's warp in its block, by all threads. nvcc takes a shuffled value to be the same in all
// lanes: what follows from it stays in uniform registers, and lanes need not be gathered again before instructions
// of a whole warp, several of which it otherwise put into the loop of the warpgroup products (fp8, 16 tokens: 2.68
// ms a step for 2.90, an H200).
__device__ __forceinline__ int UniformWarp() {
  return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kWarpSize, 0);
}

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ uint32_t SharedAddress(uint32_t address) { return address; }

__device__ __forceinline__ void Mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 16 bytes of a weight row as bf16 pairs, exactly: pair i holds k = 2 i and 2 i + 1. int8 and fp8 are stored such that
// pairs i and 4 + i are the even and the odd bytes of word i (stored_column.h), which saves moving bytes.
template <int kType>
struct WeightTraits;

template <>
struct WeightTraits<kLinspecCudaBf16> {
  static constexpr int kParts = 1;
  __device__ static __forceinline__ void Widen(const uint4& raw, uint32_t (&out)[4]) {
    out[0] = raw.x, out[1] = raw.y, out[2] = raw.z, out[3] = raw.w;
  }
};

template <typename Type>  // which widens a word
struct ByteWeights {
  static constexpr int kParts = 2;
  __device__ static __forceinline__ void Widen(const uint4& raw, uint32_t (&out)[8]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) Type::Widen(words[i], out[i], out[4 + i]);
  }

 protected:
  __device__ static __forceinline__ uint32_t Fma(uint32_t a, uint32_t b, uint32_t c) {  // a b + c on bf16 pairs
    uint32_t out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
  }
};

template <>
struct WeightTraits<kLinspecCudaI8> : ByteWeights<WeightTraits<kLinspecCudaI8>> {
  using ByteWeights<WeightTraits>::Widen;
  // 128 + low seven bits, minus 128 or 256 by the sign bit: both are bf16 numbers with a unit in the last place of 1 or
  // 2, and so is the difference. What lies above the two bytes does not matter.
  __device__ static __forceinline__ void Widen(uint32_t word, uint32_t& even, uint32_t& odd) {
    even = WidenPair(word), odd = WidenPair(word >> 8);
  }

 private:
  __device__ static __forceinline__ uint32_t WidenPair(uint32_t v) {
    return Fma(On128(v, 0x00800080u), 0xBF80BF80u, On128(v, 0x007F007Fu));
  }
  // 128 + the masked bits: one instruction, of which the compiler made two.
  __device__ static __forceinline__ uint32_t On128(uint32_t v, uint32_t mask) {
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(v), "r"(mask), "r"(0x43004300u));
    return out;
  }
};

template <>
struct WeightTraits<kLinspecCudaFp8> : ByteWeights<WeightTraits<kLinspecCudaFp8>> {
  using ByteWeights<WeightTraits>::Widen;
  // The e4m3 fields moved to a bf16's places are the value times 2^-120 (subnormals too); the NaN pattern becomes 480.
  static constexpr uint32_t kTwoTo120 = 0x7B807B80u, kSigns = 0x80008000u, kFields = 0x07F007F0u;  // minus zero: kSigns

  __device__ static __forceinline__ void Widen(uint32_t word, uint32_t& even, uint32_t& odd) {
    even = Fma(Extend(word) << 4 & (kSigns | kFields), kTwoTo120, kSigns);
    odd = Fma((word >> 4 & kFields) | (word & kSigns), kTwoTo120, kSigns);
  }

 private:
  __device__ static __forceinline__ uint32_t Extend(uint32_t word) {  // even bytes as 16-bit numbers with a sign
    uint32_t out;
    asm("prmt.b32 %0, %1, 0, 0xA280;" : "=r"(out) : "r"(word));
    return out;
  }
};

__device__ __forceinline__ uint16_t Bf16Bits(float value) {
  const __nv_bfloat16 rounded = __float2bfloat16(value);
  return *reinterpret_cast<const uint16_t*>(&rounded);
}

__device__ __forceinline__ float Silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// Of the RMSNorm in front of a product (launch.h): four values of x times its weight in bf16, and their squares added
// in order.
__device__ __forceinline__ uint2 NormFour(const float4& x, const float4& weight, float& squares) {
  squares = fmaf(x.w, x.w, fmaf(x.z, x.z, fmaf(x.y, x.y, fmaf(x.x, x.x, squares))));
  const __nv_bfloat162 low = __floats2bfloat162_rn(x.x * weight.x, x.y * weight.y);
  const __nv_bfloat162 high = __floats2bfloat162_rn(x.z * weight.z, x.w * weight.w);
  return {*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high)};
}
__device__ __forceinline__ float InverseRms(float squares, int64_t dim, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(dim) + eps);
}

// The sum over k is always taken in kSplit contiguous ranges of steps, each from zero in order of k, and the ranges
// added in order: the same bits whichever kernel runs and however many tokens ride along.
inline constexpr int kSplit = 8;

__host__ __device__ inline int NumSteps(const LinspecCudaMatrix& w) {
  const int64_t bytes = w.cols * (w.type == kLinspecCudaBf16 ? 2 : 1);
  return static_cast<int>((bytes + kStepBytes - 1) / kStepBytes);
}
__host__ __device__ inline int RangeBegin(int steps, int range) { return steps * range / kSplit; }

// What a lane's four finished sums become. sums: {row, token}, {row, token + 1}, {row + 8, token}, {row + 8, token +
// 1}; row % 16 < 8; `old` are the values of y that `accumulate` adds to.
// Tokens count from the first row of y.
struct OutputTile {
  const GemmParams& p;
  int rows;  // tokens

  __device__ bool Inside(int64_t row, int token) const { return row < p.w.rows && token < rows; }

  __device__ void ReadOld(int64_t row, int token, float (&old)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t n = row + i / 2 * 8, m = token + i % 2;
      old[i] = p.accumulate && Inside(n, m) ? __ldcg(p.y + m * p.w.rows + n) : 0.0f;
    }
  }

  // 1 / rms of x where a launch before left that, else 1.
  __device__ void ReadTokenScales(int token, float (&scales)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scales[i] = p.norm_before.scales != nullptr && token + i < rows ? __ldcg(p.norm_before.scales + token + i) : 1.0f;
    }
  }

  // Of the weight rows; 1 where those have none.
  __device__ void ReadScales(int64_t row, float (&scales)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scales[half] = p.w.scales != nullptr && row + half * 8 < p.w.rows ? __ldg(p.w.scales + row + half * 8) : 1.0f;
    }
  }

  __device__ void Write(int64_t row, int token, float (&sums)[4], const float (&old)[4]) const {
    float scales[2];
    ReadScales(row, scales);
    Write(row, token, sums, old, scales);
  }

  __device__ void Write(int64_t row, int token, float (&sums)[4], const float (&old)[4],
                        const float (&scales)[2]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] *= scales[i / 2];
    if (p.silu_mul) {
      WriteSiluMul(row, token, sums);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t n = row + i / 2 * 8, m = token + i % 2;
      if (!Inside(n, m)) continue;
      if (p.y_bf16 != nullptr) {
        p.y_bf16[m * p.w.rows + n] = Bf16Bits(sums[i]);
      } else {
        p.y[m * p.w.rows + n] = p.accumulate ? old[i] + sums[i] : sums[i];
      }
    }
  }

 private:
  __device__ void WriteSiluMul(int64_t row, int token, const float (&sums)[4]) const {
    const int64_t column = row / kTileRows * 8 + row % kTileRows;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!Inside(row + 8, token + i)) continue;
      p.y_bf16[(token + i) * (p.w.rows / 2) + column] = Bf16Bits(Silu(sums[i]) * sums[2 + i]);
    }
  }
};

}  // namespace linspec::cuda
