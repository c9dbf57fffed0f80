// CUDA graphs of pieces of work that come again and again in a few sizes: captured the first time, then replayed.
// Kernels are loaded when they are first launched, which a capture is not for: a size whose kernels may be new is
// launched kernel by kernel once, and captured the second time.
//
// A graph remembers addresses. `stamp` stands for all that it may point into; when it changes, every graph is dropped.
// Threads: one at a time per context.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <set>

#include "kernels/cuda/context.h"
#include "kernels/cuda/step_buckets.h"

namespace linspec::cuda {

class GraphCache {
 public:
  using Key = std::array<int, 5>;
  explicit GraphCache(Context* context) : context_(context) {}
  ~GraphCache() { Drop(); }
  GraphCache(const GraphCache&) = delete;
  GraphCache& operator=(const GraphCache&) = delete;

  // enqueue: () -> code, queues the work on the context's stream and does nothing else. kernels: the same number for
  // work that launches the same kernels.
  template <typename Enqueue>
  int32_t Run(const Key& key, int kernels, uint64_t stamp, Enqueue enqueue) {
    if (stamp != stamp_) Drop();
    stamp_ = stamp;
    if (loaded_.insert(kernels).second) return enqueue();
    cudaGraphExec_t& graph = graphs_[key];
    if (graph == nullptr) {
      LINSPEC_CUDA_TRY(BeginCapture());
      const int32_t queued = enqueue();
      LINSPEC_CUDA_TRY(EndCapture(queued, &graph));
    }
    return context_->Check(cudaGraphLaunch(graph, context_->stream()), "launch a graph");
  }

 private:
  int32_t BeginCapture();
  int32_t EndCapture(int32_t queued, cudaGraphExec_t* exec);
  void Drop();

  Context* const context_;
  uint64_t stamp_ = 0;
  std::map<Key, cudaGraphExec_t> graphs_;
  std::set<int> loaded_;  // kernels
};

}  // namespace linspec::cuda
