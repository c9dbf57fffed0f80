// CUDA graphs of pieces of work that come again and again in a few sizes: the first time a size is launched kernel by
// kernel (which also loads the kernels), the second time it is captured, later it is replayed.
//
// A graph remembers addresses. `stamp` stands for all that it may point into; when it changes, every graph is dropped.
// Threads: one at a time per context.
#pragma once

#include <array>
#include <cstdint>
#include <map>

#include "kernels/cuda/context.h"

namespace linspec::cuda {

class GraphCache {
 public:
  using Key = std::array<int, 4>;
  explicit GraphCache(Context* context) : context_(context) {}
  ~GraphCache() { Drop(); }
  GraphCache(const GraphCache&) = delete;
  GraphCache& operator=(const GraphCache&) = delete;

  // enqueue: () -> code, queues the work on the context's stream and does nothing else.
  template <typename Enqueue>
  int32_t Run(const Key& key, uint64_t stamp, Enqueue enqueue) {
    if (stamp != stamp_) Drop();
    stamp_ = stamp;
    Graph& graph = graphs_[key];
    if (graph.uses++ == 0) return enqueue();
    if (graph.exec == nullptr) {
      LINSPEC_CUDA_TRY(BeginCapture());
      const int32_t queued = enqueue();
      LINSPEC_CUDA_TRY(EndCapture(queued, &graph.exec));
    }
    return context_->Check(cudaGraphLaunch(graph.exec, context_->stream()), "launch a graph");
  }

 private:
  struct Graph {
    cudaGraphExec_t exec = nullptr;
    int uses = 0;
  };
  int32_t BeginCapture();
  int32_t EndCapture(int32_t queued, cudaGraphExec_t* exec);
  void Drop();

  Context* const context_;
  uint64_t stamp_ = 0;
  std::map<Key, Graph> graphs_;
};

// Few sizes, so that few graphs serve all steps; steps of 8 where products cost the same for each 8 rows.
constexpr int RowBucket(int rows) {
  if (rows <= 4) return rows <= 2 ? rows : 4;
  const int step = rows <= 64 ? 8 : rows <= 128 ? 16 : rows <= 256 ? 32 : 64;
  return (rows + step - 1) / step * step;
}

}  // namespace linspec::cuda
