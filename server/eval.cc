// `linspec eval`: perplexity of a text, and how far a model with other states drifts from it.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <span>
#include <vector>

#include "server/commands.h"
#include "server/config.h"
#include "server/flags.h"
#include "server/model_files.h"

namespace linspec {
namespace {

// One model that reads a window after the other, teacher-forced.
class Reader {
 public:
  explicit Reader(Model* model) : model_(model) {}

  absl::Status Begin() {
    if (pool_ == nullptr) {
      auto pool = model_->CreatePool(1);
      if (!pool.ok()) return pool.status();
      pool_ = *std::move(pool);
    }
    slot_.Release();
    slot_ = pool_->Acquire();
    return absl::OkStatus();
  }
  // Logits behind each of `tokens`, at most kMaxTreeNodes: verified as one chain and then committed whole.
  absl::StatusOr<std::span<const float>> Next(std::span<const int32_t> tokens) {
    DraftTree chain = DraftTree::Root(tokens[0]);
    std::vector<int32_t> path = {0};
    for (size_t i = 1; i < tokens.size(); ++i) path.push_back(chain.Add(tokens[i], static_cast<int>(i) - 1));
    VerifyBatch batch;
    batch.Add(slot_.id(), chain);
    auto result = model_->Verify(batch, *pool_);
    if (!result.ok()) return result.status();
    const std::vector<int32_t> paths[] = {path};
    if (absl::Status status = model_->Commit(batch, paths, pool_.get()); !status.ok()) return status;
    return result->logits;
  }

 private:
  Model* const model_;
  std::unique_ptr<StatePool> pool_;
  StateSlot slot_;
};

void LogSoftmax(std::span<const float> logits, std::vector<double>* out) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - max);
  const double log_sum = max + std::log(sum);
  out->resize(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) (*out)[i] = logits[i] - log_sum;
}

class Evaluation {
 public:
  // reference may be null.
  Evaluation(Model* model, Model* reference, const Tokenizer* tokenizer)
      : vocab_(model->config().vocab_size), model_(model), tokenizer_(*tokenizer) {
    if (reference != nullptr) reference_ = std::make_unique<Reader>(reference);
  }

  absl::Status Window(std::span<const int32_t> tokens);
  int64_t num_tokens() const { return num_tokens_; }
  // Members of a JSON object.
  std::string Describe() const;

 private:
  struct Drift {
    double kl = 0, largest_kl = 0;
    int64_t tokens = 0, same_choice = 0;
  };
  // late: the token lies in the last quarter of its window.
  void AddToken(std::span<const float> logits, std::span<const float> reference, int32_t next, bool late);
  std::string Describe(const Drift& drift) const;

  const size_t vocab_;
  Reader model_;
  std::unique_ptr<Reader> reference_;
  const Tokenizer& tokenizer_;
  double nats_ = 0, reference_nats_ = 0;
  int64_t num_tokens_ = 0, num_bytes_ = 0;
  Drift all_, late_;
  std::vector<double> log_probs_, reference_log_probs_;
};

absl::Status Evaluation::Window(std::span<const int32_t> tokens) {
  if (absl::Status begun = model_.Begin(); !begun.ok()) return begun;
  if (reference_ != nullptr) {
    if (absl::Status begun = reference_->Begin(); !begun.ok()) return begun;
  }
  for (size_t begin = 0; begin + 1 < tokens.size(); begin += kMaxTreeNodes) {
    const size_t count = std::min<size_t>(kMaxTreeNodes, tokens.size() - 1 - begin);
    const std::span<const int32_t> read = tokens.subspan(begin, count);
    auto logits = model_.Next(read);
    if (!logits.ok()) return logits.status();
    absl::StatusOr<std::span<const float>> reference = std::span<const float>();
    if (reference_ != nullptr) reference = reference_->Next(read);
    if (!reference.ok()) return reference.status();
    for (size_t i = 0; i < count; ++i) {
      AddToken(logits->subspan(i * vocab_, vocab_),
               reference_ == nullptr ? *reference : reference->subspan(i * vocab_, vocab_), tokens[begin + i + 1],
               begin + i >= tokens.size() * 3 / 4);
    }
  }
  return absl::OkStatus();
}

void Evaluation::AddToken(std::span<const float> logits, std::span<const float> reference, int32_t next, bool late) {
  LogSoftmax(logits, &log_probs_);
  nats_ -= log_probs_[next];
  num_bytes_ += static_cast<int64_t>(tokenizer_.TokenBytes(next).size());
  ++num_tokens_;
  if (reference.empty()) return;
  LogSoftmax(reference, &reference_log_probs_);
  reference_nats_ -= reference_log_probs_[next];
  double kl = 0;
  for (size_t i = 0; i < vocab_; ++i) {
    kl += std::exp(reference_log_probs_[i]) * (reference_log_probs_[i] - log_probs_[i]);
  }
  const auto choice = [](const std::vector<double>& p) { return std::max_element(p.begin(), p.end()) - p.begin(); };
  const bool same = choice(log_probs_) == choice(reference_log_probs_);
  for (Drift* drift : {&all_, &late_}) {
    if (drift == &late_ && !late) continue;
    drift->kl += kl;
    drift->largest_kl = std::max(drift->largest_kl, kl);
    drift->same_choice += same ? 1 : 0;
    ++drift->tokens;
  }
}

std::string Evaluation::Describe(const Drift& drift) const {
  const double tokens = std::max<double>(1, static_cast<double>(drift.tokens));
  return fmt::format("{{\"tokens\": {}, \"kl_nats\": {:.3e}, \"largest_kl_nats\": {:.3e}, \"same_choice\": {:.5f}}}",
                     drift.tokens, drift.kl / tokens, drift.largest_kl,
                     static_cast<double>(drift.same_choice) / tokens);
}

std::string Evaluation::Describe() const {
  const auto tokens = static_cast<double>(num_tokens_);
  std::string text =
      fmt::format("\"tokens\": {}, \"bytes\": {}, \"perplexity\": {:.4f}, \"bits_per_byte\": {:.5f}", num_tokens_,
                  num_bytes_, std::exp(nats_ / tokens), nats_ / std::log(2.0) / static_cast<double>(num_bytes_));
  if (reference_ == nullptr) return text;
  return text + fmt::format(", \"reference_perplexity\": {:.4f}, \"drift\": {}, \"drift_in_last_quarter\": {}",
                            std::exp(reference_nats_ / tokens), Describe(all_), Describe(late_));
}

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

absl::Status Eval(std::span<const std::string> args) {
  CommandFlags flags(args);
  const std::string path = flags.String("text", "");
  const int context_flag = flags.Int("context", 0, 0, 1 << 30);
  const int max_tokens = flags.Int("max-tokens", 1 << 30, 2, 1 << 30);
  const std::string reference_dtype = flags.String("reference-state-dtype", "");
  if (!flags.status().ok()) return flags.status();
  if (path.empty()) return absl::InvalidArgumentError("--text FILE is required");
  auto config = ParseServerConfig(flags.rest());
  if (!config.ok()) return config.status();
  auto text = ReadFile(path);
  if (!text.ok()) return text.status();
  auto files = LoadModelFiles(config->model);
  if (!files.ok()) return files.status();
  ModelFiles reference;
  if (!reference_dtype.empty()) {
    config->model.state_dtype = reference_dtype;
    auto loaded = LoadModelFiles(config->model);
    if (!loaded.ok()) return loaded.status();
    reference = *std::move(loaded);
  }
  auto tokens = files->tokenizer->Encode(*text, {.add_special_tokens = false, .parse_special = false});
  if (!tokens.ok()) return tokens.status();
  const int64_t trained_at = files->model->config().max_position_embeddings;
  const size_t context = context_flag > 0 ? context_flag : trained_at > 0 ? static_cast<size_t>(trained_at) : 1024;
  const size_t total = std::min<size_t>(tokens->size(), static_cast<size_t>(max_tokens));
  Evaluation evaluation(files->model.get(), reference.model.get(), files->tokenizer.get());
  const auto start = Clock::now();
  for (size_t begin = 0; begin + 1 < total; begin += context) {
    const auto window = std::span<const int32_t>(*tokens).subspan(begin, std::min(context, total - begin));
    if (absl::Status status = evaluation.Window(window); !status.ok()) return status;
  }
  if (evaluation.num_tokens() == 0) {
    return absl::InvalidArgumentError(fmt::format("--text: '{}' has less than two tokens", path));
  }
  fmt::print("{{\"model\": \"{}\", \"state_dtype\": \"{}\", \"context\": {}, {}, \"tokens_per_s\": {:.1f}}}\n",
             files->path, DTypeName(files->model->state_dtype()), context, evaluation.Describe(),
             static_cast<double>(evaluation.num_tokens()) / SecondsSince(start));
  return absl::OkStatus();
}

}  // namespace linspec
