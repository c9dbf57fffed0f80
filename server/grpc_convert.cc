#include "server/grpc_convert.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "linspec/v1/status_details.pb.h"
#include "server/errors.h"
#include "server/json_text.h"

namespace linspec {
namespace {

constexpr int kMaxPriority = 100000;
constexpr size_t kMaxRequestIdBytes = 128;
constexpr size_t kMaxMessageBytes = 1024;  // of a status: it travels as metadata, whose size both sides limit

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
    case v1::SPECULATION_RECURRENT:
      return SpeculationMode::kRecurrent;
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
  out->set_token_bytes(bytes);
  if (!std::isnan(logprob)) out->set_logprob(logprob);
}

// The number of a field that this server's proto does not have, or 0. Protobuf would drop it in silence.
int UnknownField(const google::protobuf::Message& message) {
  const auto* reflection = message.GetReflection();
  const auto& unknown = reflection->GetUnknownFields(message);
  if (!unknown.empty()) return unknown.field(0).number();
  std::vector<const google::protobuf::FieldDescriptor*> fields;
  reflection->ListFields(message, &fields);
  for (const auto* field : fields) {
    if (field->cpp_type() != google::protobuf::FieldDescriptor::CPPTYPE_MESSAGE || field->is_map()) continue;
    const int count = field->is_repeated() ? reflection->FieldSize(message, field) : 1;
    for (int i = 0; i < count; ++i) {
      const int number = UnknownField(field->is_repeated() ? reflection->GetRepeatedMessage(message, field, i)
                                                           : reflection->GetMessage(message, field));
      if (number != 0) return number;
    }
  }
  return 0;
}

absl::StatusOr<PromptInput> OnePrompt(const v1::Prompt& prompt) {
  switch (prompt.prompt_case()) {
    case v1::Prompt::kText:
      return PromptInput(prompt.text());
    case v1::Prompt::kTokenIds:
      return PromptInput(std::vector<int32_t>(prompt.token_ids().ids().begin(), prompt.token_ids().ids().end()));
    default:
      return FieldError("prompt", "is required: text or token_ids");
  }
}

absl::Status ReadPrompts(const v1::GenerateRequest& request, const CallLimits& limits, GenerateCall* call) {
  switch (request.prompt_case()) {
    case v1::GenerateRequest::kText:
      call->prompts.emplace_back(request.text());
      return absl::OkStatus();
    case v1::GenerateRequest::kTokenIds:
      call->prompts.emplace_back(
          std::vector<int32_t>(request.token_ids().ids().begin(), request.token_ids().ids().end()));
      return absl::OkStatus();
    case v1::GenerateRequest::kPrompts:
      for (const v1::Prompt& item : request.prompts().prompts()) {
        auto prompt = OnePrompt(item);
        if (!prompt.ok()) return prompt.status();
        call->prompts.push_back(*std::move(prompt));
      }
      return absl::OkStatus();
    case v1::GenerateRequest::kChat: {
      auto messages = MessagesFromProto(request.chat(), limits);
      if (!messages.ok()) return messages.status();
      call->prompts.emplace_back(*std::move(messages));
      return absl::OkStatus();
    }
    default:
      return FieldError("prompt", "is required: text, token_ids, prompts or chat");
  }
}

void ReadSampling(const v1::GenerateRequest& request, const CallLimits& limits, GenerateCall* call) {
  SamplingParams& s = call->sampling;
  limits.defaults.Apply(&s);
  const auto& p = request.sampling();
  if (p.has_temperature()) s.temperature = p.temperature();
  if (p.has_top_p()) s.top_p = p.top_p();
  if (p.has_top_k()) s.top_k = p.top_k() == -1 ? 0 : p.top_k();  // -1: vLLM's spelling of "off"
  if (p.has_min_p()) s.min_p = p.min_p();
  if (p.has_typical_p()) s.typical_p = p.typical_p();
  if (p.has_repetition_penalty()) s.repetition_penalty = p.repetition_penalty();
  if (p.has_frequency_penalty()) s.frequency_penalty = p.frequency_penalty();
  if (p.has_presence_penalty()) s.presence_penalty = p.presence_penalty();
  for (const auto& [token, bias] : p.logit_bias()) s.logit_bias[token] = bias;
  s.allowed_token_ids.assign(p.allowed_token_ids().begin(), p.allowed_token_ids().end());
  call->bad_words.assign(p.bad_words().begin(), p.bad_words().end());
  call->has_seed = p.has_seed();
  s.seed = p.seed();
  const auto& stop = request.stopping();
  if (call->chat()) s.max_tokens = limits.default_chat_tokens;
  if (stop.has_max_tokens()) s.max_tokens = stop.max_tokens();
  if (stop.has_min_tokens()) s.min_tokens = stop.min_tokens();
  s.ignore_eos = stop.ignore_eos();
  s.include_stop_in_output = stop.include_stop_in_output();
  s.stop_token_ids.assign(stop.stop_token_ids().begin(), stop.stop_token_ids().end());
  s.stop.assign(stop.stop().begin(), stop.stop().end());
}

absl::Status ReadPromptOptions(const v1::PromptParameters& parameters, PromptOptions* options) {
  if (parameters.has_add_special_tokens()) options->add_special_tokens = parameters.add_special_tokens();
  if (parameters.has_truncate_tokens() && parameters.truncate_tokens() == 0) {
    return FieldError("truncate_tokens", "0 leaves nothing; give -1 or a positive number");
  }
  options->truncate_tokens = parameters.truncate_tokens();
  options->truncate_end = parameters.truncate_end();
  return absl::OkStatus();
}

absl::Status ReadResponse(const v1::ResponseParameters& response, GenerateCall* call) {
  if (response.has_logprobs() && response.logprobs() < 0) {
    return FieldError("logprobs", fmt::format("{} is negative; leave it out for none", response.logprobs()));
  }
  if (response.has_logprobs()) call->sampling.logprobs = response.logprobs();
  call->stream = true;
  call->echo = response.echo();
  call->n = response.has_n() ? response.n() : 1;
  call->best_of = response.has_best_of() ? response.best_of() : call->n;
  call->detokenize = !response.skip_text();
  if (response.has_skip_special_tokens()) call->skip_special_tokens = response.skip_special_tokens();
  call->token_ids = response.token_ids() || response.skip_text();
  call->prompt_token_ids = response.prompt_token_ids();
  return absl::OkStatus();
}

}  // namespace

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const auto code = static_cast<grpc::StatusCode>(status.code());  // the numbers are the same by design
  const std::string message = ToUtf8(std::string(status.message()).substr(0, kMaxMessageBytes));
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

absl::StatusOr<std::vector<ChatMessage>> MessagesFromProto(const v1::ChatMessages& chat, const CallLimits& limits) {
  std::vector<ChatMessage> messages;
  for (const auto& message : chat.messages()) {
    messages.push_back({message.role() == "developer" ? "system" : message.role(), message.content()});
  }
  if (absl::Status status = CheckMessages(messages, limits); !status.ok()) return status;
  return messages;
}

absl::StatusOr<GenerateCall> CallFromProto(const v1::GenerateRequest& request, const CallLimits& limits) {
  if (const int number = UnknownField(request); number != 0) {
    return FieldError("request", fmt::format("unknown field {}: this server does not know what it asks for", number));
  }
  GenerateCall call;
  if (absl::Status status = ReadPrompts(request, limits, &call); !status.ok()) return status;
  ReadSampling(request, limits, &call);
  if (absl::Status status = ReadResponse(request.response(), &call); !status.ok()) return status;
  if (absl::Status status = ReadPromptOptions(request.prompt_parameters(), &call.prompt_options); !status.ok()) {
    return status;
  }
  auto mode = ModeFromProto(request.speculation());
  if (!mode.ok()) return mode.status();
  call.speculation = *mode;
  auto acceptance = AcceptanceFromProto(request.acceptance());
  if (!acceptance.ok()) return acceptance.status();
  call.acceptance = *acceptance;
  call.cache_salt = request.prompt_parameters().cache_salt();
  call.priority = request.priority();
  if (call.priority < -kMaxPriority || call.priority > kMaxPriority) {
    return FieldError("priority", fmt::format("{} is not in [{}, {}]", call.priority, -kMaxPriority, kMaxPriority));
  }
  if (request.request_id().size() > kMaxRequestIdBytes) {
    return FieldError("request_id", fmt::format("is longer than {} bytes", kMaxRequestIdBytes));
  }
  call.name = request.request_id();
  call.model = request.model();
  if (absl::Status status = CheckCall(call, limits); !status.ok()) return status;
  return call;
}

void FillResponse(const Choice& choice, const GenerateCall& call, const Tokenizer& tokenizer,
                  v1::GenerateResponse* response) {
  response->set_index(choice.index);
  response->set_text(choice.text);
  int num_echoed = 0;
  for (const OutputToken& token : choice.tokens) {
    num_echoed += token.from_prompt;
    if (call.token_ids) response->add_token_ids(token.sampled.token);
    if (call.sampling.logprobs < 0 || token.beyond_text) continue;
    v1::LogprobEntry* entry = response->add_logprobs();
    FillTokenLogprob(token.sampled.token, token.sampled.logprob, tokenizer, entry->mutable_chosen());
    for (const auto& top : token.sampled.top_logprobs)
      FillTokenLogprob(top.token, top.logprob, tokenizer, entry->add_top());
  }
  response->set_num_echoed_tokens(num_echoed);
  response->mutable_prompt_token_ids()->Add(choice.prompt_token_ids.begin(), choice.prompt_token_ids.end());
  if (choice.finish == FinishReason::kLength) response->set_finish_reason(v1::FINISH_REASON_LENGTH);
  if (choice.finish == FinishReason::kStop) response->set_finish_reason(v1::FINISH_REASON_STOP);
  response->set_stop_string(choice.stop_string);
  if (choice.stop_token >= 0) response->set_stop_token_id(choice.stop_token);
}

void FillUsage(const StreamUsage& usage, v1::Usage* out) {
  out->set_prompt_tokens(usage.prompt_tokens);
  out->set_completion_tokens(usage.completion_tokens);
  out->set_draft_tokens(usage.draft_tokens);
  out->set_accepted_draft_tokens(usage.accepted_tokens);
  out->set_verify_steps(usage.verify_steps);
  out->set_cached_prompt_tokens(usage.cached_tokens);
}

}  // namespace linspec
