// OpenAI's /v1/responses, as far as it is one question and one answer: text or messages in, text out, nothing stored,
// no tools.
#include <fmt/format.h>

#include "server/errors.h"
#include "server/json_fields.h"
#include "server/openai_json.h"

namespace linspec {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxName = 256;

// Text parts as a client writes them, and as it got them from an earlier answer.
void ReadParts(FieldReader* item, const Json& parts, std::string* text) {
  for (const Json& part : parts) {
    const Json type = part.is_object() ? part.value("type", Json()) : Json();
    if ((type != "input_text" && type != "output_text") || !part.contains("text") || !part["text"].is_string()) {
      return item->Fail("content",
                        fmt::format("{}: only input_text and output_text parts are supported", Shorten(part)));
    }
    for (const auto& [name, value] : part.items()) {
      const bool known = name == "type" || name == "text" ||
                         (value.is_array() && value.empty() && (name == "annotations" || name == "logprobs"));
      if (!known && !value.is_null()) {
        return item->Fail("content", fmt::format("'{}' of a text part is not supported", name.substr(0, 100)));
      }
    }
    *text += part["text"].get_ref<const std::string&>();
  }
}

void ReadItem(FieldReader* item, ChatMessage* message) {
  item->Only("type", "message");
  item->String("role", kMaxName, &message->role);
  if (message->role == "developer") message->role = "system";
  const Json* content = item->Find("content");
  if (content == nullptr)
    item->Fail("content", "is required");
  else if (content->is_string())
    message->content = content->get<std::string>();
  else if (content->is_array())
    ReadParts(item, *content, &message->content);
  else
    item->Fail("content", "is not a string or a list of text parts");
  item->Ignore({"id", "status", "phase"});  // of an earlier answer
}

void ReadInput(FieldReader* fields, std::vector<ChatMessage>* messages) {
  const Json* input = fields->Find("input");
  if (input == nullptr) return fields->Fail("input", "is required");
  if (input->is_string()) return messages->push_back({"user", input->get<std::string>()});
  if (!input->is_array() || input->empty()) return fields->Fail("input", "is not text or a list of messages");
  for (size_t i = 0; i < input->size() && fields->ok(); ++i) {
    const std::string where = fmt::format("input[{}]", i);
    if (!(*input)[i].is_object()) return fields->Fail(where, "is not an object");
    FieldReader item((*input)[i], where + ".");
    ReadItem(&item, &messages->emplace_back());
    fields->Absorb(item.Finish());
  }
}

// What needs a store, tools, or a model that thinks.
void RefuseTheRest(FieldReader* fields) {
  bool store = false;
  fields->Bool("store", &store);
  if (store) fields->Fail("store", "true is not supported: this server stores nothing");
  for (const char* name : {"previous_response_id", "conversation", "prompt"}) {
    fields->Unsupported(name, "is not supported: this server stores nothing");
  }
  fields->Only("background", false);
  fields->Only("tools", Json::array());
  fields->Only("include", Json::array());
  fields->Only("tool_choice", "none");
  fields->Only("truncation", "disabled");
  fields->Only("top_logprobs", 0);
  fields->Only("text", {{"format", {{"type", "text"}}}});
  for (const char* name : {"reasoning", "max_tool_calls", "moderation", "context_management", "prompt_cache_options"}) {
    fields->Unsupported(name);
  }
  bool parallel = false;  // there are no tools to call
  fields->Bool("parallel_tool_calls", &parallel);
  fields->Ignore({"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier"});
}

}  // namespace

absl::StatusOr<OpenAiCall> ParseResponses(const std::string& body, const CallLimits& limits) {
  auto json = ParseJsonObject(body);
  if (!json.ok()) return json.status();
  FieldReader fields(*json);
  OpenAiCall out;
  GenerateCall& call = out.generate;
  ResponsesEcho& echo = out.responses.emplace();
  std::vector<ChatMessage> messages;
  if (const Json* instructions = fields.Find("instructions"); instructions != nullptr) {
    fields.String("instructions", body.size(), &messages.emplace_back("system", "").content);
    echo.instructions = messages.front().content;
  }
  ReadInput(&fields, &messages);
  call.prompts.emplace_back(std::move(messages));
  fields.String("model", kMaxName, &call.model);
  limits.defaults.Apply(&call.sampling);
  call.sampling.max_tokens = limits.default_chat_tokens;
  fields.Int32("max_output_tokens", 1, limits.max_output_tokens, &call.sampling.max_tokens);
  fields.Float("temperature", 0, 2, &call.sampling.temperature);
  fields.Float("top_p", 0, 1, &call.sampling.top_p, true);
  fields.Bool("stream", &call.stream);
  if (const Json* metadata = fields.Find("metadata"); metadata != nullptr) {
    if (!metadata->is_object()) fields.Fail("metadata", "is not an object");
    echo.metadata = metadata->dump();
  }
  if (const Json* options = fields.Find("stream_options"); options != nullptr) {
    if (!call.stream) fields.Fail("stream_options", "is only allowed with stream: true");
    if (!options->is_object()) fields.Fail("stream_options", "is not an object");
    fields.Only("stream_options", {{"include_obfuscation", false}});
  }
  RefuseTheRest(&fields);
  if (absl::Status status = fields.Finish(); !status.ok()) return status;
  if (absl::Status status = CheckCall(call, limits); !status.ok()) return status;
  return out;
}

}  // namespace linspec
