// y[m, n] (+)= scale[n] * sum_k x[m, k] w[n, k]: weights streamed once, tokens ride along.
//
// Tensor cores, mma m16n8k16 bf16 -> fp32 with the weights as the 16-row operand and 8 tokens as the columns. A sum
// over k may take its terms in any order if both operands agree, so a lane loads 16 consecutive bytes of its weight
// row straight from memory and treats them as the k indices that the instruction assigns to it; no shared memory, no
// shuffles. Lane l holds weight rows l / 4 and l / 4 + 8, token l / 4, and k slice l % 4.
//
// Grid: one block per 16 weight rows; its 8 warps take every 8th k step and are added in warp order. The split
// depends on the shape of w alone, and columns of an mma do not mix, so a row's bits do not depend on the other rows.
// int8 and fp8 widen to bf16 exactly; the row's scale enters at the end.
//
// Floor: N * K * size(weight) bytes over the read bandwidth, as long as 2 * rows * N * K / 790 TFLOP/s is less (about
// 180 rows in bf16). x is re-read from L2 once per 16 weight rows: rows / 16 of the weight bytes for bf16.
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "kernels/cuda/launch.h"

namespace linspec::cuda {
namespace {

constexpr int kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kWeightRows = 16, kTokens = 8;

struct Bf16x8 {  // four bf16x2 registers: 8 consecutive k
  uint32_t pair[4];
};

__device__ Bf16x8 Load16Bytes(const void* p) {
  const uint4 raw = *static_cast<const uint4*>(p);
  return {{raw.x, raw.y, raw.z, raw.w}};
}

__device__ uint32_t PackPair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// One lane's 16 bytes of a weight row, as groups of 8 k.
template <int kType>
struct WeightTraits;

template <>
struct WeightTraits<kLinspecCudaBf16> {
  static constexpr int kElements = 8;
  __device__ static void Widen(const uint4& raw, Bf16x8 (&out)[1]) { out[0] = {{raw.x, raw.y, raw.z, raw.w}}; }
};

template <>
struct WeightTraits<kLinspecCudaI8> {
  static constexpr int kElements = 16;
  __device__ static void Widen(const uint4& raw, Bf16x8 (&out)[2]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t half = words[i / 2] >> (i % 2 * 16);
      out[i / 4].pair[i % 4] = PackPair(static_cast<float>(static_cast<int8_t>(half & 0xFF)),
                                        static_cast<float>(static_cast<int8_t>(half >> 8 & 0xFF)));
    }
  }
};

template <>
struct WeightTraits<kLinspecCudaFp8> {
  static constexpr int kElements = 16;
  __device__ static void Widen(const uint4& raw, Bf16x8 (&out)[2]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      __nv_fp8x2_e4m3 pair;
      pair.__x = static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (i % 2 * 16) & 0xFFFF);
      const float2 value = static_cast<float2>(pair);
      out[i / 4].pair[i % 4] = PackPair(value.x, value.y);
    }
  }
};

__device__ void Mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 8 k per lane, 32 in all, as two instructions.
__device__ void Multiply(float (&c)[4], const Bf16x8& low, const Bf16x8& high, const Bf16x8& x) {
  Mma(c, low.pair[0], high.pair[0], low.pair[1], high.pair[1], x.pair[0], x.pair[1]);
  Mma(c, low.pair[2], high.pair[2], low.pair[3], high.pair[3], x.pair[2], x.pair[3]);
}

template <int kType, int kTiles>  // kTiles * 8 tokens
__global__ void __launch_bounds__(kThreads) StreamingGemmKernel(const GemmParams p, int row_begin, int rows) {
  using Traits = WeightTraits<kType>;
  constexpr int kParts = Traits::kElements / 8, kBytes = 16 / Traits::kElements;
  __shared__ float partial[kWarps][kTiles * kTokens][kWeightRows];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, slice = lane % 4;
  const int64_t depth = p.w.cols, first = static_cast<int64_t>(blockIdx.x) * kWeightRows;
  const int64_t n_low = min(first + lane / 4, p.w.rows - 1), n_high = min(first + lane / 4 + 8, p.w.rows - 1);
  const char* w_low = static_cast<const char*>(p.w.data) + n_low * depth * kBytes;
  const char* w_high = static_cast<const char*>(p.w.data) + n_high * depth * kBytes;
  float sums[kTiles][4] = {};
#pragma unroll 4
  for (int64_t step = warp * 4 * Traits::kElements; step < depth; step += kWarps * 4 * Traits::kElements) {
    const int64_t k = step + slice * Traits::kElements;
    const bool inside = k < depth;  // all lanes stay for the mma; those past the end bring zeros
    Bf16x8 low[kParts], high[kParts];
    Traits::Widen(inside ? __ldcs(reinterpret_cast<const uint4*>(w_low + k * kBytes)) : uint4{}, low);
    Traits::Widen(inside ? __ldcs(reinterpret_cast<const uint4*>(w_high + k * kBytes)) : uint4{}, high);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int m = min(tile * kTokens + lane / 4, rows - 1);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const Bf16x8 x = inside ? Load16Bytes(p.x + (row_begin + m) * depth + k + part * 8) : Bf16x8{};
        Multiply(sums[tile], low[part], high[part], x);
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {  // c0, c1: weight row l / 4, tokens 2 (l % 4) and the next; c2, c3: + 8
#pragma unroll
    for (int i = 0; i < 4; ++i) partial[warp][tile * kTokens + slice * 2 + i % 2][lane / 4 + i / 2 * 8] = sums[tile][i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * kWeightRows; i += kThreads) {
    const int m = i / kWeightRows, n = i % kWeightRows;
    if (first + n >= p.w.rows) continue;
    float sum = 0.0f;
    for (int from = 0; from < kWarps; ++from) sum += partial[from][m][n];
    if (p.w.scales != nullptr) sum *= p.w.scales[first + n];
    float& y = p.y[(row_begin + m) * p.w.rows + first + n];
    y = p.accumulate ? y + sum : sum;
  }
}

template <int kType>
void LaunchRows(const GemmParams& params, int row_begin, int rows, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((params.w.rows + kWeightRows - 1) / kWeightRows);
  if (rows <= kTokens) {
    StreamingGemmKernel<kType, 1><<<blocks, kThreads, 0, stream>>>(params, row_begin, rows);
  } else if (rows <= 2 * kTokens) {
    StreamingGemmKernel<kType, 2><<<blocks, kThreads, 0, stream>>>(params, row_begin, rows);
  } else {
    StreamingGemmKernel<kType, 4><<<blocks, kThreads, 0, stream>>>(params, row_begin, rows);
  }
}

}  // namespace

void LaunchStreamingGemm(const GemmParams& params, int rows, cudaStream_t stream) {
  constexpr int kRowsPerPass = 4 * kTokens;
  for (int row = 0; row < rows; row += kRowsPerPass) {
    const int count = rows - row < kRowsPerPass ? rows - row : kRowsPerPass;
    switch (params.w.type) {
      case kLinspecCudaI8:
        LaunchRows<kLinspecCudaI8>(params, row, count, stream);
        break;
      case kLinspecCudaFp8:
        LaunchRows<kLinspecCudaFp8>(params, row, count, stream);
        break;
      default:
        LaunchRows<kLinspecCudaBf16>(params, row, count, stream);
    }
  }
}

}  // namespace linspec::cuda
