#include "server/generate_call.h"

#include <fmt/format.h>

#include "server/errors.h"

namespace linspec {
namespace {

constexpr float kMaxTemperature = 2;  // OpenAI's

absl::Status CheckRange(const char* field, int64_t value, int64_t min, int64_t max) {
  if (value >= min && value <= max) return absl::OkStatus();
  return FieldError(field, fmt::format("{} is not in [{}, {}]", value, min, max));
}

absl::Status CheckStops(const SamplingParams& sampling, const CallLimits& limits) {
  const auto most = static_cast<size_t>(limits.max_stop_strings);
  if (sampling.stop.size() > most) {
    return FieldError("stop", fmt::format("{} strings; at most {} (--max-stop-strings)", sampling.stop.size(), most));
  }
  for (const std::string& text : sampling.stop) {
    if (text.empty()) return FieldError("stop", "a stop string is empty");
    if (text.size() > static_cast<size_t>(limits.max_stop_bytes)) {
      return FieldError("stop", fmt::format("a stop string has {} bytes; at most {} (--max-stop-bytes)", text.size(),
                                            limits.max_stop_bytes));
    }
  }
  if (sampling.stop_token_ids.size() > most) {
    return FieldError("stop_token_ids",
                      fmt::format("{} ids; at most {} (--max-stop-strings)", sampling.stop_token_ids.size(), most));
  }
  return absl::OkStatus();
}

absl::Status CheckCounts(const GenerateCall& call, const CallLimits& limits) {
  if (absl::Status status = CheckRange("n", call.n, 1, limits.max_n); !status.ok()) return status;
  if (absl::Status status = CheckRange("best_of", call.best_of, 1, limits.max_n); !status.ok()) return status;
  if (call.best_of < call.n) return FieldError("best_of", fmt::format("{} is less than n {}", call.best_of, call.n));
  const int64_t total = static_cast<int64_t>(call.prompts.size()) * call.best_of;
  if (total <= limits.max_n) return absl::OkStatus();
  return FieldError(call.prompts.size() > 1 ? "prompt" : "n",
                    fmt::format("{} prompts times {} candidates are {} requests; at most {} (--max-n)",
                                call.prompts.size(), call.best_of, total, limits.max_n));
}

}  // namespace

absl::Status CheckMessages(const std::vector<ChatMessage>& messages, const CallLimits& limits) {
  if (messages.empty()) return FieldError("messages", "must be a list of at least one message");
  if (messages.size() > static_cast<size_t>(limits.max_messages)) {
    return FieldError("messages",
                      fmt::format("{} messages; at most {} (--max-messages)", messages.size(), limits.max_messages));
  }
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string& role = messages[i].role;
    if (role != "system" && role != "user" && role != "assistant") {
      return FieldError(fmt::format("messages[{}].role", i),
                        fmt::format("'{}' is not one of system, developer, user, assistant", role.substr(0, 100)));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckCall(const GenerateCall& call, const CallLimits& limits) {
  const SamplingParams& sampling = call.sampling;
  if (call.prompts.empty()) return FieldError("prompt", "is required");
  if (call.chat()) {
    const auto& messages = std::get<std::vector<ChatMessage>>(call.prompts.front());
    if (absl::Status status = CheckMessages(messages, limits); !status.ok()) return status;
    if (call.echo) return FieldError("echo", "is for completions: a chat's prompt is the template's");
  }
  if (absl::Status status = CheckCounts(call, limits); !status.ok()) return status;
  if (absl::Status status = CheckRange("max_tokens", sampling.max_tokens, call.echo ? 0 : 1, limits.max_output_tokens);
      !status.ok()) {
    return status;
  }
  if (sampling.min_tokens > sampling.max_tokens) {
    return FieldError("min_tokens",
                      fmt::format("{} is more than max_tokens {}", sampling.min_tokens, sampling.max_tokens));
  }
  if (!(sampling.temperature <= kMaxTemperature)) {  // NaN too
    return FieldError("temperature", fmt::format("{} is not in [0, {}]", sampling.temperature, kMaxTemperature));
  }
  if (sampling.logit_bias.size() > static_cast<size_t>(limits.max_logit_bias)) {
    return FieldError("logit_bias", fmt::format("{} entries; at most {} (--max-logit-bias)", sampling.logit_bias.size(),
                                                limits.max_logit_bias));
  }
  if (!call.detokenize && !sampling.stop.empty()) return FieldError("stop", "needs text, and skip_text asks for none");
  return CheckStops(sampling, limits);
}

}  // namespace linspec
