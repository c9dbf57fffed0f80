// Policy of one step: which sequences decode, which prompts advance and how far. Pure and deterministic: no clock, no
// thread, no device. Admission needs no policy beyond a free slot, because a state never grows.
//
// Decode rows come first, so running streams never wait for a long prompt; what is left of the step's token budget is
// shared equally between the tenants that have prompts, and goes to a tenant's prompts in order of admission. Drafts
// may take up to half of the budget away from prompts, and prompts of every tenant always advance by at least one
// token, so neither starves the other.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace linspec {

struct SequenceView {
  int64_t prefill_left = 0;   // prompt tokens that are not in the state yet, the last one not counted; 0: decoding
  bool score_prompt = false;  // its prompt goes through Verify, because the logits of every token are wanted
  std::string_view tenant = {};
};

struct PromptChunk {
  int sequence;  // index into the views
  int num_tokens;
};

struct StepPlan {
  std::vector<PromptChunk> prefill;
  std::vector<PromptChunk> score;  // at most kMaxTreeNodes tokens each
  std::vector<int> decode;         // indices into the views
  int draft_rows = 0;              // verify rows that drafts may add
  bool empty() const { return prefill.empty() && score.empty() && decode.empty(); }
};

class Scheduler {
 public:
  // max_step_tokens >= 1. max_draft_nodes as in EngineOptions; 1 when nothing can draft.
  Scheduler(int max_step_tokens, int max_draft_nodes)
      : max_step_tokens_(max_step_tokens), max_draft_nodes_(max_draft_nodes) {}
  StepPlan Plan(std::span<const SequenceView> sequences) const;

 private:
  int max_step_tokens_, max_draft_nodes_;
};

}  // namespace linspec
