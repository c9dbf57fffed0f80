// A model without arithmetic: the logits of a node are a hash of every token before it, so a wrong commit, a missing
// rollback or a dirty slot changes the text. The hash lives in the slot, as a real state would.
#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "models/model.h"

namespace linspec {

inline uint64_t MixHash(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

class FakeModel : public Model {
 public:
  explicit FakeModel(int64_t vocab_size = 32, int eos = -1) {
    config_.hidden_size = 2;
    config_.num_layers = 1;
    config_.num_heads = config_.num_kv_heads = 1;
    config_.head_dim = 2;
    config_.vocab_size = vocab_size;
    config_.linear_attention.group_size = 2;
    if (eos >= 0) config_.eos_token_ids = {eos};
  }

  static uint64_t Extend(uint64_t hash, int32_t token) { return MixHash(hash + 0x9E3779B97F4A7C15 * (token + 1)); }
  void Logits(uint64_t hash, float* logits) const {
    for (int64_t v = 0; v < config_.vocab_size; ++v) {
      logits[v] = static_cast<float>(MixHash(hash + 77 * v + 1) >> 40) * 0x1p-24f * spread;
    }
  }

  const ModelConfig& config() const override { return config_; }
  int64_t weight_bytes() const override { return 0; }
  std::string Describe() const override { return "fake"; }
  bool prefills_as_it_decodes() const override { return same_bits; }
  absl::Status health() const override { return failed ? absl::InternalError("the device failed") : absl::OkStatus(); }

  absl::Status Prefill(std::span<const PrefillChunk> chunks, StatePool* pool) override {
    ++num_prefills;
    for (const PrefillChunk& chunk : chunks) {
      uint64_t hash = Load(chunk.slot, *pool);
      for (const int32_t token : chunk.tokens) hash = Extend(hash, token);
      Store(chunk.slot, hash, pool);
      pool->set_length(chunk.slot, pool->length(chunk.slot) + std::ssize(chunk.tokens));
    }
    return std::exchange(prefill_error, absl::OkStatus());
  }

  absl::StatusOr<VerifyResult> Verify(const VerifyBatch& batch, const StatePool& pool) override {
    ++num_verifies;
    if (!verify_error.ok()) return std::exchange(verify_error, absl::OkStatus());
    hashes_.resize(batch.num_rows());
    logits_.resize(batch.num_rows() * config_.vocab_size);
    hidden_.assign(batch.num_rows() * config_.hidden_size, 1.0f);
    for (int r = 0; r < batch.num_requests(); ++r) {
      const int begin = batch.row_starts[r];
      for (int row = begin; row < batch.row_starts[r + 1]; ++row) {
        const int parent = batch.parents[row];
        const uint64_t before = parent < 0 ? Load(batch.slots[r], pool) : hashes_[begin + parent];
        hashes_[row] = Extend(before, batch.tokens[row]);
        Logits(hashes_[row], &logits_[row * config_.vocab_size]);
        if (batch.tokens[row] == poison_token) logits_[row * config_.vocab_size] = NAN;
      }
    }
    last_rows_ = batch.num_rows();
    if (on_verify) on_verify();
    return VerifyResult{.logits = logits_, .hidden = hidden_, .sampled = {}};
  }

  absl::Status Commit(const VerifyBatch& batch, std::span<const std::vector<int32_t>> paths, StatePool* pool) override {
    EXPECT_EQ(batch.num_rows(), last_rows_);
    EXPECT_EQ(std::ssize(paths), batch.num_requests());
    for (int r = 0; r < batch.num_requests(); ++r) {
      int parent = -1;
      for (const int32_t node : paths[r]) {
        EXPECT_EQ(batch.parents[batch.row_starts[r] + node], parent);
        parent = node;
      }
      if (parent < 0) continue;
      Store(batch.slots[r], hashes_[batch.row_starts[r] + parent], pool);
      pool->set_length(batch.slots[r], pool->length(batch.slots[r]) + std::ssize(paths[r]));
    }
    return std::exchange(commit_error, absl::OkStatus());
  }

  float spread = 12;
  int32_t poison_token = -1;                               // a row of this token gets a NaN logit
  absl::Status prefill_error, verify_error, commit_error;  // of the next call
  std::function<void()> on_verify;
  int num_prefills = 0, num_verifies = 0;
  bool failed = false;
  bool same_bits = true;  // of prefill and decoding, says the model

 private:
  static uint64_t Load(int32_t slot, const StatePool& pool) {
    uint64_t hash;
    std::memcpy(&hash, pool.layer(slot, 0).s, sizeof(hash));
    return hash;
  }
  static void Store(int32_t slot, uint64_t hash, StatePool* pool) {
    std::memcpy(pool->layer(slot, 0).s, &hash, sizeof(hash));
  }

  ModelConfig config_;
  std::vector<uint64_t> hashes_;
  std::vector<float> logits_, hidden_;
  int last_rows_ = 0;
};

}  // namespace linspec
