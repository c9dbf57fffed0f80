#include "scheduler/scheduler.h"

#include <algorithm>
#include <unordered_map>

#include "models/draft_tree.h"

namespace linspec {

namespace {

// How many prompt tokens each sequence advances by: `budget` in all, but at least one for every tenant.
std::vector<int64_t> SharePromptTokens(std::span<const SequenceView> sequences, int64_t budget) {
  std::vector<int64_t> granted(sequences.size(), 0);
  std::unordered_map<std::string_view, int64_t> share;  // what a tenant may still get in the first round
  for (const SequenceView& sequence : sequences) {
    if (sequence.prefill_left > 0) share.emplace(sequence.tenant, 0);
  }
  budget = std::max<int64_t>(budget, std::ssize(share));
  for (auto& [tenant, tokens] : share) tokens = budget / std::ssize(share);
  const auto grant = [&](size_t i, int64_t limit) {
    const SequenceView& sequence = sequences[i];
    int64_t want = sequence.prefill_left;
    if (sequence.score_prompt) want = std::min<int64_t>(want, kMaxTreeNodes);
    const int64_t tokens = std::min({want - granted[i], limit, budget});
    granted[i] += tokens;
    budget -= tokens;
    return tokens;
  };
  for (size_t i = 0; i < sequences.size() && budget > 0; ++i) {
    if (sequences[i].prefill_left == 0) continue;
    int64_t& left = share[sequences[i].tenant];
    left -= grant(i, left);
  }
  for (size_t i = 0; i < sequences.size() && budget > 0; ++i) grant(i, budget);  // what some tenants had no use for
  return granted;
}

}  // namespace

StepPlan Scheduler::Plan(std::span<const SequenceView> sequences) const {
  StepPlan plan;
  for (size_t i = 0; i < sequences.size(); ++i) {
    if (sequences[i].prefill_left == 0) plan.decode.push_back(static_cast<int>(i));
  }
  const int64_t num_decode = static_cast<int64_t>(plan.decode.size());
  const int64_t reserved = std::min<int64_t>(num_decode * (max_draft_nodes_ - 1), max_step_tokens_ / 2);
  const int64_t budget = std::max<int64_t>(max_step_tokens_ - num_decode - reserved, 0);
  const std::vector<int64_t> granted = SharePromptTokens(sequences, budget);
  int64_t used = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    if (granted[i] == 0) continue;
    std::vector<PromptChunk>& chunks = sequences[i].score_prompt ? plan.score : plan.prefill;
    chunks.push_back({static_cast<int>(i), static_cast<int>(granted[i])});
    used += granted[i];
  }
  plan.draft_rows = static_cast<int>(std::max<int64_t>(max_step_tokens_ - num_decode - used, 0));
  return plan;
}

}  // namespace linspec
