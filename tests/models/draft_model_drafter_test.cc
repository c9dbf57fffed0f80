// The draft model proposes what it would itself say next, keeps only committed tokens in its state, and never draws a
// tree that the engine would refuse.
#include "models/draft_model_drafter.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "models/sampler.h"
#include "tests/models/model_test_util.h"

namespace linspec {
namespace {

using ::absl::StatusCode;

std::unique_ptr<Model> DraftModel() {
  return *BuildRandomModel(TinyConfig(), 5, {.weight_dtype = "f32", .num_threads = 1, .isa = "scalar"});
}

class DraftModelDrafterTest : public ::testing::Test {
 protected:
  void Make(DraftModelOptions options) {
    auto drafter = DraftModelDrafter::Create(DraftModel(), TinyConfig().vocab_size, options);
    ASSERT_TRUE(drafter.ok()) << std::string(drafter.status().ToString());
    drafter_ = *std::move(drafter);
  }

  DraftContext Context(uint64_t id, const std::vector<int32_t>& tokens, int max_nodes) const {
    return {.sequence_id = id,
            .tokens = tokens,
            .num_prompt_tokens = 1,
            .sampling = &sampling_,
            .hidden = {},
            .max_nodes = max_nodes};
  }

  DraftTree Propose(uint64_t id, const std::vector<int32_t>& tokens, int max_nodes) {
    const std::vector<DraftContext> contexts = {Context(id, tokens, max_nodes)};
    const auto trees = drafter_->Propose(contexts);
    EXPECT_TRUE(trees.ok()) << std::string(trees.status().ToString());
    EXPECT_EQ(trees->size(), 1u);
    EXPECT_TRUE(trees->front().Validate(TinyConfig().vocab_size).ok());
    EXPECT_LE(trees->front().num_nodes(), max_nodes);
    EXPECT_EQ(trees->front().tokens[0], tokens.back());
    return trees->front();
  }

  // What the draft model says after tokens, one token at a time and from an empty state.
  std::vector<int32_t> Continuation(std::vector<int32_t> tokens, int count) const {
    const auto model = DraftModel();
    const auto pool = *StatePool::Create(TinyConfig(), 1);
    const StateSlot slot = pool->Acquire();
    std::vector<float> logits = Sequential(*model, *pool, slot.id(), tokens).back();
    std::vector<int32_t> said;
    for (int i = 0; i < count; ++i) {
      said.push_back(
          CoupledTopK(logits, sampling_, static_cast<int64_t>(tokens.size() + said.size()), 1).front().token);
      logits = Sequential(*model, *pool, slot.id(), {said.back()}).back();
    }
    return said;
  }

  static std::vector<int32_t> ChainTokens(const DraftTree& tree) {
    for (int node = 1; node < tree.num_nodes(); ++node) EXPECT_EQ(tree.parents[node], node - 1);
    return {tree.tokens.begin() + 1, tree.tokens.end()};
  }

  SamplingParams sampling_ = [] {
    SamplingParams sampling;
    sampling.temperature = 0;
    return sampling;
  }();
  std::unique_ptr<DraftModelDrafter> drafter_;
};

TEST_F(DraftModelDrafterTest, ChainIsItsOwnGreedyContinuationWhateverWasAccepted) {
  Make({.max_depth = 5, .min_confidence = 0});
  std::vector<int32_t> tokens = RandomTokens(13, 96, 1);
  std::mt19937 random(2);
  for (int step = 0; step < 40; ++step) {
    const std::vector<int32_t> expected = Continuation(tokens, 5);
    ASSERT_EQ(ChainTokens(Propose(1, tokens, 8)), expected) << "step " << step;
    // The target accepts the first few and then says something else, or has one more to say.
    tokens.insert(tokens.end(), expected.begin(), expected.begin() + random() % 6);
    tokens.push_back(static_cast<int32_t>(random() % 96));
  }
}

TEST_F(DraftModelDrafterTest, SampledChainUsesTheNoiseOfThePosition) {
  sampling_.temperature = 1.0f;
  sampling_.seed = 77;
  Make({.max_depth = 3, .min_confidence = 0});
  std::vector<int32_t> tokens = RandomTokens(9, 96, 3);
  for (int step = 0; step < 10; ++step) {
    const std::vector<int32_t> expected = Continuation(tokens, 3);
    ASSERT_EQ(ChainTokens(Propose(1, tokens, 4)), expected);
    tokens.insert(tokens.end(), expected.begin(), expected.begin() + step % 3);
    tokens.push_back(step);
  }
}

TEST_F(DraftModelDrafterTest, SequencesInOneCallDoNotDisturbEachOther) {
  Make({.max_depth = 3, .min_confidence = 0});
  std::vector<std::vector<int32_t>> texts;
  for (int i = 0; i < 4; ++i) texts.push_back(RandomTokens(3 + 7 * i, 96, 10 + i));
  for (int step = 0; step < 12; ++step) {
    std::vector<DraftContext> contexts;
    for (int i = 0; i < 4; ++i) {
      if ((step + i) % 3 != 0) contexts.push_back(Context(i, texts[i], 1 + (step + i) % 5));  // some sit out
    }
    const auto trees = drafter_->Propose(contexts);
    ASSERT_TRUE(trees.ok());
    for (size_t c = 0; c < contexts.size(); ++c) {
      const int count = std::min(contexts[c].max_nodes - 1, 3);
      std::vector<int32_t>& text = texts[contexts[c].sequence_id];
      const std::vector<int32_t> expected = Continuation(text, count);
      ASSERT_EQ(ChainTokens((*trees)[c]), expected);
      text.insert(text.end(), expected.begin(), expected.begin() + std::min(step % 3, count));
      text.push_back(step);
    }
  }
}

TEST_F(DraftModelDrafterTest, TreeHoldsTheGreedyChainAndKeepsToItsBudget) {
  Make({.max_depth = 4, .top_k = 3, .min_confidence = 0});
  std::vector<int32_t> tokens = RandomTokens(20, 96, 4);
  for (const int max_nodes : {2, 3, 5, 8, 13, 16, 64}) {
    const DraftTree tree = Propose(1, tokens, max_nodes);
    EXPECT_GT(tree.num_nodes(), 1);
    const std::vector<int> depths = tree.Depths();
    EXPECT_LE(*std::max_element(depths.begin(), depths.end()), 4);
    EXPECT_GE(tree.FindChild(0, Continuation(tokens, 1)[0]), 1) << "the likeliest child is always in";
    for (int node = 0; node < tree.num_nodes(); ++node) {
      EXPECT_LE(std::count(tree.parents.begin(), tree.parents.end(), node), 3);
      for (int other = 1; other < node; ++other) {
        EXPECT_FALSE(tree.parents[other] == tree.parents[node] && tree.tokens[other] == tree.tokens[node]);
      }
    }
    tokens.push_back(tree.tokens.back());
    tokens.push_back(max_nodes);
  }
}

TEST_F(DraftModelDrafterTest, AcceptedBranchesOfATreeAreCommittedByPath) {
  const DraftModelOptions options{.max_depth = 3, .top_k = 2, .min_confidence = 0};
  Make(options);
  std::vector<int32_t> tokens = RandomTokens(7, 96, 5);
  std::mt19937 random(6);
  for (int step = 0; step < 25; ++step) {
    const DraftTree tree = Propose(1, tokens, 10);
    // A fresh drafter that has only the text proposes the same.
    const auto other = *DraftModelDrafter::Create(DraftModel(), 96, options);
    const std::vector<DraftContext> contexts = {Context(9, tokens, 10)};
    const DraftTree fresh = other->Propose(contexts)->front();
    ASSERT_EQ(tree.tokens, fresh.tokens) << "step " << step;
    ASSERT_EQ(tree.parents, fresh.parents);
    std::vector<int32_t> path;
    for (int node = static_cast<int>(random() % tree.num_nodes()); node > 0; node = tree.parents[node]) {
      path.push_back(tree.tokens[node]);
    }
    tokens.insert(tokens.end(), path.rbegin(), path.rend());
    tokens.push_back(static_cast<int32_t>(random() % 96));
  }
}

TEST_F(DraftModelDrafterTest, StateHoldsWhatWasAcceptedAndNothingElse) {
  Make({.max_depth = 4, .min_confidence = 0});
  std::vector<int32_t> tokens = RandomTokens(6, 96, 11);
  Propose(1, tokens, 5);
  const int32_t slot = 0;  // the first one a pool gives
  for (int step = 0; step < 15; ++step) {
    const int64_t drafted_on = static_cast<int64_t>(tokens.size());
    const std::vector<int32_t> drafted = ChainTokens(Propose(1, tokens, 5));
    const int accepted = step % 5;
    tokens.insert(tokens.end(), drafted.begin(), drafted.begin() + accepted);
    tokens.push_back(drafted[accepted % 4] == 50 ? 51 : 50);  // not the drafted one
    Propose(1, tokens, 5);
    // The token pending then, and the accepted ones: all but the last of a full chain, which was never looked at.
    EXPECT_EQ(drafter_->pool().length(slot), drafted_on + std::min(accepted, 3));
  }
}

TEST_F(DraftModelDrafterTest, StopsWhereItIsUnsure) {
  Make({.min_confidence = 1.0f});
  EXPECT_EQ(Propose(1, RandomTokens(9, 96, 7), 8).num_nodes(), 1);
}

TEST_F(DraftModelDrafterTest, NoSlotOrNoBudgetMeansNoDraft) {
  Make({.max_sequences = 1, .min_confidence = 0});
  const std::vector<int32_t> tokens = RandomTokens(9, 96, 8);
  EXPECT_EQ(Propose(1, tokens, 1).num_nodes(), 1);
  EXPECT_EQ(drafter_->pool().num_free(), 1) << "a sequence that does not draft holds no slot";
  EXPECT_GT(Propose(2, tokens, 4).num_nodes(), 1);
  EXPECT_EQ(Propose(3, tokens, 4).num_nodes(), 1) << "the pool is full";
  drafter_->Forget(2);
  drafter_->Forget(2);
  EXPECT_EQ(drafter_->pool().num_free(), drafter_->pool().capacity());
  EXPECT_EQ(ChainTokens(Propose(3, tokens, 4)), Continuation(tokens, 3)) << "in the slot that sequence 2 had";
}

TEST_F(DraftModelDrafterTest, LongPromptsAreCaughtUpOverSeveralCalls) {
  Make({.max_depth = 2, .min_confidence = 0, .max_catch_up_tokens = 10});
  const std::vector<int32_t> tokens = RandomTokens(35, 96, 9);
  for (int call = 1; call <= 2; ++call) EXPECT_EQ(Propose(1, tokens, 4).num_nodes(), 1) << "call " << call;
  EXPECT_EQ(ChainTokens(Propose(1, tokens, 4)), Continuation(tokens, 2));
}

TEST_F(DraftModelDrafterTest, CreateErrors) {
  const auto error = [](int64_t vocab, DraftModelOptions options, const char* part) {
    ExpectError(DraftModelDrafter::Create(DraftModel(), vocab, options).status(), StatusCode::kInvalidArgument, part);
  };
  error(95, {}, "vocabulary of 96, the target of 95");
  error(96, {.max_depth = 0}, "max_depth 0");
  error(96, {.top_k = 64}, "top_k 64");
  error(96, {.min_confidence = 1.5f}, "min_confidence 1.5");
  error(96, {.max_sequences = 0}, "0 slots");
}

}  // namespace
}  // namespace linspec
