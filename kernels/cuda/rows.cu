// Row operations: advance, embed, RMSNorm, SiLU * up, RoPE + L2 norm, argmax. One block (or warp) per row, fp32
// arithmetic, fixed reduction order: lane partials over a fixed stride, then halves onto halves, so that a row's bits
// depend on that row. Launched overlapped (pdl.h), but for advance: the product after a row operation fetches its
// weights while that still runs.
//
// Floor in bytes per row: embed D * (type + 4); RMSNorm 4 D read + 2 D written; SiLU 4 F + 2 F; RoPE 8 (H + Hkv) d, and
// 8 Hkv d where k and v move; argmax 4 V. All are under 2 % of a 7B layer's weights up to 64 rows.
#include <algorithm>
#include <climits>

#include "kernels/cuda/embedding.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pdl.h"
#include "kernels/cuda/rope.h"

namespace linspec::cuda {
namespace {

constexpr int kWarp = 32;

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

__global__ void __launch_bounds__(kThreads) AdvanceKernel(const AdvanceParams p, int num_tasks, int rows) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i < num_tasks) ++p.tasks[i].length;
  if (i >= rows) return;
  p.tokens[i] = max(p.sampled[i], 0);
  ++p.positions[i];
  ++p.sampling[i].position;
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

__device__ uint32_t SiluMulPair(uint32_t gates, uint32_t ups) {
  uint32_t result = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float gate = __uint_as_float(i == 0 ? gates << 16 : gates & 0xFFFF0000u);
    const float up = __uint_as_float(i == 0 ? ups << 16 : ups & 0xFFFF0000u);
    result |= static_cast<uint32_t>(RoundToBf16(gate / (1.0f + expf(-gate)) * up)) << 16 * i;
  }
  return result;
}

// gate_up holds 8 of gate, the same 8 of up, and so on (PackedGateUpRow): a thread takes one such pair of eights.
__global__ void __launch_bounds__(kThreads) SiluMulKernel(const uint4* gate_up, uint4* out, int64_t eights) {
  GridLaunchDependents();
  GridWait();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= eights) return;
  const uint4 gate = gate_up[2 * i], up = gate_up[2 * i + 1];
  out[i] = make_uint4(SiluMulPair(gate.x, up.x), SiluMulPair(gate.y, up.y), SiluMulPair(gate.z, up.z),
                      SiluMulPair(gate.w, up.w));
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

// A warp takes one of the first `heads` heads of a row: of q and k, and of v where that moves or is rounded. Several a
// warp in few large blocks, which leaves room for verify's blocks to begin meanwhile, lost more than it won (an H100:
// a 7B step of 64 requests 8.40 ms for 8.31).
template <bool kWide>
__global__ void __launch_bounds__(kThreads) RopeNormalizeKernel(const RopeRows p, int rows, int heads) {
  GridLaunchDependents();
  const int half = kWide ? 64 : p.head_dim / 2, d = 2 * half;
  const int warp = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  const int row = warp / heads, head = warp % heads;
  const int turned = p.num_heads + p.num_kv_heads, all = turned + p.num_kv_heads;
  if (row >= rows) return;
  float* own = p.qkv + (static_cast<int64_t>(row) * all + head) * d;
  GridWait();
  RopeLane<kWide> x, angles;
  x.Load(own, lane, half);
  angles.LoadAngles(p.angles + static_cast<int64_t>(row) * half, lane, half);
  const int64_t kept_row = p.kv_rows != nullptr ? p.kv_rows[row] : row;
  if (head < turned) x.TurnAndNormalize(angles, lane, half, p.eps);
  if (head < p.num_heads) return x.Store(own, lane, half);
  if (kept_row < 0) return;
  const int64_t kept = (kept_row * 2 * p.num_kv_heads + head - p.num_heads) * d;
  if (p.kv != nullptr && p.bf16) return x.Store(static_cast<uint16_t*>(p.kv) + kept, lane, half);
  if (p.bf16) x.Round();
  x.Store(p.kv != nullptr ? static_cast<float*>(p.kv) + kept : own, lane, half);
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

void LaunchEmbed(const EmbedParams& params, int rows, cudaStream_t stream, bool overlapped) {
  if (overlapped) {
    LaunchOverlapped(EmbedKernel, rows, kThreads, 0, stream, 1, params);
  } else {
    EmbedKernel<<<rows, kThreads, 0, stream>>>(params);
  }
}

void LaunchAdvance(const AdvanceParams& params, int num_tasks, int rows, cudaStream_t stream) {
  const int blocks = (std::max(num_tasks, rows) + kThreads - 1) / kThreads;
  AdvanceKernel<<<blocks, kThreads, 0, stream>>>(params, num_tasks, rows);
}

void LaunchRmsNorm(const RmsNormRows& params, int rows, cudaStream_t stream) {
  LaunchOverlapped(RmsNormKernel, rows, kThreads, 0, stream, 1, params);
}

void LaunchSiluMul(const uint16_t* gate_up, uint16_t* out, int64_t dim, int rows, cudaStream_t stream) {
  const int64_t eights = rows * dim / 8;
  const auto blocks = static_cast<unsigned>((eights + kThreads - 1) / kThreads);
  LaunchOverlapped(SiluMulKernel, blocks, kThreads, 0, stream, 1, reinterpret_cast<const uint4*>(gate_up),
                   reinterpret_cast<uint4*>(out), eights);
}

void LaunchRopeTable(const int64_t* positions, double theta, int head_dim, float2* angles, int rows,
                     cudaStream_t stream) {
  LaunchOverlapped(RopeTableKernel, rows, kWarp, 0, stream, 1, positions, theta, head_dim, angles);
}

void LaunchRopeNormalize(const RopeRows& params, int rows, cudaStream_t stream) {
  const int heads = params.num_heads + params.num_kv_heads * (params.kv != nullptr || params.bf16 ? 2 : 1);
  const int64_t threads = int64_t{rows} * heads * kWarp;
  LaunchOverlapped(params.head_dim == 128 ? RopeNormalizeKernel<true> : RopeNormalizeKernel<false>,
                   static_cast<unsigned>((threads + kThreads - 1) / kThreads), kThreads, 0, stream, 1, params, rows,
                   heads);
}

void LaunchArgmax(const float* logits, int64_t vocab, int32_t* out, int rows, cudaStream_t stream) {
  ArgmaxKernel<<<rows, kThreads, 0, stream>>>(logits, vocab, out);
}

}  // namespace linspec::cuda
