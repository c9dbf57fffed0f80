// What Verify, Extend and Commit must be able to rely on, checked the same way by every model.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "models/model.h"

namespace linspec {

inline int NumNodes(const VerifyBatch& batch, int request) {
  return batch.row_starts[request + 1] - batch.row_starts[request];
}

// INTERNAL: parts that do not fit together, a tree that is not one. INVALID_ARGUMENT: a token outside the vocabulary.
absl::Status CheckBatch(const VerifyBatch& batch, int64_t vocab_size, int num_slots);
absl::Status CheckTokens(std::span<const int32_t> tokens, int64_t vocab_size);
absl::Status CheckDistinctSlots(std::span<const PrefillChunk> chunks);

// Same trees on the same slots.
bool SameBatch(const VerifyBatch& a, const VerifyBatch& b);
// Every request of `from` begins request r of `to`: same slot, and its nodes come first.
bool Extends(const VerifyBatch& to, const VerifyBatch& from);

// What the last Verify or Extend left for Commit.
struct VerifiedBatch {
  VerifyBatch batch;             // empty: nothing to commit
  std::vector<int64_t> lengths;  // [num_requests] of the slots, then

  void Set(const VerifyBatch& verified, const StatePool& pool);
  absl::Status CheckExtend(const VerifyBatch& to, const StatePool& pool) const;
  // Its requests have a node each, their slots are distinct and as they were.
  absl::Status CheckRoots(const StatePool& pool) const;
  // batch is the one verified, slots are as they were, and each path is one from a root.
  absl::Status CheckCommit(const VerifyBatch& committed, std::span<const std::vector<int32_t>> paths,
                           const StatePool& pool) const;
};

}  // namespace linspec
