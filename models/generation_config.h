// What the makers of a model recommend for requests that do not say: generation_config.json, as Hugging Face writes it.
//
// Threads: values and a pure function.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "models/sampling_params.h"

namespace linspec {

// As the members of SamplingParams of the same names.
struct SamplingDefaults {
  float temperature = 1.0f, top_p = 1.0f, min_p = 0.0f, repetition_penalty = 1.0f;
  int32_t top_k = 0;
  void Apply(SamplingParams* sampling) const;
};

struct GenerationConfig {
  SamplingDefaults sampling;
  int32_t max_new_tokens = 0;          // 0: not said
  std::vector<int32_t> eos_token_ids;  // beside those of config.json
};

// Reads what vLLM reads: temperature, top_p, top_k (-1 and 0: off), min_p, repetition_penalty, max_new_tokens,
// eos_token_id; null is as good as absent. The rest of the file, do_sample too, means nothing here. INVALID_ARGUMENT
// names the field, its value and what was expected.
absl::StatusOr<GenerationConfig> ParseGenerationConfig(std::string_view text, int64_t vocab_size);

}  // namespace linspec
