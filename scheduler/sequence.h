// Progress of one request. `num_committed` tokens are in the recurrent state; while decoding exactly one more, the
// pending token, is known and not in it.
//
// Threads: engine thread only. The slot is given back the moment the sequence finishes.
#pragma once

#include <cstdint>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "models/draft_tree.h"
#include "models/sampler.h"
#include "models/state_pool.h"
#include "scheduler/acceptance.h"
#include "scheduler/request.h"
#include "scheduler/request_queue.h"
#include "scheduler/scheduler.h"

namespace linspec {

class Sequence {
 public:
  // An invalid slot is for requests that end before they run.
  Sequence(uint64_t id, QueuedRequest queued, StateSlot slot, Clock::time_point now);

  uint64_t id() const { return id_; }  // never used twice, unlike request ids
  const Request& request() const { return request_; }
  const SamplingParams& sampling() const { return request_.sampling; }
  AcceptanceMode acceptance() const { return request_.acceptance; }
  // Whom states kept of this sequence are for: tenant and salt.
  const std::string& cache_owner() const { return cache_owner_; }
  int32_t slot() const { return slot_.id(); }
  bool finished() const { return output_.finish_reason != FinishReason::kNone; }
  std::span<const int32_t> tokens() const { return tokens_; }
  int64_t num_prompt_tokens() const { return output_.num_prompt_tokens; }
  int64_t num_committed() const { return num_committed_; }
  int32_t pending_token() const { return tokens_.back(); }
  int64_t num_tokens_left() const { return sampling().max_tokens - output_.num_output_tokens; }
  SequenceView view() const;

  // Of the prompt, what is to be committed before decoding: all but the last token.
  std::span<const int32_t> prompt_prefix() const { return tokens().first(num_prompt_tokens() - 1); }
  // The slot's state covers this many tokens of the prompt: they were taken from the prefix cache.
  void TakeUp(int64_t num_tokens);
  // Prefill stops once at this many tokens, so that the state there can be kept.
  void StopAt(int64_t num_tokens) { stops_.insert(num_tokens); }
  bool at_stop() { return stops_.erase(num_committed_) > 0; }
  // The sequence that is about to compute a state which this one would only compute again; 0: none.
  uint64_t waits_for = 0;
  int64_t waits_until = 0;  // that one has committed this many tokens

  std::span<const int32_t> NextPromptTokens(int count) const;
  void AdvancePrompt(int count) { num_committed_ += count; }
  void AddPromptScore(SampledToken token) { output_.tokens.push_back(std::move(token)); }

  WalkInput walk_input(std::span<const int32_t> eos_token_ids);
  // Takes what a walk over `tree` chose; finishes the sequence when the walk says so.
  void Accept(const DraftTree& tree, Walk walk, Clock::time_point now);
  void Finish(FinishReason reason, absl::Status status, Clock::time_point now);
  StateSlot GiveUpSlot() { return std::move(slot_); }  // right before it finishes

  // The target's hidden state at the last committed token; empty before the first decode step.
  std::vector<float> hidden;
  // The row of the model's last Verify that has it; -1: not among them.
  int hidden_row = -1;

  // Prompt scores wait for the first generated token, so that one output starts with the whole prompt.
  bool has_news() const { return !closed_ && (finished() || output_.num_output_tokens > num_delivered_); }
  // Hands the news to the sink; false when the client wants no more.
  bool Deliver();
  // The client wants no more: ends without a last output.
  void Abandon(Clock::time_point now);
  bool closed() const { return closed_; }  // the last output was delivered, or is not wanted

 private:
  uint64_t id_;
  Request request_;
  StateSlot slot_;
  std::vector<int32_t> tokens_;  // prompt and output, the pending token last
  int64_t num_committed_ = 0;
  std::set<int64_t> stops_;  // beyond num_committed_, within the prompt
  const std::string cache_owner_;
  PenaltyHistory history_;
  int64_t num_delivered_ = 0;
  bool closed_ = false;
  RequestOutput output_;  // running totals, and the news of this step
};

}  // namespace linspec
