#include "models/verify_batch.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace linspec {
namespace {

// Each node is the child of the one before it, the first a root.
bool IsPath(const VerifyBatch& batch, int request, std::span<const int32_t> path) {
  const int32_t* parents = batch.parents.data() + batch.row_starts[request];
  int32_t previous = -1;
  for (const int32_t node : path) {
    if (node < 0 || node >= NumNodes(batch, request) || parents[node] != previous) return false;
    previous = node;
  }
  return true;
}

absl::Status ChangedError(int32_t slot) {
  return absl::InternalError(fmt::format("commit: slot {} changed since it was verified", slot));
}

absl::Status CheckDistinct(std::vector<int32_t> slots) {
  std::sort(slots.begin(), slots.end());
  const auto twice = std::adjacent_find(slots.begin(), slots.end());
  return twice == slots.end() ? absl::OkStatus() : ChangedError(*twice);
}

}  // namespace

absl::Status CheckTokens(std::span<const int32_t> tokens, int64_t vocab_size) {
  for (const int32_t token : tokens) {
    if (token >= 0 && token < vocab_size) continue;
    return absl::InvalidArgumentError(fmt::format("token {} is outside the vocabulary of {}", token, vocab_size));
  }
  return absl::OkStatus();
}

absl::Status CheckBatch(const VerifyBatch& batch, int64_t vocab_size, int num_slots) {
  const size_t num_requests = batch.slots.size();
  if (num_requests == 0 || batch.row_starts.size() != num_requests + 1 || batch.row_starts.front() != 0 ||
      batch.row_starts.back() != batch.num_rows() || batch.parents.size() != batch.tokens.size()) {
    return absl::InternalError("verify: the parts of the batch do not fit together");
  }
  for (int r = 0; r < batch.num_requests(); ++r) {
    const int nodes = NumNodes(batch, r);
    if (nodes < 1 || nodes > kMaxTreeNodes || batch.row_starts[r + 1] > batch.num_rows() || batch.slots[r] < 0 ||
        batch.slots[r] > num_slots) {
      return absl::InternalError(fmt::format("verify: request {} has {} nodes, slot {}", r, nodes, batch.slots[r]));
    }
    for (int node = 0; node < nodes; ++node) {
      const int32_t parent = batch.parents[batch.row_starts[r] + node];
      if (node == 0 ? parent != -1 : parent < 0 || parent >= node) {
        return absl::InternalError(fmt::format("verify: node {} of request {} has parent {}", node, r, parent));
      }
    }
  }
  return CheckTokens(batch.tokens, vocab_size);
}

absl::Status CheckDistinctSlots(std::span<const PrefillChunk> chunks) {
  std::vector<int32_t> slots;
  for (const PrefillChunk& chunk : chunks) slots.push_back(chunk.slot);
  std::sort(slots.begin(), slots.end());
  if (std::adjacent_find(slots.begin(), slots.end()) == slots.end()) return absl::OkStatus();
  return absl::InternalError("prefill: a slot appears twice");
}

bool SameBatch(const VerifyBatch& a, const VerifyBatch& b) {
  return a.tokens == b.tokens && a.parents == b.parents && a.row_starts == b.row_starts && a.slots == b.slots;
}

bool Extends(const VerifyBatch& to, const VerifyBatch& from) {
  if (to.slots != from.slots) return false;
  for (int r = 0; r < to.num_requests(); ++r) {
    const int old_nodes = NumNodes(from, r);
    if (NumNodes(to, r) < old_nodes) return false;
    const auto same = [&](const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
      return std::equal(a.begin() + from.row_starts[r], a.begin() + from.row_starts[r] + old_nodes,
                        b.begin() + to.row_starts[r]);
    };
    if (!same(from.tokens, to.tokens) || !same(from.parents, to.parents)) return false;
  }
  return true;
}

void VerifiedBatch::Set(const VerifyBatch& verified, const StatePool& pool) {
  batch = {};
  batch.tokens = verified.tokens;
  batch.parents = verified.parents;
  batch.row_starts = verified.row_starts;
  batch.slots = verified.slots;
  lengths.clear();
  for (const int32_t slot : batch.slots) lengths.push_back(pool.length(slot));
}

absl::Status VerifiedBatch::CheckExtend(const VerifyBatch& to, const StatePool& pool) const {
  if (!Extends(to, batch)) return absl::InternalError("extend: the batch does not grow the last one verified");
  for (int r = 0; r < batch.num_requests(); ++r) {
    if (pool.length(batch.slots[r]) != lengths[r]) {
      return absl::InternalError(fmt::format("extend: slot {} changed since it was verified", batch.slots[r]));
    }
  }
  return absl::OkStatus();
}

absl::Status VerifiedBatch::CheckCommit(const VerifyBatch& committed, std::span<const std::vector<int32_t>> paths,
                                        const StatePool& pool) const {
  if (committed.num_requests() == 0 || !SameBatch(committed, batch)) {
    return absl::InternalError("commit: not the batch last verified, or committed already");
  }
  if (static_cast<int>(paths.size()) != batch.num_requests()) {
    return absl::InternalError(fmt::format("commit: {} paths for {} requests", paths.size(), batch.num_requests()));
  }
  std::vector<int32_t> slots;
  for (int r = 0; r < batch.num_requests(); ++r) {
    if (paths[r].empty()) continue;
    const int32_t slot = batch.slots[r];
    if (!IsPath(batch, r, paths[r])) {
      return absl::InternalError(fmt::format("commit: nodes of request {} are not a path from its root", r));
    }
    if (pool.length(slot) != lengths[r]) return ChangedError(slot);
    slots.push_back(slot);
  }
  return CheckDistinct(std::move(slots));
}

absl::Status VerifiedBatch::CheckRoots(const StatePool& pool) const {
  if (batch.num_requests() == 0 || batch.num_rows() != batch.num_requests()) {
    return absl::InternalError("commit: not a batch of single nodes that was verified");
  }
  for (int r = 0; r < batch.num_requests(); ++r) {
    if (pool.length(batch.slots[r]) != lengths[r]) return ChangedError(batch.slots[r]);
  }
  return CheckDistinct(batch.slots);
}

}  // namespace linspec
