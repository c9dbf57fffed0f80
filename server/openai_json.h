// OpenAI's JSON to our request values; answer_writer.h is the way back. Pure functions: no I/O, no clock, no model.
// Strict: a field that is unknown, of the wrong type or out of range is an error that names it (errors.h, FieldError);
// a known field that we do not support and that would change the result is an error that says why.
//
// Threads: pure.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/generate_call.h"

namespace linspec {

// What /v1/responses repeats in its answer.
struct ResponsesEcho {
  std::optional<std::string> instructions;
  std::string metadata = "{}";  // a JSON object
};

// A parsed call of a generating route: beside the call itself what only JSON answers need.
struct OpenAiCall {
  GenerateCall generate;
  std::string request_id;                  // vLLM's; "" if the client gave none
  bool include_usage = false;              // a chunk with the usage at the end
  bool continuous_usage = false;           // and in every chunk
  bool tokens_as_ids = false;              // logprobs write token 5 as "token_id:5"
  std::optional<ResponsesEcho> responses;  // set for /v1/responses
};

absl::StatusOr<OpenAiCall> ParseCompletion(const std::string& body, const CallLimits& limits);
absl::StatusOr<OpenAiCall> ParseChat(const std::string& body, const CallLimits& limits);
absl::StatusOr<OpenAiCall> ParseResponses(const std::string& body, const CallLimits& limits);  // responses_json.cc

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

}  // namespace linspec
