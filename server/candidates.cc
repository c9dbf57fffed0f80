#include "server/candidates.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "server/errors.h"

namespace linspec {
namespace {

uint64_t DrawSeed() {
  thread_local std::mt19937_64 generator{std::random_device{}()};
  return generator();
}

// What is never to come out of each word, at the beginning of a text and inside it, as in vLLM.
absl::StatusOr<std::vector<std::vector<int32_t>>> BannedSequences(const std::vector<std::string>& words,
                                                                  const Tokenizer& tokenizer) {
  std::vector<std::vector<int32_t>> sequences;
  for (const std::string& word : words) {
    for (const char* before : {"", " "}) {
      auto tokens = tokenizer.Encode(before + word, {.add_special_tokens = false, .parse_special = true});
      if (!tokens.ok()) return FieldError("bad_words", std::string(tokens.status().message()));
      if (!tokens->empty() && std::ranges::find(sequences, *tokens) == sequences.end()) {
        sequences.push_back(*std::move(tokens));
      }
    }
  }
  return sequences;
}

// An echoed prompt that is not scored.
std::vector<OutputToken> PromptTokens(const std::vector<int32_t>& ids) {
  std::vector<OutputToken> tokens;
  tokens.reserve(ids.size());
  for (const int32_t id : ids) {
    OutputToken& token = tokens.emplace_back();
    token.sampled = {id, std::numeric_limits<float>::quiet_NaN(), {}};
    token.from_prompt = true;
  }
  return tokens;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Candidates>> Candidates::Start(Service* service, GenerateCall call,
                                                              std::function<void()> notify) {
  std::unique_ptr<Candidates> run(new Candidates(service, std::move(call)));
  std::vector<std::vector<int32_t>> prompts;
  auto banned = BannedSequences(run->call_.bad_words, service->tokenizer());
  if (!banned.ok()) return banned.status();
  run->banned_sequences_ = *std::move(banned);
  for (const PromptInput& input : run->call_.prompts) {
    auto tokens = service->ToTokens(input, run->call_.prompt_options);
    if (!tokens.ok()) return tokens.status();
    prompts.push_back(*std::move(tokens));
  }
  auto name = service->Claim(run->call_.name, run->call_.tenant);
  if (!name.ok()) return name.status();
  run->name_ = *std::move(name);
  const uint64_t seed = run->call_.has_seed ? run->call_.sampling.seed : DrawSeed();
  for (size_t p = 0; p < prompts.size(); ++p) {
    if (absl::Status status = run->StartPrompt(static_cast<int>(p), prompts[p], seed); !status.ok()) return status;
  }
  for (Candidate& candidate : run->candidates_) candidate.request->SetNotify(notify);
  return run;
}

GenerateSpec Candidates::SpecOf(uint64_t seed) const {
  GenerateSpec spec{.sampling = call_.sampling,
                    .speculation = call_.speculation,
                    .acceptance = call_.acceptance,
                    .priority = call_.priority,
                    .cache_salt = call_.cache_salt,
                    .prompt_logprobs = call_.scores_prompt(),
                    .detokenize = call_.detokenize,
                    .skip_special_tokens = call_.skip_special_tokens,
                    .deadline = call_.deadline,
                    .tenant = call_.tenant,
                    .name = call_.name,
                    .log_id = call_.log_id,
                    .n = call_.n};
  spec.sampling.seed = seed;
  spec.sampling.max_tokens = std::max(call_.sampling.max_tokens, 1);
  spec.sampling.banned_sequences = banned_sequences_;
  if (!spec.sampling.ignore_eos) {
    const std::vector<int32_t>& ends = service_->generation().eos_token_ids;
    spec.sampling.stop_token_ids.insert(spec.sampling.stop_token_ids.end(), ends.begin(), ends.end());
  }
  if (ranked()) spec.sampling.logprobs = std::max(spec.sampling.logprobs, 0);
  return spec;
}

// A text comes back as it was sent, unless only a part of it was used.
absl::StatusOr<std::string> Candidates::EchoText(int index, const std::vector<int32_t>& tokens) const {
  if (!call_.echo || !call_.detokenize || call_.scores_prompt()) return std::string();
  const auto* text = std::get_if<std::string>(&call_.prompts[index]);
  if (text != nullptr && call_.prompt_options.truncate_tokens == 0) return *text;
  return service_->tokenizer().Decode(tokens, false);
}

absl::Status Candidates::StartPrompt(int index, const std::vector<int32_t>& tokens, uint64_t seed) {
  prompt_tokens_ += static_cast<int64_t>(tokens.size());
  const absl::StatusOr<std::string> echo = EchoText(index, tokens);
  if (!echo.ok()) return echo.status();
  for (int i = 0; i < call_.best_of; ++i) {
    // Candidates differ, and can be repeated.
    auto request = service_->Start(tokens, SpecOf(seed + static_cast<uint64_t>(i)));
    if (!request.ok()) return request.status();
    Candidate& candidate = candidates_.emplace_back();
    candidate.request = *std::move(request);
    candidate.news.index = index * call_.n + i;
    candidate.news.text = *echo;
    if (call_.prompt_token_ids) candidate.news.prompt_token_ids = tokens;
    if (call_.echo && call_.token_ids && !call_.scores_prompt()) candidate.news.tokens = PromptTokens(tokens);
  }
  return absl::OkStatus();
}

absl::Status Candidates::Take(Candidate* candidate) {
  StreamDelta delta = candidate->request->Take();
  if (call_.sampling.max_tokens == 0) {  // the engine generates at least one token; here nobody asked for it
    std::erase_if(delta.tokens, [](const OutputToken& token) { return !token.from_prompt; });
    delta.text.resize(std::min(delta.text.size(), delta.tokens.empty() ? 0 : delta.tokens.back().text_end));
    if (delta.finish_reason == FinishReason::kStop) delta.finish_reason = FinishReason::kLength;
  }
  const bool keep_tokens = call_.sampling.logprobs >= 0 || call_.token_ids;
  Choice& news = candidate->news;
  news.text += delta.text;
  for (OutputToken& token : delta.tokens) {
    if (token.beyond_text && !call_.token_ids) continue;
    if (!token.from_prompt && !token.beyond_text) {
      candidate->logprob_sum += token.sampled.logprob;
      ++candidate->num_tokens;
    }
    if (keep_tokens) news.tokens.push_back(std::move(token));
  }
  news.finish = delta.finish_reason;
  news.stop_string = delta.stop_string;
  const std::vector<int32_t>& stops = call_.sampling.stop_token_ids;
  if (std::ranges::find(stops, delta.stop_token) != stops.end()) news.stop_token = delta.stop_token;
  candidate->ended = delta.finish_reason != FinishReason::kNone;
  return EndError(*candidate, delta);
}

absl::Status Candidates::EndError(const Candidate& candidate, const StreamDelta& delta) const {
  switch (delta.finish_reason) {
    case FinishReason::kNone:
    case FinishReason::kLength:
    case FinishReason::kStop:
      return absl::OkStatus();
    case FinishReason::kDeadline:
      return absl::DeadlineExceededError("the deadline passed");
    case FinishReason::kCancelled:
      if (candidate.request->overflowed()) {
        return absl::ResourceExhaustedError("the client did not read its stream (--stream-buffer-bytes)");
      }
      return service_->draining() ? absl::UnavailableError("the server is shutting down: aborted")
                                  : absl::AbortedError("aborted");
    case FinishReason::kError:
      return delta.status.ok() ? absl::InternalError("generation failed") : delta.status;
  }
  return absl::InternalError("unknown finish reason");
}

absl::StatusOr<bool> Candidates::Next(Choice* choice) {
  if (ranked()) {
    for (Candidate& candidate : candidates_) {
      if (candidate.ended) continue;
      if (absl::Status status = Take(&candidate); !status.ok()) return status;
    }
    Rank();
    if (ranking_.empty()) return false;
    *choice = std::move(ranking_.front());
    ranking_.pop_front();
    return true;
  }
  for (size_t i = 0; i < candidates_.size(); ++i) {
    Candidate& candidate = candidates_[next_];
    next_ = (next_ + 1) % candidates_.size();
    if (candidate.ended) continue;
    if (absl::Status status = Take(&candidate); !status.ok()) return status;
    if (candidate.news.empty()) continue;
    const int index = candidate.news.index;
    *choice = std::exchange(candidate.news, {});
    candidate.news.index = index;
    return true;
  }
  return false;
}

// The n candidates of each prompt with the highest mean logprob, best first.
void Candidates::Rank() {
  if (ranking_done_ || !std::ranges::all_of(candidates_, &Candidate::ended)) return;
  ranking_done_ = true;
  const auto mean = [](const Candidate& c) {
    return c.num_tokens == 0 ? -std::numeric_limits<double>::infinity()
                             : c.logprob_sum / static_cast<double>(c.num_tokens);
  };
  for (auto begin = candidates_.begin(); begin != candidates_.end(); begin += call_.best_of) {
    std::vector<Candidate*> order;
    for (int i = 0; i < call_.best_of; ++i) order.push_back(&begin[i]);
    std::ranges::stable_sort(order, [&](const auto* a, const auto* b) { return mean(*a) > mean(*b); });
    for (int i = 0; i < call_.n; ++i) {
      ranking_.push_back(std::move(order[i]->news));
      ranking_.back().index = static_cast<int>(begin - candidates_.begin()) / call_.best_of * call_.n + i;
    }
  }
}

bool Candidates::finished() const {
  return std::ranges::all_of(candidates_, &Candidate::ended) && (!ranked() || (ranking_done_ && ranking_.empty()));
}

bool Candidates::overflowed() const {
  return std::ranges::any_of(candidates_, [](const Candidate& c) { return !c.ended && c.request->overflowed(); });
}

StreamUsage Candidates::usage() const {
  StreamUsage total;
  total.prompt_tokens = prompt_tokens_;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    const StreamUsage& usage = candidates_[i].request->usage();
    if (i % call_.best_of == 0) total.cached_tokens += usage.cached_tokens;  // a prompt counts once
    if (call_.sampling.max_tokens > 0) total.completion_tokens += usage.completion_tokens;
    total.draft_tokens += usage.draft_tokens;
    total.accepted_tokens += usage.accepted_tokens;
    total.verify_steps += usage.verify_steps;
  }
  return total;
}

}  // namespace linspec
