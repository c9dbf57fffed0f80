// Answers of /v1/completions and /v1/chat/completions: by hand, because a chunk is written for every token of every
// stream.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/answer_writer.h"
#include "server/errors.h"
#include "server/json_text.h"

namespace linspec {
namespace {

const char* OpenAiFinishReason(FinishReason reason) { return reason == FinishReason::kStop ? "stop" : "length"; }

// How logprobs name tokens.
struct TokenNames {
  TokenBytesFn bytes;
  bool as_ids = false;  // "token_id:5"
};

// A token as text; one that is not UTF-8 by itself as OpenAI spells it, "bytes:\xe2\x80".
std::string TokenText(int32_t id, const TokenNames& names) {
  if (names.as_ids) return fmt::format("token_id:{}", id);
  const std::string bytes = names.bytes(id);
  if (IsUtf8(bytes)) return bytes;
  std::string text = "bytes:";
  for (const char c : bytes) fmt::format_to(std::back_inserter(text), "\\x{:02x}", static_cast<uint8_t>(c));
  return text;
}

void AppendNumber(float value, std::string* out) {
  // JSON has no infinities; vLLM's and OpenAI's floor for "impossible" is -9999.
  fmt::format_to(std::back_inserter(*out), "{}", std::isfinite(value) ? value : -9999.0f);
}

void AppendChatToken(int32_t id, float logprob, const TokenNames& names, std::string* out) {
  *out += "{\"token\":";
  AppendJsonString(TokenText(id, names), out);
  *out += ",\"logprob\":";
  AppendNumber(logprob, out);
  const std::string bytes = names.bytes(id);
  std::string list;
  for (const char c : bytes)
    fmt::format_to(std::back_inserter(list), "{}{}", list.empty() ? "" : ",", static_cast<uint8_t>(c));
  *out += fmt::format(",\"bytes\":[{}]", list);
}

void AppendChatLogprobs(const Choice& choice, const TokenNames& names, std::string* out) {
  *out += "{\"content\":[";
  const char* comma = "";
  for (const OutputToken& item : choice.tokens) {
    if (item.beyond_text) continue;
    const SampledToken& token = item.sampled;
    *out += std::exchange(comma, ",");
    AppendChatToken(token.token, token.logprob, names, out);
    *out += ",\"top_logprobs\":[";
    for (size_t j = 0; j < token.top_logprobs.size(); ++j) {
      if (j > 0) *out += ',';
      AppendChatToken(token.top_logprobs[j].token, token.top_logprobs[j].logprob, names, out);
      *out += '}';
    }
    *out += "]}";
  }
  *out += "],\"refusal\":null}";
}

void AppendTopMap(const SampledToken& token, const TokenNames& names, std::string* out) {
  *out += '{';
  for (size_t j = 0; j < token.top_logprobs.size(); ++j) {
    if (j > 0) *out += ',';
    AppendJsonString(TokenText(token.top_logprobs[j].token, names), out);
    *out += ':';
    AppendNumber(token.top_logprobs[j].logprob, out);
  }
  *out += '}';
}

void AppendCompletionLogprobs(const Choice& choice, int num_top, const TokenNames& names, std::string* out) {
  std::string tokens, logprobs, tops, offsets;
  for (const OutputToken& token : choice.tokens) {
    if (token.beyond_text) continue;
    const char* comma = tokens.empty() ? "" : ",";
    const bool has = !std::isnan(token.sampled.logprob);  // nothing predicts the first token of a prompt
    tokens += comma;
    AppendJsonString(TokenText(token.sampled.token, names), &tokens);
    logprobs += comma;
    tops += comma;
    if (has)
      AppendNumber(token.sampled.logprob, &logprobs);
    else
      logprobs += "null";
    if (has)
      AppendTopMap(token.sampled, names, &tops);
    else
      tops += "null";
    offsets += fmt::format("{}{}", comma, token.text_start);
  }
  *out += fmt::format("{{\"tokens\":[{}],\"token_logprobs\":[{}],\"top_logprobs\":", tokens, logprobs);
  *out += num_top > 0 ? fmt::format("[{}]", tops) : "null";
  *out += fmt::format(",\"text_offset\":[{}]}}", offsets);
}

void AppendUsage(const StreamUsage& usage, std::string* out) {
  fmt::format_to(
      std::back_inserter(*out),
      "\"usage\":{{\"prompt_tokens\":{},\"completion_tokens\":{},\"total_tokens\":{},"
      "\"prompt_tokens_details\":{{\"cached_tokens\":{}}},"
      "\"completion_tokens_details\":{{\"accepted_prediction_tokens\":{},\"rejected_prediction_tokens\":{}}}}}",
      usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens + usage.completion_tokens, usage.cached_tokens,
      usage.accepted_tokens, usage.draft_tokens - usage.accepted_tokens);
}

// vLLM's: the stop string or stop token that ended a choice.
void AppendStopReason(const Choice& choice, std::string* out) {
  *out += ",\"stop_reason\":";
  if (choice.stop_token >= 0)
    *out += std::to_string(choice.stop_token);
  else if (!choice.stop_string.empty())
    AppendJsonString(choice.stop_string, out);
  else
    *out += "null";
}

void AppendIds(const char* name, const std::vector<int32_t>& ids, std::string* out) {
  fmt::format_to(std::back_inserter(*out), ",\"{}\":[{}]", name, fmt::join(ids, ","));
}

class CompletionWriter : public AnswerWriter {
 public:
  CompletionWriter(const OpenAiCall* call, AnswerHead head, TokenBytesFn token_bytes)
      : call_(*call), chat_(call->generate.chat()), names_{std::move(token_bytes), call->tokens_as_ids} {
    start_ = fmt::format("{{\"id\":\"{}-{}\",\"object\":\"{}\",\"created\":{},\"model\":", chat_ ? "chatcmpl" : "cmpl",
                         head.request_id, Object(), head.created);
    AppendJsonString(head.model, &start_);
    if (call_.generate.stream) start_.insert(0, "data: ");
  }

  std::string Whole(const std::vector<Choice>& choices, const StreamUsage& usage) override {
    std::string out = start_ + ",\"choices\":[";
    for (size_t i = 0; i < choices.size(); ++i) {
      if (i > 0) out += ',';
      AppendChoice(choices[i], &out);
    }
    out += "],";
    AppendUsage(usage, &out);
    if (chat_ && call_.generate.prompt_token_ids) AppendIds("prompt_token_ids", choices[0].prompt_token_ids, &out);
    return out + "}";
  }

  // A chat's choice opens with a chunk that says only the role.
  void Piece(const Choice& piece, const StreamUsage& usage_so_far, std::string* out) override {
    if (chat_ && BeginsNow(piece.index)) AppendRole(piece, out);
    *out += start_;
    *out += ",\"choices\":[";
    AppendChoice(piece, out);
    *out += ']';
    if (call_.continuous_usage) {
      *out += ',';
      AppendUsage(usage_so_far, out);
    }
    *out += "}\n\n";
  }

  void End(const StreamUsage& usage, std::string* out) override {
    if (call_.include_usage) {
      *out += start_ + ",\"choices\":[],";
      AppendUsage(usage, out);
      *out += "}\n\n";
    }
    *out += "data: [DONE]\n\n";
  }

  void Error(const absl::Status& status, std::string* out) override {
    *out += "data: " + OpenAiErrorJson(status) + "\n\ndata: [DONE]\n\n";
  }

 private:
  const char* Object() const {
    if (!chat_) return "text_completion";
    return call_.generate.stream ? "chat.completion.chunk" : "chat.completion";
  }

  bool BeginsNow(int index) {
    if (begun_.size() <= static_cast<size_t>(index)) begun_.resize(index + 1);
    const bool begun = begun_[index];
    begun_[index] = true;
    return !begun;
  }

  void AppendRole(const Choice& piece, std::string* out) const {
    *out += start_;
    fmt::format_to(
        std::back_inserter(*out),
        ",\"choices\":[{{\"index\":{},\"delta\":{{\"role\":\"assistant\",\"content\":\"\"}},\"logprobs\":null,"
        "\"finish_reason\":null}}]",
        piece.index);
    if (call_.generate.prompt_token_ids) AppendIds("prompt_token_ids", piece.prompt_token_ids, out);
    *out += "}\n\n";
  }

  void AppendText(const Choice& choice, std::string* out) const {
    if (!chat_) {
      *out += "\"text\":";
      return AppendJsonString(choice.text, out);
    }
    const bool chunk = call_.generate.stream;
    *out += chunk ? "\"delta\":{\"content\":" : "\"message\":{\"role\":\"assistant\",\"content\":";
    AppendJsonString(choice.text, out);
    *out += chunk ? "}" : ",\"refusal\":null}";
  }

  void AppendChoice(const Choice& choice, std::string* out) const {
    absl::StrAppend(out, "{\"index\":", choice.index, ",");
    AppendText(choice, out);
    *out += ",\"logprobs\":";
    const int logprobs = call_.generate.sampling.logprobs;
    if (logprobs < 0)
      *out += "null";
    else if (chat_)
      AppendChatLogprobs(choice, names_, out);
    else
      AppendCompletionLogprobs(choice, logprobs, names_, out);
    if (choice.finish == FinishReason::kNone) {
      *out += ",\"finish_reason\":null";
    } else {
      fmt::format_to(std::back_inserter(*out), ",\"finish_reason\":\"{}\"", OpenAiFinishReason(choice.finish));
      AppendStopReason(choice, out);
    }
    if (call_.generate.token_ids) AppendTokenIds(choice, out);
    *out += '}';
  }

  void AppendTokenIds(const Choice& choice, std::string* out) const {
    std::vector<int32_t> ids;
    for (const OutputToken& token : choice.tokens) ids.push_back(token.sampled.token);
    AppendIds("token_ids", ids, out);
    if (!chat_ && !choice.prompt_token_ids.empty()) AppendIds("prompt_token_ids", choice.prompt_token_ids, out);
  }

  const OpenAiCall& call_;
  const bool chat_;
  const TokenNames names_;
  std::string start_;  // of every answer or chunk, up to the model
  std::vector<bool> begun_;
};

}  // namespace

std::unique_ptr<AnswerWriter> MakeCompletionWriter(const OpenAiCall* call, AnswerHead head, TokenBytesFn token_bytes) {
  return std::make_unique<CompletionWriter>(call, std::move(head), std::move(token_bytes));
}

}  // namespace linspec
