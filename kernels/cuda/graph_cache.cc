#include "kernels/cuda/graph_cache.h"

namespace linspec::cuda {

int32_t GraphCache::BeginCapture() {
  return context_->Check(cudaStreamBeginCapture(context_->stream(), cudaStreamCaptureModeThreadLocal), "capture");
}

int32_t GraphCache::EndCapture(int32_t queued, cudaGraphExec_t* exec) {
  cudaGraph_t captured = nullptr;
  LINSPEC_CUDA_TRY(context_->Check(cudaStreamEndCapture(context_->stream(), &captured), "end of capture"));
  const cudaError_t made = cudaGraphInstantiate(exec, captured, 0);
  cudaGraphDestroy(captured);
  LINSPEC_CUDA_TRY(queued);
  return context_->Check(made, "instantiate a graph");
}

void GraphCache::Drop() {
  for (auto& [key, graph] : graphs_) {
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }
  graphs_.clear();
}

}  // namespace linspec::cuda
