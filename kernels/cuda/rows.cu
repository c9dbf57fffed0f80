// Row operations: embed, RMSNorm, SiLU * up, RoPE + L2 norm, argmax. One block (or warp) per row, fp32 arithmetic,
// fixed reduction order: lane partials over a fixed stride, then halves onto halves, so that a row's bits depend on
// that row. Launched overlapped (pdl.h): the product after a row operation fetches its weights while that still runs.
//
// Floor in bytes per row: embed D * (type + 4); RMSNorm 4 D read + 2 D written; SiLU 8 F + 2 F; RoPE 8 (H + Hkv) d;
// argmax 4 V. All are under 2 % of a 7B layer's weights up to 64 rows.
#include <climits>

#include "kernels/cuda/embedding.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pdl.h"

namespace linspec::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xFFFFFFFFu;

__device__ float WarpSum(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

__device__ float BlockSum(float value) {
  __shared__ float warps[kThreads / kWarp];
  value = WarpSum(value);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
  for (const float warp : warps) sum += warp;
  return sum;
}

__global__ void EmbedKernel(const EmbedParams p) {
  GridLaunchDependents();
  GridWait();
  const int64_t dim = p.table.cols, token = p.tokens[blockIdx.x];
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) {
    p.out[blockIdx.x * dim + i] = EmbeddingValue(p.table, token, i);
  }
}

__global__ void __launch_bounds__(kThreads) RmsNormKernel(const RmsNormRows p) {
  GridLaunchDependents();
  const int quads = static_cast<int>(p.dim / 4);
  const auto* x = reinterpret_cast<const float4*>(p.x + blockIdx.x * p.dim);
  const auto* weight = reinterpret_cast<const float4*>(p.weight);
  GridWait();
  float squares = 0.0f;
  for (int i = threadIdx.x; i < quads; i += kThreads) {
    const float4 v = x[i];
    squares = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, squares))));
  }
  const float scale = 1.0f / sqrtf(BlockSum(squares) / static_cast<float>(p.dim) + p.eps);
  for (int i = threadIdx.x; i < quads; i += kThreads) {
    const float4 v = x[i], w = weight[i];
    const float4 y = make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w);
    if (p.out != nullptr) reinterpret_cast<float4*>(p.out + blockIdx.x * p.dim)[i] = y;
    if (p.out_bf16 == nullptr) continue;
    reinterpret_cast<uint2*>(p.out_bf16 + blockIdx.x * p.dim)[i] =
        make_uint2(RoundToBf16(y.x) | static_cast<uint32_t>(RoundToBf16(y.y)) << 16,
                   RoundToBf16(y.z) | static_cast<uint32_t>(RoundToBf16(y.w)) << 16);
  }
}

// gate_up holds 8 of gate, the same 8 of up, and so on (PackedGateUpRow).
__global__ void __launch_bounds__(kThreads) SiluMulKernel(const float* gate_up, uint16_t* out, int64_t dim) {
  GridLaunchDependents();
  GridWait();
  const int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x, row = blockIdx.x;
  if (i >= dim) return;
  const int64_t at = row * 2 * dim + i / 8 * 16 + i % 8;
  const float gate = gate_up[at], up = gate_up[at + 8];
  out[row * dim + i] = RoundToBf16(gate / (1.0f + expf(-gate)) * up);
}

// In double, once per step: position * frequency has to stay exact over millions of tokens.
__global__ void RopeTableKernel(const int64_t* positions, double theta, int head_dim, float2* angles) {
  GridLaunchDependents();
  GridWait();
  const int half = head_dim / 2;
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    const double angle = static_cast<double>(positions[blockIdx.x]) * pow(theta, -2.0 * i / head_dim);
    angles[static_cast<int64_t>(blockIdx.x) * half + i] =
        make_float2(static_cast<float>(cos(angle)), static_cast<float>(sin(angle)));
  }
}

constexpr int kRopeHeads = 8;  // of a block

// One warp per (row, head of q or k, and of v where rows move); head_dim <= 128: a lane holds at most two pairs.
__global__ void RopeNormalizeKernel(const RopeRows p) {
  GridLaunchDependents();
  GridWait();
  const int head = blockIdx.y * kRopeHeads + threadIdx.x / kWarp, lane = threadIdx.x % kWarp, half = p.head_dim / 2;
  const int turned = p.num_heads + p.num_kv_heads, heads = turned + p.num_kv_heads;
  const int64_t row = blockIdx.x, to = p.to_rows != nullptr ? p.to_rows[row] : row;
  if (to < 0 || head >= (p.from != nullptr ? heads : turned)) return;
  const float* x = (p.from != nullptr ? p.from : p.qkv) + (row * heads + head) * p.head_dim;
  float* out = p.qkv + (to * heads + head) * p.head_dim;
  if (head >= turned) {
    for (int i = lane; i < p.head_dim; i += kWarp) out[i] = x[i];
    return;
  }
  const float2* angles = p.angles + static_cast<int64_t>(blockIdx.x) * half;
  float low[2] = {}, high[2] = {};
  float squares = 0.0f;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int i = lane + part * kWarp;
    if (i >= half) continue;
    const float a = x[i], b = x[i + half], cosine = angles[i].x, sine = angles[i].y;
    low[part] = fmaf(a, cosine, -(b * sine));
    high[part] = fmaf(b, cosine, a * sine);
    squares = fmaf(low[part], low[part], fmaf(high[part], high[part], squares));
  }
  const float scale = 1.0f / sqrtf(WarpSum(squares) + p.eps);
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int i = lane + part * kWarp;
    if (i >= half) continue;
    out[i] = low[part] * scale;
    out[i + half] = high[part] * scale;
  }
}

__global__ void ArgmaxKernel(const float* logits, int64_t vocab, int32_t* out) {
  __shared__ float values[kThreads];
  __shared__ int indices[kThreads];
  const float* row = logits + blockIdx.x * vocab;
  float best = -INFINITY;
  int at = INT_MAX;
  bool nan = false;
  for (int64_t i = threadIdx.x; i < vocab; i += kThreads) {
    const float value = row[i];
    nan |= isnan(value);
    if (value > best || at == INT_MAX) {
      best = value;
      at = static_cast<int>(i);
    }
  }
  values[threadIdx.x] = best;
  indices[threadIdx.x] = at;
  nan = __syncthreads_or(nan);
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (threadIdx.x < width) {
      const float other = values[threadIdx.x + width];
      const int other_at = indices[threadIdx.x + width];
      if (other > values[threadIdx.x] || (other == values[threadIdx.x] && other_at < indices[threadIdx.x])) {
        values[threadIdx.x] = other;
        indices[threadIdx.x] = other_at;
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = nan ? -1 : indices[0];
}

}  // namespace

void LaunchEmbed(const EmbedParams& params, int rows, cudaStream_t stream) {
  LaunchOverlapped(EmbedKernel, rows, kThreads, 0, stream, 1, params);
}

void LaunchRmsNorm(const RmsNormRows& params, int rows, cudaStream_t stream) {
  LaunchOverlapped(RmsNormKernel, rows, kThreads, 0, stream, 1, params);
}

void LaunchSiluMul(const float* gate_up, uint16_t* out, int64_t dim, int rows, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((dim + kThreads - 1) / kThreads);
  LaunchOverlapped(SiluMulKernel, dim3(rows, blocks), kThreads, 0, stream, 1, gate_up, out, dim);
}

void LaunchRopeTable(const int64_t* positions, double theta, int head_dim, float2* angles, int rows,
                     cudaStream_t stream) {
  LaunchOverlapped(RopeTableKernel, rows, kWarp, 0, stream, 1, positions, theta, head_dim, angles);
}

void LaunchRopeNormalize(const RopeRows& params, int rows, cudaStream_t stream) {
  const int heads = params.num_heads + (params.from != nullptr ? 2 : 1) * params.num_kv_heads;
  const auto blocks = static_cast<unsigned>((heads + kRopeHeads - 1) / kRopeHeads);
  LaunchOverlapped(RopeNormalizeKernel, dim3(rows, blocks), kRopeHeads * kWarp, 0, stream, 1, params);
}

void LaunchArgmax(const float* logits, int64_t vocab, int32_t* out, int rows, cudaStream_t stream) {
  ArgmaxKernel<<<rows, kThreads, 0, stream>>>(logits, vocab, out);
}

}  // namespace linspec::cuda
