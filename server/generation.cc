#include "server/generation.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <utility>

#include "server/answer_writer.h"
#include "server/candidates.h"
#include "server/errors.h"

namespace linspec {
namespace {

class Generation : public HttpOperation {
 public:
  Generation(Service* service, OpenAiCall call, std::string request_id)
      : service_(service), call_(std::move(call)), request_id_(std::move(request_id)) {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    AnswerHead head{.request_id = request_id_,
                    .model = service->model_name(),
                    .created = std::chrono::duration_cast<std::chrono::seconds>(now).count()};
    const auto token_bytes = [tokenizer = &service->tokenizer()](int32_t id) { return tokenizer->TokenBytes(id); };
    writer_ = call_.responses ? MakeResponsesWriter(&call_, std::move(head))
                              : MakeCompletionWriter(&call_, std::move(head), token_bytes);
    const size_t num_choices = call_.generate.prompts.size() * static_cast<size_t>(call_.generate.n);
    choices_.resize(call_.generate.stream ? 0 : num_choices);
  }

  absl::Status Start(HttpNotify notify) {
    auto candidates = Candidates::Start(service_, call_.generate, std::move(notify));
    if (!candidates.ok()) return candidates.status();
    candidates_ = *std::move(candidates);
    return absl::OkStatus();
  }

  bool Poll(HttpReply* reply) override;
  bool Next(std::string* body) override;
  bool Abandoned() const override {
    return call_.generate.stream && candidates_ != nullptr && candidates_->overflowed();
  }

 private:
  absl::StatusOr<bool> Collect();  // true once the whole answer is in choices_

  Service* const service_;
  const OpenAiCall call_;
  const std::string request_id_;
  std::unique_ptr<AnswerWriter> writer_;
  std::unique_ptr<Candidates> candidates_;
  std::vector<Choice> choices_;  // of a plain answer, as far as they are known
  bool begun_ = false;
};

absl::StatusOr<bool> Generation::Collect() {
  Choice piece;
  while (true) {
    auto more = candidates_->Next(&piece);
    if (!more.ok()) return more.status();
    if (!*more) return candidates_->finished();
    Choice& choice = choices_[piece.index];
    choice.index = piece.index;
    choice.text += piece.text;
    choice.finish = piece.finish;
    choice.stop_string = piece.stop_string;
    choice.stop_token = piece.stop_token;
    if (choice.prompt_token_ids.empty()) choice.prompt_token_ids = std::move(piece.prompt_token_ids);
    std::ranges::move(piece.tokens, std::back_inserter(choice.tokens));
  }
}

bool Generation::Poll(HttpReply* reply) {
  if (call_.generate.stream) {
    *reply = {.content_type = "text/event-stream; charset=utf-8",
              .headers = {{"Cache-Control", "no-cache"}},
              .streaming = true};
  } else {
    const absl::StatusOr<bool> complete = Collect();
    if (complete.ok() && !*complete) return false;
    *reply = complete.ok()
                 ? HttpReply{.body = writer_->Whole(choices_, candidates_->usage())}
                 : HttpReply{.status = HttpStatusOf(complete.status()), .body = OpenAiErrorJson(complete.status())};
    candidates_.reset();  // after an error the others need not run on
  }
  reply->headers.emplace_back("X-Request-Id", request_id_);
  return true;
}

bool Generation::Next(std::string* body) {
  if (candidates_ == nullptr) return true;
  if (!std::exchange(begun_, true)) writer_->Begin(body);
  Choice piece;
  absl::StatusOr<bool> more = true;
  // One call for each candidate asks all of them; what comes after that comes with a notify of its own.
  for (size_t i = 0; i < candidates_->size() && more.ok() && *more; ++i) {
    more = candidates_->Next(&piece);
    if (more.ok() && *more) writer_->Piece(piece, candidates_->usage(), body);
  }
  if (!more.ok()) {
    writer_->Error(more.status(), body);
  } else if (!candidates_->finished()) {
    return false;
  } else {
    writer_->End(candidates_->usage(), body);
  }
  candidates_.reset();
  return true;
}

}  // namespace

absl::StatusOr<std::unique_ptr<HttpOperation>> StartGeneration(Service* service, OpenAiCall call,
                                                               std::string request_id, HttpNotify notify) {
  auto generation = std::make_unique<Generation>(service, std::move(call), std::move(request_id));
  if (absl::Status status = generation->Start(std::move(notify)); !status.ok()) return status;
  return std::unique_ptr<HttpOperation>(std::move(generation));
}

}  // namespace linspec
