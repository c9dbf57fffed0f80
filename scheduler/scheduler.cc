#include "scheduler/scheduler.h"

#include <algorithm>

#include "models/draft_tree.h"

namespace linspec {

StepPlan Scheduler::Plan(std::span<const SequenceView> sequences) const {
  StepPlan plan;
  for (size_t i = 0; i < sequences.size(); ++i) {
    if (sequences[i].prefill_left == 0) plan.decode.push_back(static_cast<int>(i));
  }
  const int64_t num_decode = static_cast<int64_t>(plan.decode.size());
  const int64_t reserved = std::min<int64_t>(num_decode * (max_draft_nodes_ - 1), max_step_tokens_ / 2);
  int64_t left = std::max<int64_t>(max_step_tokens_ - num_decode - reserved, 1);
  int64_t used = 0;
  for (size_t i = 0; i < sequences.size() && left > 0; ++i) {
    if (sequences[i].prefill_left == 0) continue;
    int64_t tokens = std::min(sequences[i].prefill_left, left);
    if (sequences[i].score_prompt) tokens = std::min<int64_t>(tokens, kMaxTreeNodes);
    (sequences[i].score_prompt ? plan.score : plan.prefill).push_back({static_cast<int>(i), static_cast<int>(tokens)});
    left -= tokens;
    used += tokens;
  }
  plan.draft_rows = static_cast<int>(std::max<int64_t>(max_step_tokens_ - num_decode - used, 0));
  return plan;
}

}  // namespace linspec
