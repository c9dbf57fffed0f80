// tree_verify, commit_append_fold and prefill: window_programs.h (math, layout, floor) on the grid (kv head, request).
// Instances for the head sizes in use keep S in registers with compile-time indices; 0 takes any other.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/window_programs.h"

namespace linspec::cuda {
namespace {

template <int kDim>
__global__ void __launch_bounds__(kThreads, 2) VerifyKernel(const AttentionParams p) {
  __shared__ AttentionShared shared;
  VerifyBlock<kDim>(DeviceBlock{}, p, p.tasks[blockIdx.y], blockIdx.x, shared);
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, 2) CommitKernel(const AttentionParams p) {
  CommitBlock<kDim>(DeviceBlock{}, p, p.tasks[blockIdx.y], blockIdx.x);
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, 2) PrefillKernel(const AttentionParams p) {
  __shared__ AttentionShared shared;
  PrefillBlock<kDim>(DeviceBlock{}, p, p.tasks[blockIdx.y], blockIdx.x, shared);
}

using Kernel = void (*)(AttentionParams);

void Launch(Kernel d128, Kernel d64, Kernel any, const AttentionParams& params, int num_tasks, cudaStream_t stream) {
  if (num_tasks == 0) return;
  const Kernel kernel = params.layer.head_dim == 128 ? d128 : params.layer.head_dim == 64 ? d64 : any;
  kernel<<<dim3(params.layer.num_kv_heads, num_tasks), kThreads, 0, stream>>>(params);
}

}  // namespace

void LaunchVerify(const AttentionParams& params, int num_tasks, cudaStream_t stream) {
  Launch(VerifyKernel<128>, VerifyKernel<64>, VerifyKernel<0>, params, num_tasks, stream);
}

void LaunchCommit(const AttentionParams& params, int num_tasks, cudaStream_t stream) {
  Launch(CommitKernel<128>, CommitKernel<64>, CommitKernel<0>, params, num_tasks, stream);
}

void LaunchPrefill(const AttentionParams& params, int num_tasks, cudaStream_t stream) {
  Launch(PrefillKernel<128>, PrefillKernel<64>, PrefillKernel<0>, params, num_tasks, stream);
}

}  // namespace linspec::cuda
