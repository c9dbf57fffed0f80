#include "server/generation.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <random>

#include "server/errors.h"

namespace linspec {
namespace {

uint64_t DrawSeed() {
  thread_local std::mt19937_64 generator{std::random_device{}()};
  return generator();
}

struct Candidate {
  int prompt = 0;
  std::unique_ptr<RunningRequest> request;
  ChoiceText text;  // complete answers: all so far; streams: what the next chunk says
  double logprob_sum = 0;
  int64_t num_tokens = 0;
  FinishReason finish = FinishReason::kNone;
  absl::Status error;
};

class Generation : public HttpOperation {
 public:
  Generation(Service* service, OpenAiCall call, std::string request_id)
      : service_(service), call_(std::move(call)), request_id_(std::move(request_id)) {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    head_ = {.id = fmt::format("{}-{}", call_.chat ? "chatcmpl" : "cmpl", request_id_),
             .model = service->model_name(),
             .created = std::chrono::duration_cast<std::chrono::seconds>(now).count(),
             .chat = call_.chat};
    token_bytes_ = [tokenizer = &service->tokenizer()](int32_t id) { return tokenizer->TokenBytes(id); };
  }

  absl::Status Start(const std::string& tenant, const HttpNotify& notify);
  bool Poll(HttpReply* reply) override;
  Progress Next(std::string* body) override;

 private:
  bool WantsPromptLogprobs() const { return call_.echo && call_.sampling.logprobs >= 0; }
  void Take(Candidate* candidate);
  void Absorb(Candidate* candidate, StreamDelta delta);
  HttpReply FullReply();
  StreamUsage TotalUsage() const;
  bool AllFinished() const;

  Service* const service_;
  const OpenAiCall call_;
  const std::string request_id_;
  ResponseHead head_;
  TokenBytesFn token_bytes_;
  std::vector<int64_t> prompt_lengths_;
  std::vector<Candidate> candidates_;
  bool opened_ = false, done_ = false;
};

absl::Status Generation::Start(const std::string& tenant, const HttpNotify& notify) {
  std::vector<std::vector<int32_t>> prompts;
  for (const PromptInput& input : call_.prompts) {
    auto tokens = service_->ToTokens(input);
    if (!tokens.ok()) return tokens.status();
    prompts.push_back(*std::move(tokens));
  }
  const uint64_t seed = call_.has_seed ? call_.sampling.seed : DrawSeed();
  for (size_t p = 0; p < prompts.size(); ++p) {
    prompt_lengths_.push_back(static_cast<int64_t>(prompts[p].size()));
    std::string echo;
    if (call_.echo && !WantsPromptLogprobs()) {
      const auto* text = std::get_if<std::string>(&call_.prompts[p]);
      auto decoded =
          text != nullptr ? absl::StatusOr<std::string>(*text) : service_->tokenizer().Decode(prompts[p], false);
      if (!decoded.ok()) return decoded.status();
      echo = *std::move(decoded);
    }
    for (int i = 0; i < call_.best_of; ++i) {
      GenerateSpec spec{.sampling = call_.sampling,
                        .speculation = call_.speculation,
                        .acceptance = call_.acceptance,
                        .priority = call_.priority,
                        .prompt_logprobs = WantsPromptLogprobs(),
                        .tenant = tenant,
                        .log_id = request_id_,
                        .n = call_.n};
      spec.sampling.seed = seed + static_cast<uint64_t>(i);  // candidates differ, and can be repeated
      if (call_.best_of > call_.n) spec.sampling.logprobs = std::max(spec.sampling.logprobs, 0);  // to rank them
      auto request = service_->Start(prompts[p], std::move(spec));
      if (!request.ok()) return request.status();
      Candidate& candidate = candidates_.emplace_back();
      candidate.prompt = static_cast<int>(p);
      candidate.request = *std::move(request);
      candidate.text.index = static_cast<int>(p) * call_.n + i;
      candidate.text.text = echo;
      candidate.text.with_logprobs = call_.sampling.logprobs >= 0;
      candidate.text.num_top = call_.sampling.logprobs;
      candidate.text.first_token_has_logprob = !WantsPromptLogprobs();
      candidate.text.role = call_.chat;
    }
  }
  for (Candidate& candidate : candidates_) candidate.request->SetNotify(notify);
  return absl::OkStatus();
}

void Generation::Take(Candidate* candidate) {
  if (candidate->finish == FinishReason::kNone) Absorb(candidate, candidate->request->Take());
}

void Generation::Absorb(Candidate* candidate, StreamDelta delta) {
  if (call_.no_new_tokens) {  // the engine generates at least one token; here nobody asked for it
    std::erase_if(delta.tokens, [](const OutputToken& token) { return !token.from_prompt; });
    const size_t prompt_end = delta.tokens.empty() ? 0 : delta.tokens.back().text_end;
    delta.text.resize(std::min(delta.text.size(), prompt_end));
    if (delta.finish_reason == FinishReason::kStop) delta.finish_reason = FinishReason::kLength;
  }
  candidate->text.text += delta.text;
  for (OutputToken& token : delta.tokens) {
    candidate->logprob_sum += token.sampled.logprob;
    ++candidate->num_tokens;
    if (candidate->text.with_logprobs) candidate->text.tokens.push_back(std::move(token));
  }
  candidate->finish = delta.finish_reason;
  switch (delta.finish_reason) {
    case FinishReason::kNone:
      return;
    case FinishReason::kLength:
    case FinishReason::kStop:
      candidate->text.finish_reason = OpenAiFinishReason(delta.finish_reason);
      return;
    case FinishReason::kDeadline:
      candidate->error = absl::DeadlineExceededError("the deadline passed");
      return;
    case FinishReason::kCancelled:
      candidate->error =
          candidate->request->overflowed()
              ? absl::ResourceExhaustedError("the client did not read its stream (--stream-buffer-bytes)")
              : absl::CancelledError("the server is shutting down");
      return;
    case FinishReason::kError:
      candidate->error = delta.status.ok() ? absl::InternalError("generation failed") : delta.status;
      return;
  }
}

bool Generation::AllFinished() const {
  return std::ranges::all_of(candidates_, [](const Candidate& c) { return c.finish != FinishReason::kNone; });
}

StreamUsage Generation::TotalUsage() const {
  StreamUsage total;
  for (const int64_t length : prompt_lengths_) total.prompt_tokens += length;
  for (const Candidate& candidate : candidates_) {
    const StreamUsage& usage = candidate.request->usage();
    if (!call_.no_new_tokens) total.completion_tokens += usage.completion_tokens;
    total.draft_tokens += usage.draft_tokens;
    total.accepted_tokens += usage.accepted_tokens;
  }
  return total;
}

bool Generation::Poll(HttpReply* reply) {
  if (call_.stream) {
    *reply = {.content_type = "text/event-stream; charset=utf-8",
              .headers = {{"Cache-Control", "no-cache"}},
              .streaming = true};
  } else {
    for (Candidate& candidate : candidates_) Take(&candidate);
    const auto failed = std::ranges::find_if(candidates_, [](const Candidate& c) { return !c.error.ok(); });
    if (failed != candidates_.end()) {
      *reply = {.status = HttpStatusOf(failed->error), .body = OpenAiErrorJson(failed->error)};
      candidates_.clear();  // the others need not run on
    } else if (AllFinished()) {
      *reply = FullReply();
    } else {
      return false;
    }
  }
  reply->headers.emplace_back("X-Request-Id", request_id_);
  return true;
}

HttpReply Generation::FullReply() {
  std::vector<ChoiceText> choices;
  const StreamUsage usage = TotalUsage();
  for (size_t p = 0; p < prompt_lengths_.size(); ++p) {
    const auto begin = candidates_.begin() + static_cast<int64_t>(p) * call_.best_of;
    if (call_.best_of > call_.n) {
      const auto mean = [](const Candidate& c) {
        return c.num_tokens == 0 ? -std::numeric_limits<double>::infinity()
                                 : c.logprob_sum / static_cast<double>(c.num_tokens);
      };
      std::stable_sort(begin, begin + call_.best_of, [&](const auto& a, const auto& b) { return mean(a) > mean(b); });
    }
    for (int i = 0; i < call_.n; ++i) {
      choices.push_back(std::move(begin[i].text));
      choices.back().index = static_cast<int>(choices.size()) - 1;
    }
  }
  return {.body = FullResponseJson(head_, choices, usage, token_bytes_)};
}

HttpOperation::Progress Generation::Next(std::string* body) {
  if (done_) return Progress::kDone;
  for (Candidate& candidate : candidates_) {
    if (candidate.finish != FinishReason::kNone) continue;
    if (candidate.request->overflowed()) return Progress::kAbort;
    Take(&candidate);
    if (!candidate.error.ok()) {
      *body += "data: " + OpenAiErrorJson(candidate.error) + "\n\ndata: [DONE]\n\n";
      candidates_.clear();
      done_ = true;
      return Progress::kDone;
    }
    ChoiceText& piece = candidate.text;
    if (piece.text.empty() && piece.tokens.empty() && piece.finish_reason == nullptr && (opened_ || !call_.chat))
      continue;
    AppendChunk(head_, piece, token_bytes_, body);
    if (!piece.tokens.empty()) piece.first_token_has_logprob = true;
    piece.text.clear();
    piece.tokens.clear();
    piece.role = false;
  }
  opened_ = true;
  if (!AllFinished()) return body->empty() ? Progress::kWait : Progress::kData;
  if (call_.include_usage) AppendUsageChunk(head_, TotalUsage(), body);
  *body += "data: [DONE]\n\n";
  done_ = true;
  return Progress::kDone;
}

}  // namespace

absl::StatusOr<std::unique_ptr<HttpOperation>> StartGeneration(Service* service, OpenAiCall call,
                                                               std::string request_id, std::string tenant,
                                                               HttpNotify notify) {
  auto generation = std::make_unique<Generation>(service, std::move(call), std::move(request_id));
  if (absl::Status status = generation->Start(tenant, notify); !status.ok()) return status;
  return std::unique_ptr<HttpOperation>(std::move(generation));
}

}  // namespace linspec
