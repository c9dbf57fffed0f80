// Drafters are told which row of the model's last Verify holds the hidden state they start from.
#include <memory>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "models/ngram_drafter.h"
#include "tests/scheduler/fake_model.h"
#include "tests/scheduler/test_engine.h"

namespace linspec {
namespace {

constexpr int64_t kVocab = 32;

// Keeps the tokens of the last verified rows.
class RowKeepingModel final : public FakeModel {
 public:
  using FakeModel::FakeModel;
  absl::StatusOr<VerifyResult> Verify(const VerifyBatch& batch, const StatePool& pool) override {
    rows = batch.tokens;
    return FakeModel::Verify(batch, pool);
  }
  std::vector<int32_t> rows;
};

// Drafts as the n-gram drafter does, and looks whether the row it is given was computed for the last committed token.
class RowChecker final : public Drafter {
 public:
  explicit RowChecker(const RowKeepingModel* model) : model_(model) {}
  std::string_view name() const override { return "ngram"; }
  void Forget(uint64_t sequence_id) override { ngrams_.Forget(sequence_id); }
  absl::StatusOr<std::vector<DraftTree>> Propose(std::span<const DraftContext> contexts) override {
    for (const DraftContext& context : contexts) {
      if (context.hidden_row < 0) {
        ++num_without;
        continue;
      }
      ++num_with;
      CheckRow(context);
    }
    return ngrams_.Propose(contexts);
  }
  int num_with = 0, num_without = 0;

 private:
  void CheckRow(const DraftContext& context) const {
    ASSERT_LT(context.hidden_row, std::ssize(model_->rows));
    EXPECT_EQ(model_->rows[context.hidden_row], context.tokens[context.tokens.size() - 2]);
  }
  const RowKeepingModel* model_;
  NgramDrafter ngrams_;
};

TEST(HiddenRow, IsThatOfTheLastCommittedToken) {
  auto model = std::make_unique<RowKeepingModel>(kVocab);
  auto checker = std::make_unique<RowChecker>(model.get());
  RowChecker* watched = checker.get();
  std::vector<std::unique_ptr<Drafter>> drafters;
  drafters.push_back(std::move(checker));
  TestEngine engine(TestEngine::StaticOptions(), std::move(drafters), std::move(model));
  for (uint64_t id = 1; id <= 4; ++id) {
    const auto token = static_cast<int32_t>(id);
    ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(id, {1, token, 3, 1, token}, 60, /*temperature=*/0.7f)).ok());
  }
  engine.RunAll();
  EXPECT_GT(watched->num_with, 100);
  EXPECT_EQ(watched->num_without, 4);  // before the first step of each
}

}  // namespace
}  // namespace linspec
