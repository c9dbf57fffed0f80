// The parts of a server whose engine costs nothing: a model that keeps a fixed pace and always says which step it is
// at, so that a client on the same machine knows how old each token is.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "models/model.h"
#include "models/tokenizer.h"
#include "server/config.h"
#include "server/model_files.h"
#include "server/service.h"

namespace linspec::front_door {

inline constexpr int kVocab = 64;         // token i is the text " i", padded to kTokenBytes
inline constexpr size_t kTokenBytes = 5;  // about what a token of English has

inline int64_t NowNs() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

// Memory that the server's process shares with its client's.
struct SharedState {
  std::atomic<int> http_port = 0, grpc_port = 0;       // set once the server listens
  std::array<std::atomic<int64_t>, kVocab> step_ns{};  // when step i mod kVocab was ready to be delivered
  std::atomic<int64_t> close_ns = 0;                   // when the client dropped some of its streams; 0: none pending
  std::atomic<int> keep = 0;                           // how many it kept
  std::atomic<int> steps_to_free = -1;                 // steps that still worked for a dropped stream
  std::atomic<bool> stop = false;                      // the client is done
};

inline std::string TokenText(int step) {
  std::string text = " " + std::to_string(step % kVocab);
  text.resize(kTokenBytes, '.');
  return text;
}

class NullTokenizer : public Tokenizer {
 public:
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, EncodeOptions) const override {
    return std::vector<int32_t>(text.size() / kTokenBytes + 1, 0);
  }
  absl::StatusOr<std::string> Decode(std::span<const int32_t> ids, bool) const override {
    std::string text;
    for (const int32_t id : ids) text += TokenText(id);
    return text;
  }
  int64_t vocab_size() const override { return kVocab; }
  int32_t TokenToId(std::string_view) const override { return -1; }
  std::string IdToToken(int32_t id) const override { return TokenText(id); }
  std::string TokenBytes(int32_t id) const override { return TokenText(id); }
  bool IsSpecial(int32_t) const override { return false; }
  int leading_spaces_to_strip() const override { return 0; }
};

class NullModel : public Model {
 public:
  NullModel(std::chrono::microseconds pace, SharedState* shared) : pace_(pace), shared_(shared) {
    config_.hidden_size = 2;
    config_.num_layers = 1;
    config_.num_heads = config_.num_kv_heads = 1;
    config_.head_dim = 2;
    config_.vocab_size = kVocab;
    config_.linear_attention.group_size = 2;
  }

  const ModelConfig& config() const override { return config_; }
  int64_t weight_bytes() const override { return 0; }
  std::string Describe() const override { return "null engine"; }

  absl::Status Prefill(std::span<const PrefillChunk> chunks, StatePool* pool) override {
    for (const PrefillChunk& chunk : chunks) {
      pool->set_length(chunk.slot, pool->length(chunk.slot) + std::ssize(chunk.tokens));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<VerifyResult> Verify(const VerifyBatch& batch, const StatePool&) override {
    WatchDrops(batch.num_requests());
    if (pace_.count() > 0) {
      next_ = std::max(next_ + pace_, std::chrono::steady_clock::now());
      std::this_thread::sleep_until(next_);
    }
    const int token = static_cast<int>(step_++ % kVocab);
    logits_.assign(static_cast<size_t>(batch.num_rows()) * kVocab, 0.0f);
    for (int row = 0; row < batch.num_rows(); ++row) logits_[static_cast<size_t>(row) * kVocab + token] = 1.0f;
    last_token_ = token;
    VerifyResult result;
    result.logits = logits_;
    return result;
  }

  absl::Status Commit(const VerifyBatch& batch, std::span<const std::vector<int32_t>> paths, StatePool* pool) override {
    for (int r = 0; r < batch.num_requests(); ++r) {
      pool->set_length(batch.slots[r], pool->length(batch.slots[r]) + std::ssize(paths[r]));
    }
    shared_->step_ns[last_token_] = NowNs();  // delivery comes next
    return absl::OkStatus();
  }

 private:
  // Called as a step begins: counts those that begin after the client dropped streams and still hold one of them.
  void WatchDrops(int num_requests) {
    const int64_t closed = shared_->close_ns;
    if (closed == 0) return void(late_steps_ = 0);
    if (num_requests > shared_->keep) return void(++late_steps_);
    shared_->close_ns = 0;
    shared_->steps_to_free = late_steps_;
  }

  const std::chrono::microseconds pace_;
  SharedState* const shared_;
  ModelConfig config_;
  std::chrono::steady_clock::time_point next_{};
  int64_t step_ = 0;
  int last_token_ = 0, late_steps_ = 0;
  std::vector<float> logits_;
};

inline absl::StatusOr<Service::Parts> NullParts(const ServerConfig& config, std::chrono::microseconds pace,
                                                SharedState* shared, std::function<void(const StepStats&)> observer) {
  EngineOptions options = EngineOptionsOf(config);
  options.max_draft_nodes = 1;  // there are no drafters
  auto engine = Engine::Create(std::make_unique<NullModel>(pace, shared), {}, options, std::move(observer));
  if (!engine.ok()) return engine.status();
  Service::Parts parts;
  parts.engine = *std::move(engine);
  parts.tokenizer = std::make_unique<NullTokenizer>();
  parts.model_name = "null";
  return parts;
}

}  // namespace linspec::front_door
