// The trees of steps that a GPU made behind steps that were not read yet, and whether it accepted what the engine did.
// Threads: engine thread only.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "models/model.h"
#include "models/verify_batch.h"

namespace linspec {

class FollowedSteps {
 public:
  static LinspecCudaFollow SizeOf(const SelfDraft& draft);
  // A step that follows `batch` was started; empty: one that follows the last such step.
  void Started(const VerifyBatch& batch);
  // The token chosen after each row of the step that is followed.
  void Finished(std::span<const int32_t> sampled) { sampled_.assign(sampled.begin(), sampled.end()); }
  // What the engine accepted of it: paths as for Model::Commit.
  void Accepted(const VerifiedBatch& verified, std::span<const std::vector<int32_t>> paths);
  // The trees of the step that followed, with lengths of its slots. INTERNAL: no trees, or roots and lengths other than
  // by Accepted, of requests that went on.
  absl::Status Read(const LinspecCudaVerifyResult& result, int64_t vocab_size, VerifiedBatch* verified);
  // As in VerifyResult.
  std::span<const DraftTree> trees() const { return trees_; }
  std::span<const DraftTree> drafts() const { return drafts_; }

 private:
  struct Expected {
    int64_t length = -1;  // -1: the request ended
    int32_t root = 0;
  };
  std::vector<int32_t> slots_, sampled_;
  std::vector<Expected> expected_;
  std::vector<DraftTree> trees_, drafts_;
};

}  // namespace linspec
