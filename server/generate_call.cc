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

absl::Status CheckStrings(const char* field, const std::vector<std::string>& strings, const CallLimits& limits) {
  const auto most = static_cast<size_t>(limits.max_stop_strings);
  if (strings.size() > most) {
    return FieldError(field, fmt::format("{} strings; at most {} (--max-stop-strings)", strings.size(), most));
  }
  for (const std::string& text : strings) {
    if (text.empty()) return FieldError(field, "a string is empty");
    if (text.size() > static_cast<size_t>(limits.max_stop_bytes)) {
      return FieldError(field, fmt::format("a string has {} bytes; at most {} (--max-stop-bytes)", text.size(),
                                           limits.max_stop_bytes));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckStops(const GenerateCall& call, const CallLimits& limits) {
  const SamplingParams& sampling = call.sampling;
  if (absl::Status status = CheckStrings("stop", sampling.stop, limits); !status.ok()) return status;
  if (absl::Status status = CheckStrings("bad_words", call.bad_words, limits); !status.ok()) return status;
  if (!call.detokenize && !sampling.stop.empty()) return FieldError("stop", "needs text, and skip_text asks for none");
  const size_t num_ids = sampling.stop_token_ids.size();
  if (num_ids <= static_cast<size_t>(limits.max_stop_strings)) return absl::OkStatus();
  return FieldError("stop_token_ids",
                    fmt::format("{} ids; at most {} (--max-stop-strings)", num_ids, limits.max_stop_strings));
}

absl::Status CheckSalt(const std::string& salt) {
  constexpr size_t kMost = 1024;  // vLLM's
  if (salt.size() <= kMost) return absl::OkStatus();
  return FieldError("cache_salt", fmt::format("{} bytes; at most {}", salt.size(), kMost));
}

absl::Status CheckPromptOptions(const PromptOptions& options, const CallLimits& limits) {
  const int32_t tokens = options.truncate_tokens;
  if (tokens >= -1 && tokens <= limits.max_prompt_tokens) return absl::OkStatus();
  return FieldError("truncate_prompt_tokens",
                    fmt::format("{} is not -1 or in [1, {}] (--max-prompt-tokens)", tokens, limits.max_prompt_tokens));
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
  if (absl::Status status = CheckPromptOptions(call.prompt_options, limits); !status.ok()) return status;
  if (absl::Status status = CheckSalt(call.cache_salt); !status.ok()) return status;
  return CheckStops(call, limits);
}

}  // namespace linspec
