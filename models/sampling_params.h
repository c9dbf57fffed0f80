// How a request's next token is chosen. Defaults are "off": they leave the model's distribution as it is.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"

namespace linspec {

struct SamplingParams {
  float temperature = 1.0f;                       // 0: greedy
  float top_p = 1.0f;                             // (0, 1]
  int32_t top_k = 0;                              // 0: off
  float min_p = 0.0f;                             // [0, 1]
  float typical_p = 1.0f;                         // (0, 1]
  float repetition_penalty = 1.0f;                // > 0; over prompt and output (as Hugging Face)
  float frequency_penalty = 0.0f;                 // [-2, 2]; over output
  float presence_penalty = 0.0f;                  // [-2, 2]; over output
  std::unordered_map<int32_t, float> logit_bias;  // token -> added to the logit; [-100, 100]
  std::vector<int32_t> allowed_token_ids;         // nothing else is ever chosen; empty: all are allowed
  // Never all of a sequence in the output: where its beginning stands, its last token is not chosen. vLLM's bad_words.
  std::vector<std::vector<int32_t>> banned_sequences;
  uint64_t seed = 0;  // the server draws one when the client gives none

  int32_t max_tokens = 16;
  int32_t min_tokens = 0;  // no end-of-sequence or stop token before this many
  bool ignore_eos = false;
  std::vector<int32_t> stop_token_ids;
  std::vector<std::string> stop;  // strings; matched by the server on detokenized text
  bool include_stop_in_output = false;
  int32_t logprobs = -1;  // -1: none; 0: the chosen token's; n: and the n best (<= 20)

  // INVALID_ARGUMENT names field and value. vocab_size bounds every token id.
  absl::Status Validate(int64_t vocab_size) const;
};

}  // namespace linspec
