#include "models/sampling_params.h"

#include <cmath>
#include <span>
#include <string_view>

#include "fmt/format.h"

namespace linspec {
namespace {

constexpr int32_t kMaxLogprobs = 20;

absl::Status Invalid(std::string_view field, std::string_view value, std::string_view rule) {
  return absl::InvalidArgumentError(fmt::format("{} = {} is invalid: must be {}", field, value, rule));
}

// Written so that NaN fails.
absl::Status CheckRange(std::string_view field, float value, bool inside, std::string_view rule) {
  if (inside && std::isfinite(value)) return absl::OkStatus();
  return Invalid(field, fmt::format("{}", value), rule);
}

absl::Status CheckInteger(std::string_view field, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return Invalid(field, fmt::format("{}", value), fmt::format("in [{}, {}]", low, high));
}

absl::Status CheckLogitBias(const SamplingParams& params, int64_t vocab_size) {
  for (const auto& [token, bias] : params.logit_bias) {
    if (token < 0 || token >= vocab_size) {
      return Invalid("logit_bias", fmt::format("token {}", token), fmt::format("in [0, {}]", vocab_size - 1));
    }
    if (absl::Status s =
            CheckRange(fmt::format("logit_bias[{}]", token), bias, bias >= -100 && bias <= 100, "in [-100, 100]");
        !s.ok()) {
      return s;
    }
  }
  return absl::OkStatus();
}

absl::Status CheckTokens(std::string_view field, std::span<const int32_t> tokens, int64_t vocab_size) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    absl::Status status = CheckInteger(fmt::format("{}[{}]", field, i), tokens[i], 0, vocab_size - 1);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status CheckStopStrings(const std::vector<std::string>& stop) {
  for (size_t i = 0; i < stop.size(); ++i) {
    if (stop[i].empty()) return Invalid(fmt::format("stop[{}]", i), "\"\"", "a non-empty string");
  }
  return absl::OkStatus();
}

absl::Status CheckBannedSequences(const std::vector<std::vector<int32_t>>& sequences, int64_t vocab_size) {
  for (size_t i = 0; i < sequences.size(); ++i) {
    const std::string field = fmt::format("banned_sequences[{}]", i);
    if (sequences[i].empty()) return Invalid(field, "[]", "at least one token");
    if (absl::Status status = CheckTokens(field, sequences[i], vocab_size); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status SamplingParams::Validate(int64_t vocab_size) const {
  const absl::Status checks[] = {
      CheckRange("temperature", temperature, temperature >= 0 && temperature <= 100, "in [0, 100]"),
      CheckRange("top_p", top_p, top_p > 0 && top_p <= 1, "in (0, 1]"),
      CheckInteger("top_k", top_k, 0, INT32_MAX),
      CheckRange("min_p", min_p, min_p >= 0 && min_p <= 1, "in [0, 1]"),
      CheckRange("typical_p", typical_p, typical_p > 0 && typical_p <= 1, "in (0, 1]"),
      CheckRange("repetition_penalty", repetition_penalty, repetition_penalty > 0 && repetition_penalty <= 100,
                 "in (0, 100]"),
      CheckRange("frequency_penalty", frequency_penalty, frequency_penalty >= -2 && frequency_penalty <= 2,
                 "in [-2, 2]"),
      CheckRange("presence_penalty", presence_penalty, presence_penalty >= -2 && presence_penalty <= 2, "in [-2, 2]"),
      CheckInteger("max_tokens", max_tokens, 1, INT32_MAX),
      CheckInteger("min_tokens", min_tokens, 0, max_tokens),
      CheckInteger("logprobs", logprobs, -1, kMaxLogprobs),
      CheckLogitBias(*this, vocab_size),
      CheckTokens("stop_token_ids", stop_token_ids, vocab_size),
      CheckStopStrings(stop),
      CheckTokens("allowed_token_ids", allowed_token_ids, vocab_size),
      CheckBannedSequences(banned_sequences, vocab_size),
  };
  for (const absl::Status& check : checks) {
    if (!check.ok()) return check;
  }
  return absl::OkStatus();
}

}  // namespace linspec
