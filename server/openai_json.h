// OpenAI's JSON to our request values and back. Pure functions: no I/O, no clock, no model. Strict: a field that is
// unknown, of the wrong type or out of range is an error that names it (errors.h, FieldError); a known field that we
// do not
// support and that would change the result is an error that says so.
//
// Threads: pure.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "server/response_stream.h"
#include "server/service.h"

namespace linspec {

struct OpenAiLimits {
  int max_n = 16;
  int max_output_tokens = 131072;
  int default_chat_tokens = 1024;  // max_tokens of a chat that gives none
  int max_stop_strings = 16;
  size_t max_stop_bytes = 1024;
};

// A parsed call of /v1/completions or /v1/chat/completions.
struct OpenAiCall {
  bool chat = false;
  std::string model;
  std::vector<PromptInput> prompts;  // one for a chat
  int n = 1, best_of = 1;
  bool echo = false, stream = false, include_usage = false;
  bool no_new_tokens = false;  // max_tokens 0 with echo: only the prompt is wanted
  SamplingParams sampling;
  bool has_seed = false;
  SpeculationMode speculation = SpeculationMode::kDefault;
  AcceptanceMode acceptance = AcceptanceMode::kDefault;
  int32_t priority = 0;
};

absl::StatusOr<OpenAiCall> ParseCompletion(const std::string& body, const OpenAiLimits& limits);
absl::StatusOr<OpenAiCall> ParseChat(const std::string& body, const OpenAiLimits& limits);

struct TokenizeCall {
  PromptInput prompt;
  std::string model;
  bool add_special_tokens = true;
};
absl::StatusOr<TokenizeCall> ParseTokenize(const std::string& body);

struct DetokenizeCall {
  std::string model;
  std::vector<int32_t> tokens;
  bool skip_special_tokens = false;
};
absl::StatusOr<DetokenizeCall> ParseDetokenize(const std::string& body);

// One choice of a complete answer, or one piece of a streamed one.
struct ChoiceText {
  int index = 0;
  std::string text;
  std::vector<OutputToken> tokens;  // for logprobs
  bool with_logprobs = false;
  int num_top = 0;
  bool first_token_has_logprob = true;  // false: tokens[0] opens the prompt
  const char* finish_reason = nullptr;  // null: not finished
  bool role = false;                    // chat stream: the opening piece
};

struct ResponseHead {
  std::string id, model;
  int64_t created = 0;
  bool chat = false;
};

using TokenBytesFn = std::function<std::string(int32_t)>;

const char* OpenAiFinishReason(FinishReason reason);
std::string UsageJson(const StreamUsage& usage);
std::string FullResponseJson(const ResponseHead& head, const std::vector<ChoiceText>& choices, const StreamUsage& usage,
                             const TokenBytesFn& token_bytes);
// "data: {...}\n\n"
void AppendChunk(const ResponseHead& head, const ChoiceText& piece, const TokenBytesFn& token_bytes, std::string* out);
void AppendUsageChunk(const ResponseHead& head, const StreamUsage& usage, std::string* out);

}  // namespace linspec
