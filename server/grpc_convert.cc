#include "server/grpc_convert.h"

#include <fmt/format.h>

#include <random>

#include "linspec/v1/status_details.pb.h"
#include "server/errors.h"
#include "server/json_text.h"

namespace linspec {
namespace {

constexpr int kMaxStopStrings = 16;
constexpr size_t kMaxStopBytes = 1024;

void AddDetail(const char* type, const google::protobuf::Message& message, v1::details::Status* status) {
  auto* any = status->add_details();
  any->set_type_url(std::string("type.googleapis.com/google.rpc.") + type);
  any->set_value(message.SerializeAsString());
}

absl::StatusOr<SpeculationMode> ModeFromProto(v1::Speculation mode) {
  switch (mode) {
    case v1::SPECULATION_UNSPECIFIED:
      return SpeculationMode::kDefault;
    case v1::SPECULATION_OFF:
      return SpeculationMode::kOff;
    case v1::SPECULATION_DRAFT:
      return SpeculationMode::kDraft;
    case v1::SPECULATION_MEDUSA:
      return SpeculationMode::kMedusa;
    case v1::SPECULATION_NGRAM:
      return SpeculationMode::kNgram;
    case v1::SPECULATION_AUTO:
      return SpeculationMode::kAuto;
    default:
      return FieldError("speculation", fmt::format("{} is not a value of Speculation", static_cast<int>(mode)));
  }
}

absl::StatusOr<AcceptanceMode> AcceptanceFromProto(v1::Acceptance mode) {
  switch (mode) {
    case v1::ACCEPTANCE_UNSPECIFIED:
      return AcceptanceMode::kDefault;
    case v1::ACCEPTANCE_GUMBEL:
      return AcceptanceMode::kGumbel;
    case v1::ACCEPTANCE_REJECTION:
      return AcceptanceMode::kRejection;
    case v1::ACCEPTANCE_TYPICAL:
      return AcceptanceMode::kTypical;
    default:
      return FieldError("acceptance", fmt::format("{} is not a value of Acceptance", static_cast<int>(mode)));
  }
}

void FillTokenLogprob(int32_t id, float logprob, const Tokenizer& tokenizer, v1::TokenLogprob* out) {
  const std::string bytes = tokenizer.TokenBytes(id);
  out->set_token_id(id);
  out->set_token(IsUtf8(bytes) ? bytes : "\xEF\xBF\xBD");
  out->set_logprob(logprob);
}

}  // namespace

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const auto code = static_cast<grpc::StatusCode>(status.code());  // the numbers are the same by design
  const std::string message(status.message());
  v1::details::Status details;
  details.set_code(static_cast<int>(status.code()));
  details.set_message(message);
  if (const int seconds = RetryAfterSeconds(status); seconds > 0) {
    v1::details::RetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(seconds);
    AddDetail("RetryInfo", retry, &details);
  }
  if (const std::string field = ErrorField(status); !field.empty()) {
    v1::details::BadRequest bad;
    auto* violation = bad.add_field_violations();
    violation->set_field(field);
    violation->set_description(message);
    AddDetail("BadRequest", bad, &details);
  }
  return {code, message, details.details().empty() ? "" : details.SerializeAsString()};
}

std::vector<ChatMessage> MessagesFromProto(const v1::ChatMessages& chat) {
  std::vector<ChatMessage> messages;
  for (const auto& message : chat.messages()) messages.push_back({message.role(), message.content()});
  return messages;
}

absl::StatusOr<PromptInput> PromptFromProto(const v1::GenerateRequest& request) {
  switch (request.prompt_case()) {
    case v1::GenerateRequest::kText:
      return PromptInput(request.text());
    case v1::GenerateRequest::kTokenIds:
      return PromptInput(std::vector<int32_t>(request.token_ids().ids().begin(), request.token_ids().ids().end()));
    case v1::GenerateRequest::kChat: {
      auto messages = MessagesFromProto(request.chat());
      if (messages.empty()) return FieldError("chat.messages", "is empty");
      for (size_t i = 0; i < messages.size(); ++i) {
        const std::string& role = messages[i].role;
        if (role != "system" && role != "user" && role != "assistant") {
          return FieldError(fmt::format("chat.messages[{}].role", i),
                            fmt::format("'{}' is not one of system, user, assistant", role.substr(0, 100)));
        }
      }
      return PromptInput(std::move(messages));
    }
    default:
      return FieldError("prompt", "is required: text, token_ids or chat");
  }
}

absl::StatusOr<GenerateSpec> SpecFromProto(const v1::GenerateRequest& request) {
  GenerateSpec spec;
  SamplingParams& s = spec.sampling;
  const auto& p = request.sampling();
  if (p.has_temperature()) s.temperature = p.temperature();
  if (p.has_top_p()) s.top_p = p.top_p();
  if (p.has_top_k()) s.top_k = p.top_k();
  if (p.has_min_p()) s.min_p = p.min_p();
  if (p.has_typical_p()) s.typical_p = p.typical_p();
  if (p.has_repetition_penalty()) s.repetition_penalty = p.repetition_penalty();
  if (p.has_frequency_penalty()) s.frequency_penalty = p.frequency_penalty();
  if (p.has_presence_penalty()) s.presence_penalty = p.presence_penalty();
  for (const auto& [token, bias] : p.logit_bias()) s.logit_bias[token] = bias;
  thread_local std::mt19937_64 generator{std::random_device{}()};
  s.seed = p.has_seed() ? p.seed() : generator();
  const auto& stop = request.stopping();
  if (stop.has_max_tokens()) s.max_tokens = stop.max_tokens();
  if (stop.has_min_tokens()) s.min_tokens = stop.min_tokens();
  s.ignore_eos = stop.ignore_eos();
  s.include_stop_in_output = stop.include_stop_in_output();
  s.stop_token_ids.assign(stop.stop_token_ids().begin(), stop.stop_token_ids().end());
  if (stop.stop_size() > kMaxStopStrings) {
    return FieldError("stopping.stop", fmt::format("{} strings; at most {}", stop.stop_size(), kMaxStopStrings));
  }
  for (const std::string& text : stop.stop()) {
    if (text.empty() || text.size() > kMaxStopBytes) {
      return FieldError("stopping.stop",
                        fmt::format("a stop string has {} bytes; 1 to {} are allowed", text.size(), kMaxStopBytes));
    }
    s.stop.push_back(text);
  }
  if (request.response().has_logprobs()) s.logprobs = request.response().logprobs();
  spec.detokenize = !request.response().skip_text();
  if (!spec.detokenize && !s.stop.empty())
    return FieldError("stopping.stop", "needs text, and response.skip_text asks for none");
  auto mode = ModeFromProto(request.speculation());
  if (!mode.ok()) return mode.status();
  spec.speculation = *mode;
  auto acceptance = AcceptanceFromProto(request.acceptance());
  if (!acceptance.ok()) return acceptance.status();
  spec.acceptance = *acceptance;
  spec.priority = request.priority();
  if (request.request_id().size() > 128) return FieldError("request_id", "is longer than 128 bytes");
  spec.name = request.request_id();
  return spec;
}

void FillResponse(const StreamDelta& delta, const ResponseShape& shape, const Tokenizer& tokenizer,
                  v1::GenerateResponse* response) {
  response->set_text(delta.text);
  for (const OutputToken& token : delta.tokens) {
    if (shape.token_ids) response->add_token_ids(token.sampled.token);
    if (!shape.logprobs) continue;
    v1::LogprobEntry* entry = response->add_logprobs();
    FillTokenLogprob(token.sampled.token, token.sampled.logprob, tokenizer, entry->mutable_chosen());
    for (const auto& top : token.sampled.top_logprobs)
      FillTokenLogprob(top.token, top.logprob, tokenizer, entry->add_top());
  }
  if (delta.finish_reason == FinishReason::kLength) response->set_finish_reason(v1::FINISH_REASON_LENGTH);
  if (delta.finish_reason == FinishReason::kStop) response->set_finish_reason(v1::FINISH_REASON_STOP);
  if (delta.finish_reason == FinishReason::kCancelled) response->set_finish_reason(v1::FINISH_REASON_ABORT);
  response->set_stop_string(delta.stop_string);
}

}  // namespace linspec
