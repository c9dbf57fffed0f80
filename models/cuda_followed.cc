#include "models/cuda_followed.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "kernels/cuda/step_buckets.h"

namespace linspec {
namespace {

DraftTree TreeOf(std::span<const LinspecCudaTreeNode> nodes) {
  DraftTree tree;
  tree.Reserve(static_cast<int>(nodes.size()));
  for (const LinspecCudaTreeNode& node : nodes) {
    tree.Add(node.token, node.parent);
    tree.probabilities.push_back(node.probability);
  }
  return tree;
}

}  // namespace

LinspecCudaFollow FollowedSteps::SizeOf(const SelfDraft& draft) {
  return {.num_levels = std::min(draft.num_levels, LINSPEC_CUDA_MAX_FOLLOW_CANDIDATES / draft.top_k),
          .top_k = draft.top_k,
          .num_rows = std::min(cuda::RowBucket(draft.num_rows), cuda::kMaxGraphRows),
          .max_nodes = std::min(draft.max_nodes, LINSPEC_CUDA_MAX_FOLLOW_NODES)};
}

void FollowedSteps::Started(const VerifyBatch& batch) {
  if (batch.num_requests() > 0) slots_ = batch.slots;
}

void FollowedSteps::Accepted(const VerifiedBatch& verified, std::span<const std::vector<int32_t>> paths) {
  expected_.assign(paths.size(), {});
  for (size_t r = 0; r < paths.size(); ++r) {
    if (paths[r].empty()) continue;
    expected_[r] = {.length = verified.lengths[r] + std::ssize(paths[r]),
                    .root = sampled_[verified.batch.row_starts[r] + paths[r].back()]};
  }
}

absl::Status FollowedSteps::Read(const LinspecCudaVerifyResult& result, int64_t vocab_size, VerifiedBatch* verified) {
  const std::vector<Expected> expected = std::exchange(expected_, {});
  *verified = {};
  trees_.clear();
  drafts_.clear();
  for (size_t r = 0; r < slots_.size(); ++r) {
    const LinspecCudaTask& task = result.tasks[r];
    const bool valid = task.slot == slots_[r] && task.row_begin == verified->batch.num_rows() && task.num_rows >= 1 &&
                       task.reserved >= task.num_rows && task.reserved <= LINSPEC_CUDA_MAX_FOLLOW_NODES;
    if (!valid) return absl::InternalError(fmt::format("the device's tree of slot {} is none", slots_[r]));
    const LinspecCudaTreeNode* nodes = result.nodes + r * LINSPEC_CUDA_MAX_FOLLOW_NODES;
    const bool known = r < expected.size() && expected[r].length >= 0;
    if (known && (task.length != expected[r].length || nodes[0].token != expected[r].root)) {
      return absl::InternalError(fmt::format("the device went on with token {} of slot {} at {}, not with {} at {}",
                                             nodes[0].token, slots_[r], task.length, expected[r].root,
                                             expected[r].length));
    }
    trees_.push_back(TreeOf({nodes, static_cast<size_t>(task.num_rows)}));
    drafts_.push_back(TreeOf({nodes, static_cast<size_t>(task.reserved)}));
    if (absl::Status tree = drafts_.back().Validate(vocab_size); !tree.ok()) return absl::InternalError(tree.message());
    verified->batch.Add(slots_[r], trees_.back());
    verified->lengths.push_back(task.length);
  }
  return absl::OkStatus();
}

}  // namespace linspec
