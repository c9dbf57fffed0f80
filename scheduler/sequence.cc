#include "scheduler/sequence.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace linspec {
namespace {

// Counting a long prompt is only worth it when something looks at the counts.
std::span<const int32_t> PenalizedPrompt(const Request& request) {
  if (request.sampling.repetition_penalty == 1.0f) return {};
  return request.prompt_tokens;
}

// No tenant's name has a line's end in it.
std::string CacheOwner(const Request& request) {
  return request.cache_salt.empty() ? request.tenant : request.tenant + '\n' + request.cache_salt;
}

}  // namespace

Sequence::Sequence(uint64_t id, QueuedRequest queued, StateSlot slot, Clock::time_point now)
    : id_(id),
      request_(std::move(queued.request)),
      slot_(std::move(slot)),
      cache_owner_(CacheOwner(request_)),
      history_(PenalizedPrompt(request_)) {
  tokens_ = std::exchange(request_.prompt_tokens, {});
  output_.request_id = request_.id;
  output_.num_prompt_tokens = static_cast<int64_t>(tokens_.size());
  output_.times.arrival = queued.arrival;
  output_.times.scheduled = now;
  if (request_.prompt_logprobs && slot_.valid()) {  // nothing predicts the first token
    output_.tokens.push_back({tokens_.front(), std::numeric_limits<float>::quiet_NaN(), {}});
  }
}

void Sequence::TakeUp(int64_t num_tokens) {
  num_committed_ = num_tokens;
  stops_.erase(stops_.begin(), stops_.upper_bound(num_tokens));
  output_.num_cached_tokens = num_tokens;
}

SequenceView Sequence::view() const {
  const int64_t end = stops_.empty() ? num_prompt_tokens() - 1 : *stops_.begin();
  return {.prefill_left = std::max<int64_t>(end - num_committed_, 0),
          .score_prompt = request_.prompt_logprobs,
          .tenant = request_.tenant};
}

std::span<const int32_t> Sequence::NextPromptTokens(int count) const {
  return std::span<const int32_t>(tokens_).subspan(num_committed_, count);
}

WalkInput Sequence::walk_input(std::span<const int32_t> eos_token_ids) {
  return {.params = &sampling(),
          .history = &history_,
          .eos_token_ids = eos_token_ids,
          .position = static_cast<int64_t>(tokens_.size()),
          .num_output_tokens = output_.num_output_tokens,
          .acceptance = acceptance()};
}

void Sequence::Accept(const DraftTree& tree, Walk walk, Clock::time_point now) {
  output_.num_verify_steps += 1;
  output_.num_draft_tokens += tree.num_nodes() - 1;
  output_.num_accepted_tokens += std::max<int64_t>(std::ssize(walk.path) - 1, 0);
  output_.num_output_tokens += static_cast<int64_t>(walk.tokens.size());
  num_committed_ += static_cast<int64_t>(walk.path.size());
  if (output_.times.first_token == Clock::time_point()) output_.times.first_token = now;
  for (SampledToken& token : walk.tokens) {
    tokens_.push_back(token.token);
    output_.tokens.push_back(std::move(token));
  }
  output_.stop_token = walk.stop_token;
  if (walk.finish_reason != FinishReason::kNone) Finish(walk.finish_reason, absl::OkStatus(), now);
}

void Sequence::Finish(FinishReason reason, absl::Status status, Clock::time_point now) {
  output_.finish_reason = reason;
  output_.status = std::move(status);
  output_.times.finished = now;
  slot_.Release();
}

bool Sequence::Deliver() {
  RequestOutput news = output_;
  output_.tokens.clear();
  num_delivered_ = output_.num_output_tokens;
  closed_ = finished();
  return request_.sink(std::move(news));
}

void Sequence::Abandon(Clock::time_point now) {
  Finish(FinishReason::kCancelled, absl::OkStatus(), now);
  closed_ = true;
}

}  // namespace linspec
