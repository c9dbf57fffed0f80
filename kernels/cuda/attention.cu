// Host entry points of attention: the tensor-core instances where the layer shape has them (verify.cu, commit.cu,
// prefill.cu), else the programs of window_programs.h on the grid (kv head, request), for any shape.
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/pdl.h"
#include "kernels/cuda/window_programs.h"

namespace linspec::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) VerifyKernel(const AttentionParams p) {
  __shared__ AttentionShared shared;
  VerifyBlock<0>(DeviceBlock{}, p, p.tasks[blockIdx.y], blockIdx.x, shared);
}

__global__ void __launch_bounds__(kThreads) CommitKernel(const AttentionParams p) {
  CommitBlock<0>(DeviceBlock{}, p, p.tasks[blockIdx.y], blockIdx.x);
}

__global__ void __launch_bounds__(kThreads) CommitLayersKernel(const AttentionParams* layers) {
  const AttentionParams& p = layers[blockIdx.z];
  CommitBlock<0>(DeviceBlock{}, p, p.tasks[blockIdx.y], blockIdx.x);
}

__global__ void __launch_bounds__(kThreads) PrefillKernel(const AttentionParams p) {
  __shared__ AttentionShared shared;
  PrefillBlock<0>(DeviceBlock{}, p, p.tasks[blockIdx.y], blockIdx.x, shared);
}

using Kernel = void (*)(AttentionParams);

void Launch(Kernel kernel, const AttentionParams& params, int num_tasks, cudaStream_t stream) {
  kernel<<<dim3(params.layer.num_kv_heads, num_tasks), kThreads, 0, stream>>>(params);
}

}  // namespace

bool HasTiles(const LayerParams& layer) {
  constexpr int kSharedBytes = 228 * 1024;
  const int d = layer.head_dim, g = layer.group_size;
  return (d == 64 || d == 128) && g >= 8 && g <= 64 && (g & (g - 1)) == 0 && layer.conv_kernel <= 32 &&
         layer.conv_kernel <= g && CurrentDevice().shared_per_processor >= kSharedBytes;
}

bool SupportsBf16States(const LayerParams& layer) { return HasTiles(layer); }

void LaunchVerify(const AttentionParams& params, int num_tasks, cudaStream_t stream) {
  if (num_tasks == 0) return;
  if (HasTiles(params.layer)) return LaunchVerifyTiles(params, num_tasks, stream);
  Launch(VerifyKernel, params, num_tasks, stream);
}

void LaunchCommit(const AttentionParams& params, int num_tasks, cudaStream_t stream) {
  if (num_tasks == 0) return;
  if (HasTiles(params.layer)) return LaunchCommitTiles(params, num_tasks, stream);
  Launch(CommitKernel, params, num_tasks, stream);
}

void LaunchCommitLayers(const LayerParams& shape, bool bf16, const AttentionParams* layers, int num_layers,
                        int num_tasks, cudaStream_t stream) {
  if (num_tasks == 0 || num_layers == 0) return;
  if (HasTiles(shape)) return LaunchCommitTilesOfLayers(shape, bf16, layers, num_layers, num_tasks, stream);
  CommitLayersKernel<<<dim3(shape.num_kv_heads, num_tasks, num_layers), kThreads, 0, stream>>>(layers);
}

void LaunchPrefill(const AttentionParams& params, int num_tasks, cudaStream_t stream) {
  if (num_tasks == 0) return;
  if (HasTiles(params.layer)) return LaunchPrefillTiles(params, num_tasks, stream);
  Launch(PrefillKernel, params, num_tasks, stream);
}

int64_t PrefillScratchFloats(const LayerParams& layer, int64_t num_groups) {
  if (!HasTiles(layer)) return 0;
  return num_groups * layer.num_kv_heads * layer.head_dim * layer.head_dim;
}

}  // namespace linspec::cuda
