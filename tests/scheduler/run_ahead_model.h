// A fake model that chooses tokens and runs ahead of its results as a device does, and minds what it promises and is
// promised: who may call what while steps are under way, and how long results live.
#pragma once

#include <deque>
#include <random>
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

  bool CanDraftWith(const DraftGuesser&, int64_t) const override { return true; }

  absl::Status StartDrafted(const SelfDraft& draft, StatePool* pool) override {
    EXPECT_EQ(steps_.size(), 1u);
    const Started& before = steps_.back();
    EXPECT_EQ(std::ssize(before.batch.sampling), before.batch.num_rows());
    EXPECT_FALSE(before.batch.want_logits || before.batch.want_hidden);
    if (Fails("drafted before its commit")) return Failure();
    accepted_.clear();
    for (int r = 0; r < before.batch.num_requests(); ++r) accepted_.push_back(PathOf(before, r));
    EXPECT_TRUE(FakeModel::Commit(before.batch, accepted_, pool).ok());
    Started next{.batch = Drafted(before, draft), .logits = {}, .sampled = {}, .drafted = true};
    if (Fails("drafted after its commit")) return Failure();
    ++num_drafted_ahead;
    last_ = {};
    return Start(std::move(next), *pool);
  }

  absl::StatusOr<VerifyResult> FinishVerify() override {
    EXPECT_FALSE(steps_.empty());
    if (steps_.empty()) return Failure();
    last_ = std::move(steps_.front());
    steps_.pop_front();
    if (Fails("finish")) return Failure();
    trees_.clear();
    for (int r = 0; last_.drafted && r < last_.batch.num_requests(); ++r) trees_.push_back(TreeOf(last_.batch, r));
    return VerifyResult{
        .logits = last_.logits, .hidden = {}, .sampled = last_.sampled, .trees = trees_, .drafts = trees_};
  }

  absl::Status Commit(const VerifyBatch& batch, std::span<const std::vector<int32_t>> paths, StatePool* pool) override {
    EXPECT_TRUE(SameBatch(batch, last_.batch));
    if (Fails("commit")) return Failure();
    if (!steps_.empty()) {
      EXPECT_TRUE(steps_.back().drafted);
      for (size_t r = 0; r < paths.size(); ++r) EXPECT_TRUE(paths[r].empty() || paths[r] == accepted_[r]);
      return absl::OkStatus();
    }
    return ChoosingModel::Commit(batch, paths, pool);
  }

  int num_ahead = 0, num_drafted_ahead = 0, num_failures = 0;
  std::string fails;    // the call that will
  int fails_after = 0;  // so many of its kind

 private:
  struct Started {
    VerifyBatch batch;
    std::vector<float> logits;
    std::vector<int32_t> sampled;
    bool drafted = false;  // by the model
  };

  static DraftTree TreeOf(const VerifyBatch& batch, int request) {
    const auto part = [&](const std::vector<int32_t>& rows) {
      return std::vector<int32_t>(rows.begin() + batch.row_starts[request],
                                  rows.begin() + batch.row_starts[request + 1]);
    };
    return {part(batch.tokens), part(batch.parents)};
  }

  static std::vector<int32_t> PathOf(const Started& step, int request) {
    const DraftTree tree = TreeOf(step.batch, request);
    std::vector<int32_t> path;
    for (int node = 0; node >= 0;) {
      path.push_back(node);
      node = tree.FindChild(node, step.sampled[step.batch.row_starts[request] + node]);
    }
    return path;
  }

  // Random trees behind what was accepted; all rows are chosen as a request's first one was.
  VerifyBatch Drafted(const Started& before, const SelfDraft& draft) {
    VerifyBatch batch;
    batch.want_logits = batch.want_hidden = false;
    batch.edits = before.batch.edits;
    int left = draft.num_rows - before.batch.num_requests();
    EXPECT_GE(left, 0);
    for (int r = 0; r < before.batch.num_requests(); ++r) {
      const int32_t first = before.batch.row_starts[r], last = first + accepted_[r].back();
      DraftTree tree = DraftTree::Root(std::max(before.sampled[last], 0));
      const int nodes = static_cast<int>(random_() % std::min(draft.max_nodes, left + 1));
      for (int i = 0; i < nodes; ++i, --left) {
        tree.Add(static_cast<int32_t>(random_() % config().vocab_size), static_cast<int>(random_() % tree.num_nodes()));
      }
      batch.Add(before.batch.slots[r], tree);
      for (const int depth : tree.Depths()) {
        batch.sampling.push_back(before.batch.sampling[first]);
        batch.sampling.back().position += std::ssize(accepted_[r]) + depth;
      }
    }
    return batch;
  }

  absl::Status Start(const VerifyBatch& batch, const StatePool& pool) {
    return Start(Started{.batch = batch, .logits = {}, .sampled = {}}, pool);
  }
  absl::Status Start(Started step, const StatePool& pool) {
    absl::StatusOr<VerifyResult> result = ChoosingModel::Verify(step.batch, pool);
    if (!result.ok()) return result.status();
    step.logits.assign(result->logits.begin(), result->logits.end());
    step.sampled.assign(result->sampled.begin(), result->sampled.end());
    steps_.push_back(std::move(step));
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
  std::vector<DraftTree> trees_;
  std::vector<std::vector<int32_t>> accepted_;  // of the step that was followed last
  std::mt19937 random_{7};
};

}  // namespace linspec
