// What the plugin is told of a step and of a request in it, and the commit of what a step looked at: the latter two are
// the same for a model and for the chains of a draft model. Threads: engine thread only.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "models/model.h"
#include "models/verify_batch.h"

namespace linspec {

// Request r of the batch, whose slot holds `length` tokens.
LinspecCudaTask TaskOf(const VerifyBatch& batch, int request, int64_t length);

// A batch as verify_start reads it.
class CudaStep {
 public:
  // Points into the batch and into this object, which the next call changes.
  LinspecCudaStep Fill(const VerifyBatch& batch, const StatePool& pool);

 private:
  std::vector<LinspecCudaTask> tasks_;
  std::vector<int64_t> positions_;
  std::vector<uint64_t> ancestors_;
  std::vector<LinspecCudaSampling> sampling_;
  std::vector<LinspecCudaLogitEdit> edits_;
};

// Model::Commit. `verified` is empty afterwards, unless the paths were none of its.
absl::Status CommitPaths(const CudaHandle& handle, VerifiedBatch* verified, const VerifyBatch& batch,
                         std::span<const std::vector<int32_t>> paths, StatePool* pool);

}  // namespace linspec
