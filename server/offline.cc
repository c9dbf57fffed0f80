// `linspec generate`: the same engine and model as serve, without a network.
#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <random>

#include "server/commands.h"
#include "server/config.h"
#include "server/flags.h"
#include "server/metrics.h"
#include "server/model_files.h"

namespace linspec {
namespace {

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Waits for a stream on this thread.
class Waiter {
 public:
  void Notify() {
    std::lock_guard lock(mutex_);
    ready_ = true;
    wake_.notify_one();
  }
  void Wait() {
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [this] { return ready_; });
    ready_ = false;
  }

 private:
  std::mutex mutex_;  // guards ready_
  std::condition_variable wake_;
  bool ready_ = false;
};

absl::Status StreamToTerminal(RunningRequest* request) {
  Waiter waiter;
  const auto start = Clock::now();
  std::optional<Clock::time_point> first;
  request->SetNotify([&waiter] { waiter.Notify(); });
  while (!request->finished()) {
    waiter.Wait();
    const StreamDelta delta = request->Take();
    if (!delta.tokens.empty() && !first) first = Clock::now();
    fmt::print("{}", delta.text);
    std::fflush(stdout);
    if (delta.finish_reason == FinishReason::kError) return delta.status;
  }
  const StreamUsage& usage = request->usage();
  const double decode_s = first ? SecondsSince(*first) : 0;
  fmt::print("\n");
  fmt::print(stderr, "\n{} prompt tokens, first token after {:.0f} ms; {} tokens, {:.1f} tokens/s", usage.prompt_tokens,
             first ? std::chrono::duration<double, std::milli>(*first - start).count() : 0.0, usage.completion_tokens,
             decode_s > 0 ? static_cast<double>(usage.completion_tokens - 1) / decode_s : 0.0);
  if (usage.verify_steps > 0) {
    fmt::print(stderr, "; {} of {} drafted tokens accepted, {:.2f} tokens a step", usage.accepted_tokens,
               usage.draft_tokens,
               static_cast<double>(usage.completion_tokens) / static_cast<double>(usage.verify_steps));
  }
  fmt::print(stderr, "\n");
  return absl::OkStatus();
}

}  // namespace

absl::Status Generate(std::span<const std::string> args) {
  CommandFlags flags(args);
  const int max_tokens = flags.Int("max-tokens", 128, 1, 1 << 30);
  const double temperature = flags.Double("temperature", 0.8, 0, 2);
  const double top_p = flags.Double("top-p", 0.95, 0, 1);
  const std::string seed = flags.String("seed", "");
  const bool chat = flags.String("chat", "false") == "true";
  const std::string prompt = flags.Positional();
  if (!flags.status().ok()) return flags.status();
  if (prompt.empty()) return absl::InvalidArgumentError("needs a prompt: linspec generate \"Once upon a time\"");
  auto config = ParseServerConfig(flags.rest());
  if (!config.ok()) return config.status();
  config->engine.max_requests = 1;
  config->engine.prefix_cache = 0;

  Metrics metrics({.model_name = "generate"});
  Log log(LogFormat::kText, LogLevel::kOff);
  auto parts = LoadParts(*config, nullptr);
  if (!parts.ok()) return parts.status();
  Service service(*config, *std::move(parts), &metrics, &log);
  service.engine().Start();
  auto tokens = service.ToTokens(chat ? PromptInput(std::vector<ChatMessage>{{"user", prompt}}) : PromptInput(prompt));
  if (!tokens.ok()) return tokens.status();
  GenerateSpec spec;
  spec.sampling.max_tokens = max_tokens;
  spec.sampling.temperature = static_cast<float>(temperature);
  spec.sampling.top_p = static_cast<float>(top_p);
  spec.sampling.seed = seed.empty() ? std::random_device{}() : std::strtoull(seed.c_str(), nullptr, 10);
  auto request = service.Start(*std::move(tokens), std::move(spec));
  if (!request.ok()) return request.status();
  if (!chat) fmt::print("{}", prompt);
  return StreamToTerminal(request->get());
}

}  // namespace linspec
