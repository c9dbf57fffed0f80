// Answers of /v1/responses: one message of one text part, plain or as the events that OpenAI's clients assemble it
// from.
#include <fmt/format.h>

#include <iterator>
#include <utility>

#include "server/answer_writer.h"
#include "server/errors.h"
#include "server/json_text.h"

namespace linspec {
namespace {

enum class Status { kInProgress, kCompleted, kIncomplete };

const char* StatusName(Status status) {
  if (status == Status::kInProgress) return "in_progress";
  return status == Status::kCompleted ? "completed" : "incomplete";
}

std::string Quoted(std::string_view text) {
  std::string out;
  AppendJsonString(text, &out);
  return out;
}

// Nothing is thought; OpenAI's clients expect to be told so.
std::string ResponsesUsage(const StreamUsage& usage) {
  return fmt::format(
      "{{\"input_tokens\":{},\"input_tokens_details\":{{\"cached_tokens\":{},\"cache_write_tokens\":0}},"
      "\"output_tokens\":{},\"output_tokens_details\":{{\"reasoning_tokens\":0}},\"total_tokens\":{}}}",
      usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, usage.prompt_tokens + usage.completion_tokens);
}

class ResponsesWriter : public AnswerWriter {
 public:
  ResponsesWriter(const OpenAiCall* call, AnswerHead head)
      : call_(*call), head_(std::move(head)), message_id_("msg_" + head_.request_id) {}

  std::string Whole(const std::vector<Choice>& choices, const StreamUsage& usage) override {
    text_ = choices.front().text;
    finish_ = choices.front().finish;
    return Response(EndStatus(), &usage);
  }

  void Begin(std::string* out) override {
    Event("response.created", ",\"response\":" + Response(Status::kInProgress, nullptr), out);
    Event("response.in_progress", ",\"response\":" + Response(Status::kInProgress, nullptr), out);
    Event("response.output_item.added", ",\"output_index\":0,\"item\":" + Message(Status::kInProgress, ""), out);
    Event("response.content_part.added", Place() + ",\"part\":" + Part(), out);
  }

  void Piece(const Choice& piece, const StreamUsage&, std::string* out) override {
    finish_ = piece.finish;
    if (piece.text.empty()) return;
    text_ += piece.text;
    Event("response.output_text.delta", Place() + ",\"logprobs\":[],\"delta\":" + Quoted(piece.text), out);
  }

  void End(const StreamUsage& usage, std::string* out) override {
    Event("response.output_text.done", Place() + ",\"logprobs\":[],\"text\":" + Quoted(text_), out);
    Event("response.content_part.done", Place() + ",\"part\":" + Part(), out);
    Event("response.output_item.done", ",\"output_index\":0,\"item\":" + Message(EndStatus(), Part()), out);
    const bool complete = EndStatus() == Status::kCompleted;
    Event(complete ? "response.completed" : "response.incomplete", ",\"response\":" + Response(EndStatus(), &usage),
          out);
  }

  void Error(const absl::Status& status, std::string* out) override {
    const std::string field = ErrorField(status);
    Event("error",
          fmt::format(",\"code\":{},\"message\":{},\"param\":{}", Quoted(OpenAiErrorCode(status)),
                      Quoted(std::string(status.message())), field.empty() ? "null" : Quoted(field)),
          out);
  }

 private:
  Status EndStatus() const { return finish_ == FinishReason::kLength ? Status::kIncomplete : Status::kCompleted; }

  // fields: the rest of the event's object, each with a comma before it.
  void Event(std::string_view type, std::string_view fields, std::string* out) {
    fmt::format_to(std::back_inserter(*out), "event: {}\ndata: {{\"type\":\"{}\",\"sequence_number\":{}{}}}\n\n", type,
                   type, next_event_++, fields);
  }

  std::string Place() const {
    return fmt::format(",\"item_id\":\"{}\",\"output_index\":0,\"content_index\":0", message_id_);
  }

  std::string Part() const {
    return fmt::format("{{\"type\":\"output_text\",\"annotations\":[],\"logprobs\":[],\"text\":{}}}", Quoted(text_));
  }

  std::string Message(Status status, std::string_view part) const {
    return fmt::format(
        "{{\"id\":\"{}\",\"type\":\"message\",\"role\":\"assistant\",\"status\":\"{}\",\"content\":[{}]}}", message_id_,
        StatusName(status), part);
  }

  // usage: null while the answer is being made.
  std::string Response(Status status, const StreamUsage* usage) const {
    const SamplingParams& sampling = call_.generate.sampling;
    const ResponsesEcho& echo = *call_.responses;
    const bool incomplete = status == Status::kIncomplete;
    return fmt::format(
        "{{\"id\":\"resp_{}\",\"object\":\"response\",\"created_at\":{},\"status\":\"{}\",\"background\":false,"
        "\"error\":null,\"incomplete_details\":{},\"instructions\":{},\"max_output_tokens\":{},\"model\":{},"
        "\"output\":[{}],\"parallel_tool_calls\":false,\"previous_response_id\":null,"
        "\"reasoning\":{{\"effort\":null,\"summary\":null}},\"store\":false,\"temperature\":{},"
        "\"text\":{{\"format\":{{\"type\":\"text\"}}}},\"tool_choice\":\"none\",\"tools\":[],\"top_p\":{},"
        "\"truncation\":\"disabled\",\"usage\":{},\"metadata\":{}}}",
        head_.request_id, head_.created, StatusName(status), incomplete ? "{\"reason\":\"max_output_tokens\"}" : "null",
        echo.instructions ? Quoted(*echo.instructions) : "null", sampling.max_tokens, Quoted(head_.model),
        usage == nullptr ? "" : Message(status, Part()), sampling.temperature, sampling.top_p,
        usage == nullptr ? "null" : ResponsesUsage(*usage), echo.metadata);
  }

  const OpenAiCall& call_;
  const AnswerHead head_;
  const std::string message_id_;
  std::string text_;  // so far
  FinishReason finish_ = FinishReason::kNone;
  int64_t next_event_ = 0;
};

}  // namespace

std::unique_ptr<AnswerWriter> MakeResponsesWriter(const OpenAiCall* call, AnswerHead head) {
  return std::make_unique<ResponsesWriter>(call, std::move(head));
}

}  // namespace linspec
