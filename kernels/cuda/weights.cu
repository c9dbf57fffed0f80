// Load-time conversion. One block per row: values are produced twice (largest magnitude, then the rounded values), so
// that no fp32 copy of the matrix is ever held. Bound by the transfer from the host, or by Philox for random weights.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "kernels/cuda/stored_column.h"
#include "kernels/cuda/weights.h"

namespace linspec::cuda {
namespace {

constexpr int kPackThreads = 256;

__device__ float RandomValue(const LinspecCudaSource& s, int64_t i) {
  const auto block = static_cast<uint64_t>(i & ~int64_t{3});  // counter of the four elements that share a draw
  uint4 c = make_uint4(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                       static_cast<uint32_t>(s.stream), static_cast<uint32_t>(s.stream >> 32));
  uint2 key = make_uint2(static_cast<uint32_t>(s.seed), static_cast<uint32_t>(s.seed >> 32));
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t a_high = __umulhi(0xD2511F53u, c.x), a_low = 0xD2511F53u * c.x;
    const uint32_t b_high = __umulhi(0xCD9E8D57u, c.z), b_low = 0xCD9E8D57u * c.z;
    c = make_uint4(b_high ^ c.y ^ key.x, b_low, a_high ^ c.w ^ key.y, a_low);
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  const uint32_t words[4] = {c.x, c.y, c.z, c.w};
  const float unit = __fsub_rn(__fmul_rn(static_cast<float>(words[i & 3] >> 8), 0x1p-23f), 1.0f);
  return __fadd_rn(s.center, __fmul_rn(s.spread, unit));
}

__device__ float Value(const LinspecCudaSource& s, const void* staged, const float* scales, int64_t local_row,
                       int64_t row, int64_t col) {
  if (staged == nullptr) return RandomValue(s, row * s.cols + col);
  const int64_t at = local_row * s.cols + col;
  switch (s.type) {
    case kLinspecCudaF32:
      return static_cast<const float*>(staged)[at];
    case kLinspecCudaF16:
      return __half2float(static_cast<const __half*>(staged)[at]);
    case kLinspecCudaBf16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(staged)[at]);
    default:
      return static_cast<float>(static_cast<const int8_t*>(staged)[at]) * scales[local_row];
  }
}

__device__ float BlockMax(float value) {
  __shared__ float warps[kPackThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  for (const float warp : warps) value = fmaxf(value, warp);
  return value;
}

// Grid: rows. `first` is the first row of this piece, in source rows.
__global__ void __launch_bounds__(kPackThreads)
    PackKernel(LinspecCudaSource s, const void* staged, const float* scales, int64_t first, LinspecCudaMatrix m) {
  const int64_t local = blockIdx.x, row = first + local;
  const int64_t out_row = s.row_begin + (s.interleave != 0 ? row / 8 * 16 + row % 8 : row);
  const bool bytes = m.type == kLinspecCudaI8 || m.type == kLinspecCudaFp8;
  const bool keep_bits = staged != nullptr && s.type == kLinspecCudaI8 && m.type == kLinspecCudaI8;
  float scale = 1.0f;
  if (keep_bits) {
    scale = scales[local];
  } else if (bytes) {
    float largest = 0.0f;
    for (int64_t c = threadIdx.x; c < s.cols; c += kPackThreads) {
      largest = fmaxf(largest, fabsf(Value(s, staged, scales, local, row, c)));
    }
    largest = BlockMax(largest);
    const float range = m.type == kLinspecCudaI8 ? 127.0f : 448.0f;
    scale = largest > 0.0f ? largest / range : 1.0f;
  }
  if (m.scales != nullptr && threadIdx.x == 0) const_cast<float*>(m.scales)[out_row] = scale;
  for (int64_t c = threadIdx.x; c < s.cols; c += kPackThreads) {
    const int64_t at = out_row * m.cols + (bytes ? StoredColumn(c) : c);
    if (keep_bits) {
      static_cast<int8_t*>(const_cast<void*>(m.data))[at] = static_cast<const int8_t*>(staged)[local * s.cols + c];
      continue;
    }
    const float value = Value(s, staged, scales, local, row, c);
    switch (m.type) {
      case kLinspecCudaF32:
        static_cast<float*>(const_cast<void*>(m.data))[at] = value;
        break;
      case kLinspecCudaBf16:
        static_cast<__nv_bfloat16*>(const_cast<void*>(m.data))[at] = __float2bfloat16_rn(value);
        break;
      case kLinspecCudaI8:
        static_cast<int8_t*>(const_cast<void*>(m.data))[at] =
            static_cast<int8_t>(fminf(fmaxf(rintf(value / scale), -127.0f), 127.0f));
        break;
      default:
        static_cast<__nv_fp8_e4m3*>(const_cast<void*>(m.data))[at] = __nv_fp8_e4m3(value / scale);
    }
  }
}

__global__ void __launch_bounds__(256) ReadSumKernel(const float4* data, int64_t quads, float* out) {
  float sum = 0.0f;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * 256;
  int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  for (; i + 3 * stride < quads; i += 4 * stride) {
    float4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = __ldcs(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += v[j].x + v[j].y + v[j].z + v[j].w;
  }
  for (; i < quads; i += stride) sum += data[i].x + data[i].y + data[i].z + data[i].w;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
  __shared__ float warps[8];
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < 8; ++w) sum += warps[w];
  out[blockIdx.x] = sum;
}

}  // namespace

int64_t TypeBytes(int32_t type) {
  switch (type) {
    case kLinspecCudaF32:
      return 4;
    case kLinspecCudaF16:
    case kLinspecCudaBf16:
      return 2;
    default:
      return 1;
  }
}

int32_t LaunchPack(const LinspecCudaSource& source, const void* staged, const float* staged_scales, int64_t row,
                   int64_t rows, const LinspecCudaMatrix& matrix, cudaStream_t stream) {
  const bool known_source = source.type == kLinspecCudaF32 || source.type == kLinspecCudaF16 ||
                            source.type == kLinspecCudaBf16 || source.type == kLinspecCudaI8;
  const bool known_target = matrix.type == kLinspecCudaF32 || matrix.type == kLinspecCudaBf16 ||
                            matrix.type == kLinspecCudaI8 || matrix.type == kLinspecCudaFp8;
  if (!known_source || !known_target) return kLinspecCudaUnsupported;
  PackKernel<<<static_cast<unsigned>(rows), kPackThreads, 0, stream>>>(source, staged, staged_scales, row, matrix);
  return kLinspecCudaOk;
}

void LaunchReadSum(const float* data, int64_t floats, float* out, int blocks, cudaStream_t stream) {
  ReadSumKernel<<<blocks, 256, 0, stream>>>(reinterpret_cast<const float4*>(data), floats / 4, out);
}

}  // namespace linspec::cuda
