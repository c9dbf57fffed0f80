// The input of one level of the recurrent draft head, a block for each half of a row.
#include "kernels/cuda/block.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/pdl.h"
#include "kernels/cuda/recurrent.h"
#include "kernels/cuda/recurrent_norm.h"

namespace linspec::cuda {
namespace {

constexpr int kWarp = 32;
static_assert(kThreads == kNormVectors * kWarp);

// Grid: rows, and state or token.
__global__ void __launch_bounds__(kThreads) RecurrentInputKernel(const RecurrentInputParams p) {
  __shared__ float squares[kNormVectors][kWarp];
  GridLaunchDependents();
  GridWait();
  const LinspecCudaDraftRow row = p.input.rows[blockIdx.x];
  const int64_t dim = p.embedding.cols;
  const bool first = p.tokens == nullptr, of_token = blockIdx.y == 1;
  auto* state = reinterpret_cast<float4*>(p.state + blockIdx.x * dim);
  const auto* weights = reinterpret_cast<const float4*>(of_token ? p.token_norm : p.state_norm);
  auto* out = reinterpret_cast<uint2*>(p.out + (blockIdx.x * 2 + blockIdx.y) * dim);
  const auto norm = [&](auto from, auto widen) {
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < dim / 4; i += kThreads) sum += Squares(widen(from[i]));
    squares[threadIdx.x / kWarp][threadIdx.x % kWarp] = sum;
    __syncthreads();
    sum = 0.0f;
    for (const auto& vector : squares) sum += vector[threadIdx.x % kWarp];
    const float scale = InverseRmsOf(AddLanes(sum), 1.0f / static_cast<float>(dim), p.eps);
    for (int64_t i = threadIdx.x; i < dim / 4; i += kThreads) {
      const float4 v = widen(from[i]);
      if (first && !of_token) state[i] = v;
      out[i] = Normed(v, scale, __ldg(weights + i));
    }
  };
  if (of_token) {
    ReadEmbedding(p.embedding, first ? row.token : p.tokens[blockIdx.x], norm);
  } else {
    norm(first ? reinterpret_cast<const float4*>(*p.input.hidden + row.hidden_row * dim) : state,
         [](const float4& v) { return v; });
  }
}

}  // namespace

void LaunchRecurrentInput(const RecurrentInputParams& params, cudaStream_t stream) {
  LaunchOverlapped(RecurrentInputKernel, dim3(params.input.num_rows, 2), kThreads, 0, stream, 1, params);
}

}  // namespace linspec::cuda
