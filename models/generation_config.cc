#include "models/generation_config.h"

#include <fmt/format.h>

#include "models/config_fields.h"
#include "models/json_check.h"

namespace linspec {
namespace {

using config_internal::Fields;
using nlohmann::json;

// A number above 0: of what is too small for a float nothing is left.
float Positive(Fields* fields, const char* name, double high) {
  const float value = fields->Number(name, 0, high, 1);
  if (value > 0 || !fields->status().ok()) return value;
  fields->Fail(name, *fields->Find(name), fmt::format("a number above 0, at most {}", high));
  return value;
}

}  // namespace

void SamplingDefaults::Apply(SamplingParams* sampling) const {
  sampling->temperature = temperature;
  sampling->top_p = top_p;
  sampling->top_k = top_k;
  sampling->min_p = min_p;
  sampling->repetition_penalty = repetition_penalty;
}

absl::StatusOr<GenerationConfig> ParseGenerationConfig(std::string_view text, int64_t vocab_size) {
  if (absl::Status checked = CheckJson(text); !checked.ok()) return checked;
  const json root = json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (!root.is_object()) return absl::InvalidArgumentError("expected a JSON object");
  Fields fields(root, "");
  GenerationConfig config;  // bounds: those of a request
  config.sampling.temperature = fields.Number("temperature", 0, 2, 1);
  config.sampling.top_p = Positive(&fields, "top_p", 1);
  config.sampling.top_k = static_cast<int32_t>(std::max<int64_t>(0, fields.Integer("top_k", -1, INT32_MAX, 0)));
  config.sampling.min_p = fields.Number("min_p", 0, 1, 0);
  config.sampling.repetition_penalty = Positive(&fields, "repetition_penalty", 100);
  config.max_new_tokens = static_cast<int32_t>(fields.Integer("max_new_tokens", 1, INT32_MAX, 0));
  config.eos_token_ids = fields.TokenIds("eos_token_id", vocab_size);
  if (!fields.status().ok()) return fields.status();
  return config;
}

}  // namespace linspec
