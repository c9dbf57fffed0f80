// `linspec generate` and `linspec eval`: the same engine and model as serve, without a network.
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

struct EvalSum {
  double nats = 0;
  int64_t tokens = 0, bytes = 0;
};

double LogProb(std::span<const float> logits, int32_t token) {
  double max = logits[0], sum = 0;
  for (const float logit : logits) max = std::max<double>(max, logit);
  for (const float logit : logits) sum += std::exp(logit - max);
  return logits[token] - max - std::log(sum);
}

// Teacher-forced: a chunk is one chain of nodes, verified for its logits and then committed whole.
absl::Status EvalWindow(Model* model, StatePool* pool, const Tokenizer& tokenizer, std::span<const int32_t> tokens,
                        EvalSum* sum) {
  StateSlot slot = pool->Acquire();
  const auto vocab = static_cast<size_t>(model->config().vocab_size);
  for (size_t begin = 0; begin + 1 < tokens.size(); begin += kMaxTreeNodes) {
    const size_t count = std::min<size_t>(kMaxTreeNodes, tokens.size() - 1 - begin);
    DraftTree chain = DraftTree::Root(tokens[begin]);
    std::vector<int32_t> path = {0};
    for (size_t i = 1; i < count; ++i) path.push_back(chain.Add(tokens[begin + i], static_cast<int>(i) - 1));
    VerifyBatch batch;
    batch.row_starts = {0};
    batch.Add(slot.id(), chain);
    auto result = model->Verify(batch, *pool);
    if (!result.ok()) return result.status();
    for (size_t i = 0; i < count; ++i) {
      const int32_t next = tokens[begin + i + 1];
      sum->nats -= LogProb(result->logits.subspan(i * vocab, vocab), next);
      sum->bytes += static_cast<int64_t>(tokenizer.TokenBytes(next).size());
      ++sum->tokens;
    }
    const std::vector<int32_t> paths[] = {path};
    if (absl::Status status = model->Commit(batch, paths, pool); !status.ok()) return status;
  }
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

absl::Status Eval(std::span<const std::string> args) {
  CommandFlags flags(args);
  const std::string path = flags.String("text", "");
  const int context_flag = flags.Int("context", 0, 0, 1 << 30);
  const int max_tokens = flags.Int("max-tokens", 1 << 30, 2, 1 << 30);
  if (!flags.status().ok()) return flags.status();
  if (path.empty()) return absl::InvalidArgumentError("--text FILE is required");
  auto config = ParseServerConfig(flags.rest());
  if (!config.ok()) return config.status();
  auto text = ReadFile(path);
  if (!text.ok()) return text.status();
  auto files = LoadModelFiles(config->model);
  if (!files.ok()) return files.status();
  auto tokens = files->tokenizer->Encode(*text, {.add_special_tokens = false, .parse_special = false});
  if (!tokens.ok()) return tokens.status();
  auto pool = files->model->CreatePool(1);
  if (!pool.ok()) return pool.status();
  const int64_t trained_at = files->model->config().max_position_embeddings;
  const size_t context = context_flag > 0 ? context_flag : trained_at > 0 ? static_cast<size_t>(trained_at) : 1024;
  const size_t total = std::min<size_t>(tokens->size(), static_cast<size_t>(max_tokens));
  EvalSum sum;
  const auto start = Clock::now();
  for (size_t begin = 0; begin + 1 < total; begin += context) {
    const auto window = std::span<const int32_t>(*tokens).subspan(begin, std::min(context, total - begin));
    if (absl::Status status = EvalWindow(files->model.get(), pool->get(), *files->tokenizer, window, &sum);
        !status.ok()) {
      return status;
    }
  }
  if (sum.tokens == 0) return absl::InvalidArgumentError(fmt::format("--text: '{}' has less than two tokens", path));
  fmt::print(
      "{{\"model\": \"{}\", \"context\": {}, \"tokens\": {}, \"bytes\": {}, \"perplexity\": {:.4f}, \"bits_per_byte\": "
      "{:.5f}, "
      "\"tokens_per_s\": {:.1f}}}\n",
      files->path, context, sum.tokens, sum.bytes, std::exp(sum.nats / static_cast<double>(sum.tokens)),
      sum.nats / std::log(2.0) / static_cast<double>(sum.bytes), static_cast<double>(sum.tokens) / SecondsSince(start));
  return absl::OkStatus();
}

}  // namespace linspec
