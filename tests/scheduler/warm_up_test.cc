// What is made ready before the first request, and that it ends in time and within memory.
#include "scheduler/warm_up.h"

#include <gtest/gtest.h>

#include <map>
#include <set>
#include <utility>

#include "tests/scheduler/fake_drafters.h"
#include "tests/scheduler/fake_model.h"

namespace linspec {
namespace {

// Counts the steps of each size; each takes some of the device's memory.
class SlowAtFirstModel final : public FakeModel {
 public:
  std::vector<VerifySize> WarmUpSizes(int max_requests, int max_rows, int max_nodes) const override {
    return {{.requests = max_requests, .rows = max_rows, .largest_tree = max_nodes},
            {.requests = 1, .rows = 1, .largest_tree = 1},
            {.requests = 2, .rows = 3, .largest_tree = 2}};
  }
  int64_t free_device_bytes() const override { return free_bytes; }
  absl::StatusOr<VerifyResult> Verify(const VerifyBatch& batch, const StatePool& pool) override {
    int largest = 0;
    for (int r = 0; r < batch.num_requests(); ++r) {
      largest = std::max(largest, batch.row_starts[r + 1] - batch.row_starts[r]);
    }
    ++steps[{batch.num_requests(), batch.num_rows(), largest}];
    free_bytes -= bytes_of_a_step;
    return FakeModel::Verify(batch, pool);
  }

  bool CanRunAhead() const override { return ahead; }
  absl::Status StartNext(StatePool*) override {
    ++num_next;
    ++more_;
    return absl::OkStatus();
  }
  bool CanDraftWith(const DraftGuesser&, int64_t num_requests) const override { return num_requests <= 2; }
  absl::Status StartDrafted(const SelfDraft& draft, StatePool*) override {
    ++drafted[draft.num_levels];
    ++more_;
    return absl::OkStatus();
  }
  absl::StatusOr<VerifyResult> FinishVerify() override {
    if (std::exchange(more_, 0) > 0) return VerifyResult();
    return FakeModel::FinishVerify();
  }

  bool ahead = false;
  int num_next = 0;
  std::map<int, int> drafted;  // [levels]
  std::map<std::tuple<int, int, int>, int> steps;
  int64_t free_bytes = int64_t{1} << 30, bytes_of_a_step = 1000;

 private:
  int more_ = 0;
};

class RecordingDrafter final : public Drafter {
 public:
  std::string_view name() const override { return "recording"; }
  absl::StatusOr<std::vector<DraftTree>> Propose(std::span<const DraftContext> contexts) override {
    if (fails) return absl::InternalError("no");
    std::vector<DraftTree> trees;
    for (const DraftContext& context : contexts) {
      known.insert(context.sequence_id);
      trees.push_back(DraftTree::Root(context.tokens.back()));
      ++asked[{static_cast<int>(contexts.size()), context.max_levels}];
    }
    return trees;
  }
  void Forget(uint64_t sequence_id) override { known.erase(sequence_id); }
  DraftHeads heads() const override { return {guesser, 1, 2}; }

  DraftGuesser* guesser = nullptr;
  bool fails = false;
  std::set<uint64_t> known;
  std::map<std::pair<int, int>, int> asked;  // [contexts, levels]
};

class WarmUpTest : public testing::Test {
 protected:
  void SetUp() override {
    auto pool = model_.CreatePool(4);
    ASSERT_TRUE(pool.ok());
    pool_ = *std::move(pool);
    auto drafter = std::make_unique<RecordingDrafter>();
    drafter_ = drafter.get();
    drafters_.push_back(std::move(drafter));
    options_.max_requests = 4;
    options_.max_step_tokens = 12;
    options_.max_draft_nodes = 5;
  }
  WarmUpReport Run() {
    const auto report = WarmUp(&model_, pool_.get(), drafters_, options_);
    EXPECT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(pool_->num_free(), 4);
    EXPECT_TRUE(drafter_->known.empty());
    return *report;
  }

  SlowAtFirstModel model_;
  std::unique_ptr<StatePool> pool_;
  RecordingDrafter* drafter_ = nullptr;
  std::vector<std::unique_ptr<Drafter>> drafters_;
  EngineOptions options_;
};

TEST_F(WarmUpTest, EverySizeIsMetUntilItIsReady) {
  const WarmUpReport report = Run();
  EXPECT_EQ(model_.steps, (std::map<std::tuple<int, int, int>, int>{{{4, 12, 5}, 2}, {{1, 1, 1}, 2}, {{2, 3, 2}, 2}}));
  EXPECT_EQ(report.left_out, 0);
  EXPECT_EQ(report.bytes, 6000);
  EXPECT_EQ(report.sizes, 3 + 3 * 8);  // the drafter: 1, 2 and 4 contexts with 1 to 8 levels
  for (const int contexts : {1, 2, 4}) {
    for (int levels = 1; levels <= 8; ++levels) {
      EXPECT_GE((drafter_->asked[{contexts, levels}]), 2 * contexts)
          << contexts << " contexts, " << levels << " levels";
    }
  }
}

TEST_F(WarmUpTest, PlainSizesAreMetAheadToo) {
  model_.ahead = true;
  Run();
  EXPECT_EQ(model_.num_next, 2);
  EXPECT_FALSE(model_.FinishVerify().ok()) << "a step was not finished";
  options_.run_ahead = false;
  Run();
  EXPECT_EQ(model_.num_next, 2);
}

// For as many requests as the model takes with these heads, and levels as they have.
TEST_F(WarmUpTest, StepsThatTheModelDraftsAreMet) {
  FakeHeads heads;
  drafter_->guesser = &heads;
  Run();
  EXPECT_EQ(model_.drafted, (std::map<int, int>{{1, 2}, {2, 2}, {3, 2}, {4, 2}}));
  EXPECT_FALSE(model_.FinishVerify().ok()) << "a step was not finished";
  options_.run_ahead = false;
  Run();
  EXPECT_EQ(model_.drafted[1], 2);
}

TEST_F(WarmUpTest, NothingWithoutTime) {
  options_.warm_up_s = 0;
  EXPECT_EQ(Run().sizes, 0);
  EXPECT_TRUE(model_.steps.empty());
  EXPECT_TRUE(drafter_->asked.empty());
}

TEST_F(WarmUpTest, EndsWhereItsMemoryEnds) {
  model_.bytes_of_a_step = int64_t{150} << 20;
  const WarmUpReport report = Run();
  EXPECT_EQ(report.sizes, 1);
  EXPECT_EQ(report.left_out, 2 + 3 * 8);
}

TEST_F(WarmUpTest, EndsWhereTheDeviceIsFullAndFailsWithTheModel) {
  model_.verify_error = absl::ResourceExhaustedError("full");
  EXPECT_EQ(Run().sizes, 0);
  model_.verify_error = absl::InternalError("broken");
  EXPECT_EQ(WarmUp(&model_, pool_.get(), drafters_, options_).status().message(), "broken");
  EXPECT_EQ(pool_->num_free(), 4);
}

TEST_F(WarmUpTest, ADrafterThatFailsIsLeftOut) {
  drafter_->fails = true;
  const WarmUpReport report = Run();
  EXPECT_EQ(report.sizes, 3);
  EXPECT_EQ(report.left_out, 3 * 8);
}

}  // namespace
}  // namespace linspec
