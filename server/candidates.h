// One call in the engine: prompts x best_of requests, whose outputs become n choices for each prompt. Both front ends
// run their calls through this and differ only in how they write a Choice.
//
// Threads: one consumer at a time; notify runs on the engine thread, as RunningRequest::SetNotify says. Destroying it
// cancels what still runs.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/generate_call.h"
#include "server/service.h"

namespace linspec {

struct Choice {
  int index = 0;  // prompt * n + rank
  std::string text;
  std::vector<OutputToken> tokens;  // when logprobs or token ids are wanted; a scored prompt's first has logprob NaN;
                                    // those beyond the text only when token ids are wanted
  std::vector<int32_t> prompt_token_ids;  // in its first piece, when wanted
  FinishReason finish = FinishReason::kNone;
  std::string stop_string;  // which one ended it
  int32_t stop_token = -1;  // which of the call's stop tokens ended it; -1: none, or the model's end of sequence
  bool empty() const { return text.empty() && tokens.empty() && finish == FinishReason::kNone; }
};

class Candidates {
 public:
  // Errors (nothing is left running then): what Service::ToTokens, Claim and Start return.
  static absl::StatusOr<std::unique_ptr<Candidates>> Start(Service* service, GenerateCall call,
                                                           std::function<void()> notify);

  // What is new of one choice; false when nothing is. Every choice gets its turn. With best_of > n a choice comes
  // whole, after all candidates have ended. An error ends the call: ABORTED, UNAVAILABLE (shutting down),
  // DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED (the consumer was too slow), INTERNAL.
  absl::StatusOr<bool> Next(Choice* choice);
  size_t size() const { return candidates_.size(); }  // prompts x best_of
  bool finished() const;                              // every choice was returned to its end
  bool overflowed() const;  // the consumer fell behind by a whole buffer: its stream cannot be completed
  StreamUsage usage() const;
  const GenerateCall& call() const { return call_; }

 private:
  struct Candidate {
    std::unique_ptr<RunningRequest> request;
    Choice news;  // what Next has not returned yet
    double logprob_sum = 0;
    int64_t num_tokens = 0;
    bool ended = false;
  };

  Candidates(Service* service, GenerateCall call) : service_(service), call_(std::move(call)) {}
  GenerateSpec SpecOf(uint64_t seed) const;
  absl::StatusOr<std::string> EchoText(int index, const std::vector<int32_t>& tokens) const;
  absl::Status StartPrompt(int index, const std::vector<int32_t>& tokens, uint64_t seed);
  absl::Status Take(Candidate* candidate);
  absl::Status EndError(const Candidate& candidate, const StreamDelta& delta) const;
  void Rank();
  bool ranked() const { return call_.best_of > call_.n; }

  Service* const service_;
  const GenerateCall call_;
  CallName name_;
  std::vector<std::vector<int32_t>> banned_sequences_;
  int64_t prompt_tokens_ = 0;
  std::vector<Candidate> candidates_;
  size_t next_ = 0;  // whose turn it is
  bool ranking_done_ = false;
  std::deque<Choice> ranking_;  // with best_of > n: not returned yet
};

}  // namespace linspec
