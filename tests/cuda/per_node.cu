// One block per (kv head, request), 256 threads: thread t owns rows [t / 32 * 16, +16) and columns 4 (t % 32) of S.
// Per node: moves (1 + nodes) * 64 KB per head: S read once, every node's state written. Eager: 128 KB per head and
// call.
#include "kernels/cuda/block.h"
#include "tests/cuda/per_node.h"

namespace linspec::cuda {
namespace {

constexpr int kDim = 128, kRows = 16;

__global__ void __launch_bounds__(kThreads)
    PerNodeKernel(const float* states, float* node_states, const float* qkv, float* out, int nodes) {
  __shared__ float partial[kThreads / 32][kDim];
  const int head = blockIdx.x, heads = gridDim.x, group = threadIdx.x / 32, c = threadIdx.x % 32 * 4;
  const int64_t request = blockIdx.y, matrix = kDim * kDim;
  Vec4 s[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    s[r] = Load4(states + (request * heads + head) * matrix + (group * kRows + r) * kDim + c);
  for (int node = 0; node < nodes; ++node) {
    const float* row = qkv + (request * nodes + node) * 3 * heads * kDim + head * kDim;
    float* target = node_states + ((request * nodes + node) * heads + head) * matrix;
    const Vec4 v = Load4(row + 2 * heads * kDim + c);
    Vec4 sum{0, 0, 0, 0};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Fma4(row[heads * kDim + group * kRows + r], v, s[r]);
      Fma4(row[group * kRows + r], s[r], sum);
      Store4(target + (group * kRows + r) * kDim + c, s[r]);
    }
    Store4(&partial[group][c], sum);
    __syncthreads();
    if (threadIdx.x < kDim) {
      float total = 0.0f;
      for (const auto& part : partial) total += part[threadIdx.x];
      out[((request * nodes + node) * heads + head) * kDim + threadIdx.x] = total;
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) EagerKernel(float* states, int64_t stride, const float* qkv, int tokens) {
  const int head = blockIdx.x, heads = gridDim.x, group = threadIdx.x / 32, c = threadIdx.x % 32 * 4;
  const int64_t request = blockIdx.y;
  float* state = states + request * stride + head * kDim * kDim + group * kRows * kDim + c;
  Vec4 s[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) s[r] = Load4(state + r * kDim);
  for (int token = 0; token < tokens; ++token) {
    const float* row = qkv + (request * tokens + token) * 3 * heads * kDim + head * kDim;
    const Vec4 v = Load4(row + 2 * heads * kDim + c);
#pragma unroll
    for (int r = 0; r < kRows; ++r) Fma4(row[heads * kDim + group * kRows + r], v, s[r]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) Store4(state + r * kDim, s[r]);
}

}  // namespace

void LaunchEagerCommit(float* states, int64_t stride, const float* qkv, int requests, int tokens, int kv_heads,
                       cudaStream_t stream) {
  EagerKernel<<<dim3(kv_heads, requests), kThreads, 0, stream>>>(states, stride, qkv, tokens);
}

void LaunchPerNodeVerify(const float* states, float* node_states, const float* qkv, float* out, int requests, int nodes,
                         int kv_heads, cudaStream_t stream) {
  PerNodeKernel<<<dim3(kv_heads, requests), kThreads, 0, stream>>>(states, node_states, qkv, out, nodes);
}

}  // namespace linspec::cuda
