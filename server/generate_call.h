// What a client asks to generate, in neither protocol's words: openai_json.h reads it from JSON, grpc_convert.h from
// protobuf, candidates.h runs it. The rules that hold for both are checked here, so that both refuse the same.
//
// Threads: values and pure functions.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "models/sampling_params.h"
#include "scheduler/request.h"

namespace linspec {

struct ChatMessage {
  std::string role, content;
};
using PromptInput = std::variant<std::string, std::vector<int32_t>, std::vector<ChatMessage>>;

// Each is a flag of the same name.
struct CallLimits {
  int max_n = 16;
  int max_output_tokens = 131072;
  int default_chat_tokens = 1024;  // max_tokens of a chat that gives none
  int max_stop_strings = 16;       // and as many stop token ids
  int max_stop_bytes = 1024;
  int max_logit_bias = 1024;
  int max_messages = 4096;
};

struct GenerateCall {
  std::string model;
  std::vector<PromptInput> prompts;  // one for a chat
  int n = 1, best_of = 1;            // choices returned and candidates generated, for each prompt
  bool echo = false;                 // the prompt comes first; with logprobs it is scored, too
  bool stream = false;
  bool token_ids = false;           // choices list their token ids
  bool detokenize = true;           // false: token ids only, no text
  bool skip_special_tokens = true;  // in the text
  SamplingParams sampling;          // max_tokens 0: with echo, only the prompt is wanted
  bool has_seed = false;
  SpeculationMode speculation = SpeculationMode::kDefault;
  AcceptanceMode acceptance = AcceptanceMode::kDefault;
  int32_t priority = 0;
  std::optional<Clock::time_point> deadline = {};
  std::string tenant = {};  // which API key asks; "" without keys
  std::string name = {};    // the client's request id, for Abort; "" for none
  std::string log_id = {};  // what the log calls it

  bool chat() const { return !prompts.empty() && std::holds_alternative<std::vector<ChatMessage>>(prompts.front()); }
  bool scores_prompt() const { return echo && sampling.logprobs >= 0; }
};

// INVALID_ARGUMENT names the field. Bounds of single sampling parameters are SamplingParams::Validate's.
absl::Status CheckCall(const GenerateCall& call, const CallLimits& limits);
absl::Status CheckMessages(const std::vector<ChatMessage>& messages, const CallLimits& limits);

}  // namespace linspec
