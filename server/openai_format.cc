// The writing half of openai_json.h: by hand, because a chunk is written for every token of every stream.
#include <fmt/format.h>

#include <cmath>
#include <iterator>

#include "server/json_text.h"
#include "server/openai_json.h"

namespace linspec {
namespace {

const char* OpenAiFinishReason(FinishReason reason) { return reason == FinishReason::kStop ? "stop" : "length"; }

// A token as text; one that is not UTF-8 by itself as OpenAI spells it, "bytes:\xe2\x80".
std::string TokenText(int32_t id, const TokenBytesFn& token_bytes) {
  const std::string bytes = token_bytes(id);
  if (IsUtf8(bytes)) return bytes;
  std::string text = "bytes:";
  for (const char c : bytes) fmt::format_to(std::back_inserter(text), "\\x{:02x}", static_cast<uint8_t>(c));
  return text;
}

void AppendNumber(float value, std::string* out) {
  // JSON has no infinities; vLLM's and OpenAI's floor for "impossible" is -9999.
  fmt::format_to(std::back_inserter(*out), "{}", std::isfinite(value) ? value : -9999.0f);
}

void AppendChatToken(int32_t id, float logprob, const TokenBytesFn& token_bytes, std::string* out) {
  *out += "{\"token\":";
  AppendJsonString(TokenText(id, token_bytes), out);
  *out += ",\"logprob\":";
  AppendNumber(logprob, out);
  const std::string bytes = token_bytes(id);
  std::string list;
  for (const char c : bytes)
    fmt::format_to(std::back_inserter(list), "{}{}", list.empty() ? "" : ",", static_cast<uint8_t>(c));
  *out += fmt::format(",\"bytes\":[{}]", list);
}

void AppendChatLogprobs(const Choice& choice, const TokenBytesFn& token_bytes, std::string* out) {
  *out += "{\"content\":[";
  for (size_t i = 0; i < choice.tokens.size(); ++i) {
    const SampledToken& token = choice.tokens[i].sampled;
    if (i > 0) *out += ',';
    AppendChatToken(token.token, token.logprob, token_bytes, out);
    *out += ",\"top_logprobs\":[";
    for (size_t j = 0; j < token.top_logprobs.size(); ++j) {
      if (j > 0) *out += ',';
      AppendChatToken(token.top_logprobs[j].token, token.top_logprobs[j].logprob, token_bytes, out);
      *out += '}';
    }
    *out += "]}";
  }
  *out += "],\"refusal\":null}";
}

void AppendTopMap(const SampledToken& token, const TokenBytesFn& token_bytes, std::string* out) {
  *out += '{';
  for (size_t j = 0; j < token.top_logprobs.size(); ++j) {
    if (j > 0) *out += ',';
    AppendJsonString(TokenText(token.top_logprobs[j].token, token_bytes), out);
    *out += ':';
    AppendNumber(token.top_logprobs[j].logprob, out);
  }
  *out += '}';
}

void AppendCompletionLogprobs(const Choice& choice, int num_top, const TokenBytesFn& token_bytes, std::string* out) {
  std::string tokens, logprobs, tops, offsets;
  for (size_t i = 0; i < choice.tokens.size(); ++i) {
    const OutputToken& token = choice.tokens[i];
    const char* comma = i > 0 ? "," : "";
    const bool has = !std::isnan(token.sampled.logprob);  // nothing predicts the first token of a prompt
    tokens += comma;
    AppendJsonString(TokenText(token.sampled.token, token_bytes), &tokens);
    logprobs += comma;
    tops += comma;
    if (has)
      AppendNumber(token.sampled.logprob, &logprobs);
    else
      logprobs += "null";
    if (has)
      AppendTopMap(token.sampled, token_bytes, &tops);
    else
      tops += "null";
    offsets += fmt::format("{}{}", comma, token.text_start);
  }
  *out += fmt::format("{{\"tokens\":[{}],\"token_logprobs\":[{}],\"top_logprobs\":", tokens, logprobs);
  *out += num_top > 0 ? fmt::format("[{}]", tops) : "null";
  *out += fmt::format(",\"text_offset\":[{}]}}", offsets);
}

void AppendHead(const ResponseHead& head, bool chunk, std::string* out) {
  const char* object = !head.chat ? "text_completion" : chunk ? "chat.completion.chunk" : "chat.completion";
  *out += fmt::format("{{\"id\":\"{}\",\"object\":\"{}\",\"created\":{},\"model\":", head.id, object, head.created);
  AppendJsonString(head.model, out);
}

void AppendChoice(const ResponseHead& head, const Choice& choice, bool chunk, const TokenBytesFn& token_bytes,
                  std::string* out) {
  *out += fmt::format("{{\"index\":{},", choice.index);
  if (!head.chat) {
    *out += "\"text\":";
    AppendJsonString(choice.text, out);
  } else {
    *out += chunk ? "\"delta\":{" : "\"message\":{";
    if (!chunk) *out += "\"role\":\"assistant\",";
    *out += "\"content\":";
    AppendJsonString(choice.text, out);
    *out += chunk ? "}" : ",\"refusal\":null}";
  }
  *out += ",\"logprobs\":";
  if (head.logprobs < 0)
    *out += "null";
  else if (head.chat)
    AppendChatLogprobs(choice, token_bytes, out);
  else
    AppendCompletionLogprobs(choice, head.logprobs, token_bytes, out);
  if (choice.finish == FinishReason::kNone)
    *out += ",\"finish_reason\":null}";
  else
    *out += fmt::format(",\"finish_reason\":\"{}\"}}", OpenAiFinishReason(choice.finish));
}

}  // namespace

std::string UsageJson(const StreamUsage& usage) {
  return fmt::format(
      "{{\"prompt_tokens\":{},\"completion_tokens\":{},\"total_tokens\":{},\"prompt_tokens_details\":{{\"cached_"
      "tokens\":{}}},"
      "\"completion_tokens_details\":{{\"accepted_prediction_tokens\":{},\"rejected_prediction_tokens\":{}}}}}",
      usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens + usage.completion_tokens, usage.cached_tokens,
      usage.accepted_tokens, usage.draft_tokens - usage.accepted_tokens);
}

std::string FullResponseJson(const ResponseHead& head, const std::vector<Choice>& choices, const StreamUsage& usage,
                             const TokenBytesFn& token_bytes) {
  std::string out;
  AppendHead(head, false, &out);
  out += ",\"choices\":[";
  for (size_t i = 0; i < choices.size(); ++i) {
    if (i > 0) out += ',';
    AppendChoice(head, choices[i], false, token_bytes, &out);
  }
  out += "],\"usage\":" + UsageJson(usage) + "}";
  return out;
}

void BeginChunks(ResponseHead* head) {
  head->chunk_start = "data: ";
  AppendHead(*head, true, &head->chunk_start);
  head->chunk_start += ",\"choices\":[";
}

void AppendChunk(const ResponseHead& head, const Choice& piece, const TokenBytesFn& token_bytes, std::string* out,
                 const StreamUsage* usage) {
  *out += head.chunk_start;
  AppendChoice(head, piece, true, token_bytes, out);
  *out += usage == nullptr ? "]" : "],\"usage\":" + UsageJson(*usage);
  *out += "}\n\n";
}

void AppendRoleChunk(const ResponseHead& head, int index, std::string* out) {
  *out += head.chunk_start;
  *out += fmt::format(
      "{{\"index\":{},\"delta\":{{\"role\":\"assistant\",\"content\":\"\"}},\"logprobs\":null,"
      "\"finish_reason\":null}}]}}\n\n",
      index);
}

void AppendUsageChunk(const ResponseHead& head, const StreamUsage& usage, std::string* out) {
  *out += head.chunk_start + "],\"usage\":" + UsageJson(usage) + "}\n\n";
}

}  // namespace linspec
