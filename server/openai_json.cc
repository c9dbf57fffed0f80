#include "server/openai_json.h"

#include <fmt/format.h>

#include <charconv>

#include "server/errors.h"
#include "server/json_fields.h"

namespace linspec {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxInt32 = 2147483647;
constexpr size_t kMaxName = 256;
constexpr size_t kMaxSalt = 1024;  // vLLM's
constexpr int kMaxLogprobs = 20;

// A list of strings, or one string alone.
void ReadStrings(FieldReader* fields, const char* name, std::vector<std::string>* strings) {
  const Json* value = fields->Find(name);
  if (value == nullptr) return;
  const Json list = value->is_array() ? *value : Json::array({*value});
  for (const Json& item : list) {
    if (!item.is_string()) return fields->Fail(name, fmt::format("{} is not a string", Shorten(item)));
    strings->push_back(item.get<std::string>());
  }
}

void ReadAllowedTokens(FieldReader* fields, std::vector<int32_t>* ids) {
  fields->TokenIds("allowed_token_ids", ids);
  const Json* list = fields->Find("allowed_token_ids");
  if (list != nullptr && list->empty()) fields->Fail("allowed_token_ids", "is empty: nothing could be chosen");
}

void ReadLogitBias(FieldReader* fields, SamplingParams* sampling) {
  const Json* bias = fields->Find("logit_bias");
  if (bias == nullptr) return;
  if (!bias->is_object()) return fields->Fail("logit_bias", "is not an object of token id to bias");
  for (const auto& [key, value] : bias->items()) {
    int32_t token = -1;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), token);
    if (error != std::errc() || end != key.data() + key.size() || token < 0) {
      return fields->Fail("logit_bias", fmt::format("'{}' is not a token id", key.substr(0, 80)));
    }
    const double number = value.is_number() ? value.get<double>() : 1e9;
    if (!(number >= -100 && number <= 100)) {
      return fields->Fail("logit_bias",
                          fmt::format("{} for token {} is not a number in [-100, 100]", Shorten(value), token));
    }
    sampling->logit_bias[token] = static_cast<float>(number);
  }
}

void ReadSpeculation(FieldReader* fields, SpeculationMode* mode) {
  std::string name;
  fields->String("speculation", kMaxName, &name);
  if (name.empty()) return;
  if (const auto found = FindSpeculationMode(name)) {
    *mode = *found;
  } else {
    fields->Fail("speculation", fmt::format("'{}' is not one of {}", name, SpeculationModeNames()));
  }
}

void ReadAcceptance(FieldReader* fields, AcceptanceMode* mode) {
  std::string name;
  fields->String("acceptance", kMaxName, &name);
  if (name.empty()) return;
  if (name == "gumbel")
    *mode = AcceptanceMode::kGumbel;
  else if (name == "rejection")
    *mode = AcceptanceMode::kRejection;
  else if (name == "typical")
    *mode = AcceptanceMode::kTypical;
  else
    fields->Fail("acceptance", fmt::format("'{}' is not one of gumbel, rejection, typical", name));
}

void ReadSampling(FieldReader* fields, const CallLimits& limits, GenerateCall* call) {
  SamplingParams& s = call->sampling;
  limits.defaults.Apply(&s);
  fields->Float("temperature", 0, 2, &s.temperature);
  fields->Float("top_p", 0, 1, &s.top_p, true);
  fields->Int32("top_k", -1, kMaxInt32, &s.top_k);
  if (s.top_k < 0) s.top_k = 0;  // vLLM's spelling of "off"
  fields->Float("min_p", 0, 1, &s.min_p);
  fields->Float("typical_p", 0, 1, &s.typical_p, true);
  fields->Float("repetition_penalty", 0, 100, &s.repetition_penalty, true);
  fields->Float("frequency_penalty", -2, 2, &s.frequency_penalty);
  fields->Float("presence_penalty", -2, 2, &s.presence_penalty);
  ReadLogitBias(fields, &s);
  int64_t seed = 0;
  call->has_seed = fields->Find("seed") != nullptr;
  fields->Int("seed", std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max(), &seed);
  s.seed = static_cast<uint64_t>(seed);
  fields->Int32("min_tokens", 0, limits.max_output_tokens, &s.min_tokens);
  fields->Bool("ignore_eos", &s.ignore_eos);
  fields->TokenIds("stop_token_ids", &s.stop_token_ids);
  fields->Bool("include_stop_str_in_output", &s.include_stop_in_output);
  fields->Bool("skip_special_tokens", &call->skip_special_tokens);
  ReadStrings(fields, "stop", &s.stop);
  ReadStrings(fields, "bad_words", &call->bad_words);
  ReadAllowedTokens(fields, &s.allowed_token_ids);
}

void ReadPromptOptions(FieldReader* fields, const CallLimits& limits, PromptOptions* options) {
  fields->Int32("truncate_prompt_tokens", -1, limits.max_prompt_tokens, &options->truncate_tokens);
  if (fields->Find("truncate_prompt_tokens") != nullptr && options->truncate_tokens == 0) {
    fields->Fail("truncate_prompt_tokens", "0 leaves nothing; give -1 or a positive number");
  }
  std::string side;
  fields->String("truncation_side", kMaxName, &side);
  if (!side.empty() && side != "left" && side != "right") {
    fields->Fail("truncation_side", fmt::format("'{}' is not one of left, right", side));
  }
  options->truncate_end = side == "right";
}

// Of vLLM and llama.cpp: what their clients send with its default, and what would ask for more than there is here.
void ReadForeign(FieldReader* fields) {
  fields->Only("spaces_between_special_tokens", true);
  fields->Only("use_beam_search", false);
  fields->Only("length_penalty", 1);
  fields->Only("include_reasoning", true);
  fields->Only("return_token_offsets", false);
  fields->Only("return_mm_kwargs", true);
  fields->Only("routed_experts_prompt_start", 0);
  fields->Only("return_prompt_text", false);
  constexpr char kStructured[] = "is not supported: output cannot be bound to a grammar yet";
  for (const char* name : {"structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
                           "guided_decoding_backend", "grammar", "json_schema"}) {
    fields->Unsupported(name, kStructured);
  }
  fields->Unsupported("logits_processors", "is not supported: a client's code is never run here");
  fields->Unsupported("vllm_xargs", "is not supported: there are no extensions to read it");
  fields->Unsupported("prompt_logprobs", "is not supported: /v1/completions scores a prompt with echo and logprobs");
  fields->Unsupported("logprob_token_ids", "is not supported: logprobs tells of the best 20");
  fields->Unsupported("prompt_embeds", "is not supported: a prompt is text or token ids");
  fields->Unsupported("kv_transfer_params", "is not supported: there is no KV cache to transfer");
  fields->Unsupported("ec_transfer_params", "is not supported: text only");
  fields->Unsupported("mm_processor_kwargs", "is not supported: text only");
  fields->Unsupported("media_io_kwargs", "is not supported: text only");
  fields->Unsupported("thinking_token_budget", "is not supported: reasoning is not told from text");
  for (const char* name : {"repetition_detection", "watermarking", "stream_interval", "documents", "session_id"}) {
    fields->Unsupported(name);
  }
}

void ReadStreamOptions(FieldReader* fields, OpenAiCall* call) {
  fields->Bool("stream", &call->generate.stream);
  const Json* options = fields->Find("stream_options");
  if (options == nullptr) return;
  if (!options->is_object()) return fields->Fail("stream_options", "is not an object");
  if (!call->generate.stream) return fields->Fail("stream_options", "is only allowed with stream: true");
  FieldReader inner(*options, "stream_options.");
  inner.Bool("include_usage", &call->include_usage);
  inner.Bool("continuous_usage_stats", &call->continuous_usage);  // vLLM's
  inner.Ignore({"include_obfuscation"});
  fields->Absorb(inner.Finish());
}

void ReadTokenOptions(FieldReader* fields, OpenAiCall* call) {
  fields->Bool("return_token_ids", &call->generate.token_ids);
  call->generate.prompt_token_ids = call->generate.token_ids;
  fields->Bool("return_tokens_as_token_ids", &call->tokens_as_ids);
}

// What both kinds of call share.
void ReadCommon(FieldReader* fields, const CallLimits& limits, OpenAiCall* out) {
  GenerateCall* call = &out->generate;
  fields->String("model", kMaxName, &call->model);
  fields->Int32("n", 1, limits.max_n, &call->n);
  call->best_of = call->n;
  ReadSampling(fields, limits, call);
  ReadPromptOptions(fields, limits, &call->prompt_options);
  ReadTokenOptions(fields, out);
  ReadStreamOptions(fields, out);
  ReadForeign(fields);
  fields->String("request_id", kMaxName, &out->request_id);
  ReadSpeculation(fields, &call->speculation);
  ReadAcceptance(fields, &call->acceptance);
  fields->Int32("priority", -100000, 100000, &call->priority);
  fields->String("cache_salt", kMaxSalt, &call->cache_salt);
  bool store = false;
  fields->Bool("store", &store);
  if (store) fields->Fail("store", "true is not supported: this server stores nothing");
  const Json* format = fields->Find("response_format");
  if (format != nullptr && !(format->is_object() && format->size() == 1 && format->value("type", Json()) == "text")) {
    fields->Fail("response_format", fmt::format("{} is not supported; only {{\"type\": \"text\"}}", Shorten(*format)));
  }
  fields->Ignore(
      {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier"});
}

void ReadPrompts(FieldReader* fields, GenerateCall* call) {
  const Json* prompt = fields->Find("prompt");
  if (prompt == nullptr) return fields->Fail("prompt", "is required");
  if (prompt->is_string()) return call->prompts.emplace_back(prompt->get<std::string>()), void();
  if (!prompt->is_array()) return fields->Fail("prompt", fmt::format("{} is not text or token ids", Shorten(*prompt)));
  if (prompt->empty()) return fields->Fail("prompt", "is an empty list");
  std::string error;
  if (prompt->front().is_number()) {
    std::vector<int32_t> ids;
    if (!ReadTokenIds(*prompt, &ids, &error)) return fields->Fail("prompt", error);
    return call->prompts.emplace_back(std::move(ids)), void();
  }
  for (const Json& item : *prompt) {
    std::vector<int32_t> ids;
    if (item.is_string() && prompt->front().is_string()) {
      call->prompts.emplace_back(item.get<std::string>());
    } else if (item.is_array() && prompt->front().is_array()) {
      if (!ReadTokenIds(item, &ids, &error)) return fields->Fail("prompt", error);
      call->prompts.emplace_back(std::move(ids));
    } else {
      return fields->Fail("prompt",
                          fmt::format("{}: a list holds strings, token ids, or lists of token ids", Shorten(item)));
    }
  }
}

bool ReadContent(const Json& content, std::string* text, std::string* error) {
  if (content.is_string()) return *text = content.get<std::string>(), true;
  if (!content.is_array()) return *error = "is not a string or a list of text parts", false;
  for (const Json& part : content) {
    if (!part.is_object() || part.value("type", Json()) != "text" || !part.contains("text") ||
        !part["text"].is_string() || part.size() != 2) {
      return *error = fmt::format("{}: only {{\"type\": \"text\", \"text\": ...}} parts are supported", Shorten(part)),
             false;
    }
    *text += part["text"].get_ref<const std::string&>();
  }
  return true;
}

void ReadMessages(FieldReader* fields, std::vector<ChatMessage>* messages) {
  const Json* list = fields->Find("messages");
  if (list == nullptr) return fields->Fail("messages", "is required");
  if (!list->is_array() || list->empty()) return fields->Fail("messages", "must be a list of at least one message");
  for (size_t i = 0; i < list->size(); ++i) {
    const std::string where = fmt::format("messages[{}]", i);
    const Json& item = (*list)[i];
    if (!item.is_object()) return fields->Fail(where, "is not an object");
    FieldReader message(item, where + ".");
    ChatMessage& out = messages->emplace_back();
    message.String("role", kMaxName, &out.role);
    if (out.role == "developer") out.role = "system";
    std::string error;
    const Json* content = message.Find("content");
    if (content == nullptr)
      message.Fail("content", "is required");
    else if (!ReadContent(*content, &out.content, &error))
      message.Fail("content", error);
    message.Ignore({"name", "refusal"});
    for (const char* name : {"tool_calls", "tool_call_id", "function_call", "audio"}) message.Unsupported(name);
    fields->Absorb(message.Finish());
    if (!fields->ok()) return;
  }
}

// Of a chat: what is accepted in one form only.
void ReadChatForms(FieldReader* fields) {
  const Json* tools = fields->Find("tools");
  if (tools != nullptr && !(tools->is_array() && tools->empty()))
    fields->Fail("tools", "is not supported by this server");
  const Json* choice = fields->Find("tool_choice");
  if (choice != nullptr && *choice != "none") fields->Fail("tool_choice", "is not supported by this server");
  const Json* modalities = fields->Find("modalities");
  if (modalities != nullptr && *modalities != Json::array({"text"}))
    fields->Fail("modalities", "only [\"text\"] is supported");
  bool parallel = false;  // there are no tools to call
  fields->Bool("parallel_tool_calls", &parallel);
  for (const char* name :
       {"functions", "function_call", "audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"}) {
    fields->Unsupported(name);
  }
  fields->Unsupported("chat_template", "is not supported: a client's template is never run here");
  fields->Only("chat_template_kwargs", Json::object());
  fields->Only("add_generation_prompt", true);
  fields->Only("continue_final_message", false);
  fields->Only("add_special_tokens", false);  // the template writes them
  fields->Only("echo", false);
}

// The reader's errors first: they are about what was sent, the others about what it means.
absl::StatusOr<OpenAiCall> Checked(FieldReader* fields, OpenAiCall call, const CallLimits& limits) {
  if (absl::Status status = fields->Finish(); !status.ok()) return status;
  if (absl::Status status = CheckCall(call.generate, limits); !status.ok()) return status;
  return call;
}

}  // namespace

absl::StatusOr<OpenAiCall> ParseCompletion(const std::string& body, const CallLimits& limits) {
  auto json = ParseJsonObject(body);
  if (!json.ok()) return json.status();
  FieldReader fields(*json);
  OpenAiCall out;
  GenerateCall& call = out.generate;
  ReadPrompts(&fields, &call);
  fields.Bool("echo", &call.echo);
  fields.Int32("max_tokens", call.echo ? 0 : 1, limits.max_output_tokens, &call.sampling.max_tokens);
  ReadCommon(&fields, limits, &out);
  fields.Int32("logprobs", 0, kMaxLogprobs, &call.sampling.logprobs);
  fields.Int32("best_of", 1, limits.max_n, &call.best_of);
  if (call.best_of > call.n && call.stream) fields.Fail("best_of", "cannot be streamed when it is more than n");
  fields.Only("suffix", "");
  fields.Bool("add_special_tokens", &call.prompt_options.add_special_tokens);
  return Checked(&fields, std::move(out), limits);
}

absl::StatusOr<OpenAiCall> ParseChat(const std::string& body, const CallLimits& limits) {
  auto json = ParseJsonObject(body);
  if (!json.ok()) return json.status();
  FieldReader fields(*json);
  OpenAiCall out;
  GenerateCall& call = out.generate;
  std::vector<ChatMessage> messages;
  ReadMessages(&fields, &messages);
  call.prompts.emplace_back(std::move(messages));
  call.sampling.max_tokens = limits.default_chat_tokens;
  fields.Int32("max_tokens", 1, limits.max_output_tokens, &call.sampling.max_tokens);
  fields.Int32("max_completion_tokens", 1, limits.max_output_tokens, &call.sampling.max_tokens);
  ReadCommon(&fields, limits, &out);
  bool logprobs = false;
  int top = 0;
  fields.Bool("logprobs", &logprobs);
  fields.Int32("top_logprobs", 0, kMaxLogprobs, &top);
  if (top > 0 && !logprobs) fields.Fail("top_logprobs", "needs logprobs: true");
  if (logprobs) call.sampling.logprobs = top;
  ReadChatForms(&fields);
  return Checked(&fields, std::move(out), limits);
}

absl::StatusOr<TokenizeCall> ParseTokenize(const std::string& body, const CallLimits& limits) {
  auto json = ParseJsonObject(body);
  if (!json.ok()) return json.status();
  FieldReader fields(*json);
  TokenizeCall call;
  fields.String("model", kMaxName, &call.model);
  fields.Bool("add_special_tokens", &call.add_special_tokens);
  fields.Bool("return_token_strs", &call.return_token_strs);
  fields.Only("add_generation_prompt", true);
  fields.Only("continue_final_message", false);
  const Json* prompt = fields.Find("prompt");
  if (prompt != nullptr && json->contains("messages")) fields.Fail("messages", "give prompt or messages, not both");
  if (prompt != nullptr && !prompt->is_string()) fields.Fail("prompt", "is not a string");
  if (prompt != nullptr && fields.ok()) {
    call.prompt = prompt->get<std::string>();
  } else if (json->contains("messages")) {
    std::vector<ChatMessage> messages;
    ReadMessages(&fields, &messages);
    call.prompt = std::move(messages);
  } else {
    fields.Fail("prompt", "is required (or messages)");
  }
  if (absl::Status status = fields.Finish(); !status.ok()) return status;
  if (const auto* messages = std::get_if<std::vector<ChatMessage>>(&call.prompt)) {
    if (absl::Status status = CheckMessages(*messages, limits); !status.ok()) return status;
  }
  return call;
}

absl::StatusOr<DetokenizeCall> ParseDetokenize(const std::string& body) {
  auto json = ParseJsonObject(body);
  if (!json.ok()) return json.status();
  FieldReader fields(*json);
  DetokenizeCall call;
  fields.String("model", kMaxName, &call.model);
  fields.Bool("skip_special_tokens", &call.skip_special_tokens);
  if (fields.Find("tokens") == nullptr) fields.Fail("tokens", "is required");
  fields.TokenIds("tokens", &call.tokens);
  if (absl::Status status = fields.Finish(); !status.ok()) return status;
  return call;
}

}  // namespace linspec
