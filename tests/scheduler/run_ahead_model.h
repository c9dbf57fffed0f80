// A fake model that chooses tokens and runs ahead of its results as a device does, and minds what it promises and is
// promised: who may call what while steps are under way, and how long results live.
#pragma once

#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "models/verify_batch.h"
#include "tests/scheduler/choosing_model.h"

namespace linspec {

class RunAheadModel final : public ChoosingModel {
 public:
  using ChoosingModel::ChoosingModel;
  ~RunAheadModel() override { EXPECT_TRUE(steps_.empty()) << "a step was never finished"; }
  bool CanRunAhead() const override { return true; }

  absl::Status Prefill(std::span<const PrefillChunk> chunks, StatePool* pool) override {
    EXPECT_TRUE(steps_.empty());
    if (Fails("prefill")) return Failure();
    return ChoosingModel::Prefill(chunks, pool);
  }

  absl::StatusOr<VerifyResult> Verify(const VerifyBatch& batch, const StatePool& pool) override {
    if (absl::Status started = StartVerify(batch, pool); !started.ok()) return started;
    return FinishVerify();
  }

  absl::Status StartVerify(const VerifyBatch& batch, const StatePool& pool) override {
    EXPECT_TRUE(steps_.empty());
    last_ = {};
    if (Fails("start")) return Failure();
    return Start(batch, pool);
  }

  absl::Status StartNext(StatePool* pool) override {
    EXPECT_EQ(steps_.size(), 1u);
    VerifyBatch batch = steps_.back().batch;
    EXPECT_EQ(batch.num_rows(), batch.num_requests());
    EXPECT_EQ(std::ssize(batch.sampling), batch.num_rows());
    EXPECT_FALSE(batch.want_logits || batch.want_hidden);
    if (Fails("next before its commit")) return Failure();
    const std::vector<std::vector<int32_t>> roots(batch.num_requests(), {0});
    EXPECT_TRUE(FakeModel::Commit(batch, roots, pool).ok());
    batch.Advance(steps_.back().sampled);
    if (Fails("next after its commit")) return Failure();
    ++num_ahead;
    last_ = {};
    return Start(batch, *pool);
  }

  absl::StatusOr<VerifyResult> FinishVerify() override {
    EXPECT_FALSE(steps_.empty());
    if (steps_.empty()) return Failure();
    last_ = std::move(steps_.front());
    steps_.pop_front();
    if (Fails("finish")) return Failure();
    return VerifyResult{.logits = last_.logits, .hidden = {}, .sampled = last_.sampled};
  }

  absl::Status Commit(const VerifyBatch& batch, std::span<const std::vector<int32_t>> paths, StatePool* pool) override {
    EXPECT_TRUE(steps_.empty());
    EXPECT_TRUE(SameBatch(batch, last_.batch));
    if (Fails("commit")) return Failure();
    return ChoosingModel::Commit(batch, paths, pool);
  }

  int num_ahead = 0, num_failures = 0;
  std::string fails;    // the call that will
  int fails_after = 0;  // so many of its kind

 private:
  struct Started {
    VerifyBatch batch;
    std::vector<float> logits;
    std::vector<int32_t> sampled;
  };

  absl::Status Start(const VerifyBatch& batch, const StatePool& pool) {
    absl::StatusOr<VerifyResult> result = ChoosingModel::Verify(batch, pool);
    if (!result.ok()) return result.status();
    steps_.push_back(
        {batch, {result->logits.begin(), result->logits.end()}, {result->sampled.begin(), result->sampled.end()}});
    return absl::OkStatus();
  }
  bool Fails(const std::string& call) {
    if (call != fails || --fails_after >= 0) return false;
    fails.clear();
    ++num_failures;
    return true;
  }
  static absl::Status Failure() { return absl::InternalError("broke"); }

  std::deque<Started> steps_;  // started and not finished: one, or two
  Started last_;               // finished; what it gave lives until the next call
};

}  // namespace linspec
