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
#include "models/generation_config.h"
#include "models/sampling_params.h"
#include "scheduler/request.h"

namespace linspec {

struct ChatMessage {
  std::string role, content;
};
using PromptInput = std::variant<std::string, std::vector<int32_t>, std::vector<ChatMessage>>;

// Each is a flag of the same name, but for the last.
struct CallLimits {
  int max_n = 16;
  int max_prompt_tokens = 131072;
  int max_output_tokens = 131072;
  int default_chat_tokens = 1024;  // max_tokens of a chat that gives none
  int max_stop_strings = 16;       // and as many stop token ids and bad words
  int max_stop_bytes = 1024;       // of a bad word, too
  int max_logit_bias = 1024;
  int max_messages = 4096;
  SamplingDefaults defaults = {};  // of calls that do not say
};

struct PromptOptions {
  bool add_special_tokens = true;  // to text, as the tokenizer does (bos); a chat's are the template's
  int32_t truncate_tokens = 0;     // keep at most so many; 0: all, -1: what --max-prompt-tokens allows
  bool truncate_end = false;       // keep the first ones; false: the last
};

struct GenerateCall {
  std::string model;
  std::vector<PromptInput> prompts;  // one for a chat
  int n = 1, best_of = 1;            // choices returned and candidates generated, for each prompt
  bool echo = false;                 // the prompt comes first; with logprobs it is scored, too
  bool stream = false;
  PromptOptions prompt_options;
  bool token_ids = false;              // choices list their token ids
  bool prompt_token_ids = false;       // and those of their prompts
  bool detokenize = true;              // false: token ids only, no text
  bool skip_special_tokens = true;     // in the text
  SamplingParams sampling;             // max_tokens 0: with echo, only the prompt is wanted
  std::vector<std::string> bad_words;  // never all of one in the output; become sampling.banned_sequences
  bool has_seed = false;
  SpeculationMode speculation = SpeculationMode::kDefault;
  AcceptanceMode acceptance = AcceptanceMode::kDefault;
  int32_t priority = 0;
  std::string cache_salt = {};  // what it computes of its prompts is of use to calls of the same salt only
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
