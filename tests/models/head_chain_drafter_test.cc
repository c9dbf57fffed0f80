// The chain follows the best guesses, siblings fill the budget, and the number of levels follows what was of use.
#include "models/head_chain_drafter.h"

#include <vector>

#include "gtest/gtest.h"
#include "tests/models/model_test_util.h"

namespace linspec {
namespace {

// At every level the tokens 10 * level, 10 * level + 1, ... with the probabilities given; keeps what it was asked.
class FakeGuesser final : public DraftGuesser {
 public:
  explicit FakeGuesser(std::vector<float> probabilities) : probabilities_(std::move(probabilities)) {}
  int max_levels() const override { return 5; }
  int max_top_k() const override { return 8; }
  bool reads_hidden() const override { return false; }
  bool CanGuess(const DraftContext& context) const override { return context.hidden_row >= 0; }
  absl::StatusOr<DraftGuesses> Guess(std::span<const DraftContext* const> contexts, int num_levels,
                                     int top_k) override {
    asked_levels.push_back(num_levels);
    asked_rows.clear();
    DraftGuesses guesses{num_levels, top_k, {}};
    guesses.candidates.resize(contexts.size() * num_levels * top_k, {.token = -1, .probability = 0});
    for (size_t c = 0; c < contexts.size(); ++c) {
      asked_rows.push_back(contexts[c]->hidden_row);
      for (int level = 0; level < num_levels; ++level) {
        for (int i = 0; i < std::min<int>(top_k, static_cast<int>(probabilities_.size())); ++i) {
          guesses.Slots(c, level)[i] = {10 * level + i, probabilities_[i]};
        }
      }
    }
    return guesses;
  }
  std::vector<int> asked_levels, asked_rows;

 private:
  const std::vector<float> probabilities_;
};

class HeadChainDrafterTest : public ::testing::Test {
 protected:
  void Make(std::vector<float> probabilities, HeadChainOptions options) {
    auto guesser = std::make_unique<FakeGuesser>(std::move(probabilities));
    guesser_ = guesser.get();
    drafter_ = *HeadChainDrafter::Create("recurrent", std::move(guesser), options);
  }
  DraftContext Context(int max_nodes, int hidden_row = 3) const {
    return {.sequence_id = 1,
            .tokens = tokens_,
            .num_prompt_tokens = 1,
            .sampling = &sampling_,
            .hidden = {},
            .hidden_row = hidden_row,
            .max_nodes = max_nodes};
  }
  DraftTree Propose(const DraftContext& context) {
    const auto trees = *drafter_->Propose({&context, 1});
    EXPECT_TRUE(trees[0].Validate(100).ok());
    return trees[0];
  }
  std::vector<int32_t> tokens_ = {7, 8};
  SamplingParams sampling_;
  FakeGuesser* guesser_ = nullptr;
  std::unique_ptr<HeadChainDrafter> drafter_;
};

TEST_F(HeadChainDrafterTest, AChainWhenTheHeadIsSure) {
  Make({0.9f, 0.05f}, {.max_depth = 3, .top_k = 2});
  const DraftTree tree = Propose(Context(4));
  EXPECT_EQ(tree.tokens, (std::vector<int32_t>{8, 0, 10, 20}));
  EXPECT_EQ(tree.parents, (std::vector<int32_t>{-1, 0, 1, 2}));
  EXPECT_FLOAT_EQ(tree.probabilities[3], 0.9f * 0.9f * 0.9f);
}

TEST_F(HeadChainDrafterTest, SiblingsWhenItIsNot) {
  Make({0.4f, 0.3f, 0.2f}, {.max_depth = 3, .top_k = 3});
  const DraftTree tree = Propose(Context(5));
  // 0.4, 0.3, 0.2, then 0.16 below the first.
  EXPECT_EQ(tree.tokens, (std::vector<int32_t>{8, 0, 1, 2, 10}));
  EXPECT_EQ(tree.parents, (std::vector<int32_t>{-1, 0, 0, 0, 1}));
}

TEST_F(HeadChainDrafterTest, UnlikelyPathsAreLeftOut) {
  Make({0.5f, 0.3f}, {.max_depth = 5, .top_k = 2});
  DraftContext context = Context(40);
  context.min_probability = 0.2f;
  const DraftTree tree = Propose(context);
  for (const float probability : tree.probabilities) EXPECT_GE(probability, 0.2f);
  EXPECT_EQ(tree.num_nodes(), 4);  // 0.5 and 0.3, and below the first 0.25
}

TEST_F(HeadChainDrafterTest, AsksForOneLevelMoreThanWasOfUse) {
  Make({0.5f}, {.max_depth = 4, .top_k = 1});
  DraftContext context = Context(40);
  context.min_probability = 0.2f;  // two levels
  Propose(context);
  Propose(context);
  context.min_probability = 0.0f;
  Propose(context);
  Propose(context);
  EXPECT_EQ(guesser_->asked_levels, (std::vector<int>{4, 3, 3, 4}));
}

TEST_F(HeadChainDrafterTest, SequencesWithoutAHiddenStateSitOut) {
  Make({0.9f}, {.max_depth = 2, .top_k = 1});
  const std::vector<DraftContext> contexts = {Context(4, -1), Context(4, 9), Context(1, 2), Context(3, 5)};
  const auto trees = *drafter_->Propose(contexts);
  EXPECT_EQ(trees[0].num_nodes(), 1);
  EXPECT_EQ(trees[1].num_nodes(), 3);
  EXPECT_EQ(trees[2].num_nodes(), 1);
  EXPECT_EQ(trees[3].num_nodes(), 3);
  EXPECT_EQ(guesser_->asked_rows, (std::vector<int>{9, 5}));
}

TEST_F(HeadChainDrafterTest, NothingToSayIsARoot) {
  Make({}, {.max_depth = 2, .top_k = 1});
  EXPECT_EQ(Propose(Context(4)).num_nodes(), 1);
}

TEST_F(HeadChainDrafterTest, OptionsAreChecked) {
  for (const HeadChainOptions options : {HeadChainOptions{.max_depth = 0}, {.top_k = 0}, {.top_k = 9}}) {
    const auto status =
        HeadChainDrafter::Create("recurrent", std::make_unique<FakeGuesser>(std::vector<float>{}), options).status();
    ExpectError(status, absl::StatusCode::kInvalidArgument, "recurrent options out of range");
  }
}

}  // namespace
}  // namespace linspec
