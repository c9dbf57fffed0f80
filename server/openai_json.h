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
#include "server/candidates.h"
#include "server/generate_call.h"
#include "server/response_stream.h"

namespace linspec {

// A parsed call of /v1/completions or /v1/chat/completions: the part that only JSON answers need.
struct OpenAiCall {
  GenerateCall generate;
  bool include_usage = false;     // a chunk with the usage at the end
  bool continuous_usage = false;  // and in every chunk
};

absl::StatusOr<OpenAiCall> ParseCompletion(const std::string& body, const CallLimits& limits);
absl::StatusOr<OpenAiCall> ParseChat(const std::string& body, const CallLimits& limits);

struct TokenizeCall {
  PromptInput prompt;
  std::string model;
  bool add_special_tokens = true, return_token_strs = false;
};
absl::StatusOr<TokenizeCall> ParseTokenize(const std::string& body, const CallLimits& limits);

struct DetokenizeCall {
  std::string model;
  std::vector<int32_t> tokens;
  bool skip_special_tokens = false;
};
absl::StatusOr<DetokenizeCall> ParseDetokenize(const std::string& body);

// What every answer, or every chunk, of one call begins with.
struct ResponseHead {
  std::string id, model;
  int64_t created = 0;
  bool chat = false;
  int logprobs = -1;             // as SamplingParams::logprobs
  std::string chunk_start = {};  // by BeginChunks
};

using TokenBytesFn = std::function<std::string(int32_t)>;

std::string UsageJson(const StreamUsage& usage);
std::string FullResponseJson(const ResponseHead& head, const std::vector<Choice>& choices, const StreamUsage& usage,
                             const TokenBytesFn& token_bytes);
void BeginChunks(ResponseHead* head);  // before the first chunk
// "data: {...}\n\n": what is new of a choice. A chat's stream opens with a chunk that says only the role.
// usage: of the call so far, null for none.
void AppendChunk(const ResponseHead& head, const Choice& piece, const TokenBytesFn& token_bytes, std::string* out,
                 const StreamUsage* usage = nullptr);
void AppendRoleChunk(const ResponseHead& head, int index, std::string* out);
void AppendUsageChunk(const ResponseHead& head, const StreamUsage& usage, std::string* out);

}  // namespace linspec
