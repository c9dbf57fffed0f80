// A drafter that asks its model for whole chains proposes the trees, and keeps the state, of one that asks level by
// level.
#include "models/draft_chains.h"

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "models/draft_model_drafter.h"
#include "tests/models/model_test_util.h"

namespace linspec {
namespace {

std::unique_ptr<Model> DraftModel() {
  return *BuildRandomModel(TinyConfig(), 5, {.weight_dtype = "f32", .num_threads = 1, .isa = "scalar"});
}

// Chains by the model's own Verify and Extend.
class HostChains final : public DraftChains {
 public:
  explicit HostChains(Model* model) : model_(model) {}
  int max_levels() const override { return 16; }
  int max_top_k() const override { return 8; }

  absl::StatusOr<DraftGuesses> Guess(const VerifyBatch& known, const StatePool& pool,
                                     std::span<const DraftContext* const> contexts, int num_levels,
                                     int top_k) override {
    asked_.push_back(num_levels);
    DraftGuesses guesses{num_levels, top_k, {}};
    guesses.candidates.resize(contexts.size() * num_levels * top_k, {-1, 0});
    const size_t vocab = model_->config().vocab_size;
    for (int level = 0; level < num_levels; ++level) {
      DraftGuesses above{level + 1, top_k, {}};
      above.candidates.resize(contexts.size() * above.num_levels * top_k);
      for (size_t r = 0; r < contexts.size(); ++r) {
        for (int l = 0; l < level; ++l) std::ranges::copy(guesses.Slots(r, l), above.Slots(r, l).begin());
      }
      const VerifyBatch batch = LookedAt(known, above);
      const auto result = level == 0 ? model_->Verify(batch, pool) : model_->Extend(batch, pool);
      if (!result.ok()) return result.status();
      for (size_t r = 0; r < contexts.size(); ++r) {
        const size_t row = level == 0 ? known.row_starts[r + 1] - 1 : r;
        const DraftContext& context = *contexts[r];
        std::ranges::copy(LikelyChoices(result->logits.subspan(row * vocab, vocab), *context.sampling,
                                        std::ssize(context.tokens) + level, top_k, context.draw == DraftDraw::kCoupled),
                          guesses.Slots(r, level).begin());
      }
    }
    return guesses;
  }
  absl::Status Commit(const VerifyBatch& looked_at, std::span<const std::vector<int32_t>> paths,
                      StatePool* pool) override {
    return model_->Commit(looked_at, paths, pool);
  }
  const std::vector<int>& asked() const { return asked_; }  // levels, call by call

 private:
  Model* model_;
  std::vector<int> asked_;
};

class DraftChainsTest : public ::testing::Test {
 protected:
  void Make(DraftModelOptions options) {
    auto model = DraftModel();
    auto chains = std::make_unique<HostChains>(model.get());
    chains_ = chains.get();
    chained_ = *DraftModelDrafter::Create(std::move(model), TinyConfig().vocab_size, options, std::move(chains));
    options.top_k = 1;
    plain_ = *DraftModelDrafter::Create(DraftModel(), TinyConfig().vocab_size, options);
  }

  std::vector<DraftContext> Contexts(int max_nodes, DraftDraw draw = DraftDraw::kCoupled) {
    std::vector<DraftContext> contexts;
    for (size_t i = 0; i < texts_.size(); ++i) {
      contexts.push_back({.sequence_id = i,
                          .tokens = texts_[i],
                          .num_prompt_tokens = 1,
                          .sampling = &sampling_[i],
                          .hidden = {},
                          .max_nodes = max_nodes,
                          .draw = draw});
    }
    return contexts;
  }

  // The target takes some of what was drafted and says something else.
  void Continue(const std::vector<DraftTree>& trees, std::mt19937* random) {
    for (size_t i = 0; i < texts_.size(); ++i) {
      const int taken = static_cast<int>((*random)() % trees[i].num_nodes());
      int node = 0;
      for (int depth = 0; depth < taken; ++depth) {
        const auto child = std::find(trees[i].parents.begin() + node + 1, trees[i].parents.end(), node);
        if (child == trees[i].parents.end()) break;
        node = static_cast<int>(child - trees[i].parents.begin());
        texts_[i].push_back(trees[i].tokens[node]);
      }
      texts_[i].push_back(static_cast<int32_t>((*random)() % 96));
    }
  }

  void SetUp() override {
    for (int i = 0; i < 3; ++i) {
      texts_.push_back(RandomTokens(9 + 11 * i, 96, 40 + i));
      sampling_.push_back({});
      sampling_.back().temperature = static_cast<float>(i) * 0.5f;
      sampling_.back().seed = i;
    }
  }

  std::vector<std::vector<int32_t>> texts_;
  std::vector<SamplingParams> sampling_;
  HostChains* chains_ = nullptr;
  std::unique_ptr<DraftModelDrafter> chained_, plain_;
};

TEST_F(DraftChainsTest, SameChainsAsLevelByLevel) {
  Make({.max_depth = 4, .min_confidence = 0});
  std::mt19937 random(3);
  for (int step = 0; step < 60; ++step) {
    const std::vector<DraftContext> contexts = Contexts(/*max_nodes=*/5);
    const auto chained = chained_->Propose(contexts), plain = plain_->Propose(contexts);
    ASSERT_TRUE(chained.ok() && plain.ok());
    for (size_t i = 0; i < texts_.size(); ++i) {
      ASSERT_EQ((*chained)[i].tokens, (*plain)[i].tokens) << "step " << step << ", request " << i;
      ASSERT_EQ((*chained)[i].probabilities, (*plain)[i].probabilities);
    }
    Continue(*chained, &random);
  }
}

TEST_F(DraftChainsTest, SiblingsBesideTheChain) {
  Make({.max_depth = 3, .top_k = 4, .min_confidence = 0});
  std::mt19937 random(5);
  for (int step = 0; step < 20; ++step) {
    const std::vector<DraftContext> contexts = Contexts(/*max_nodes=*/20);
    const auto trees = chained_->Propose(contexts), chains = plain_->Propose(contexts);
    ASSERT_TRUE(trees.ok() && chains.ok());
    for (size_t i = 0; i < texts_.size(); ++i) {
      const DraftTree& tree = (*trees)[i];
      ASSERT_TRUE(tree.Validate(96).ok());
      ASSERT_EQ(tree.num_nodes(), 1 + 3 * 4);
      int node = 0;
      for (const int32_t token : std::span((*chains)[i].tokens).subspan(1)) {
        ASSERT_GE(node = tree.FindChild(node, token), 0) << "step " << step << ", request " << i;
      }
    }
    Continue(*trees, &random);
  }
}

TEST_F(DraftChainsTest, AsksForOneLevelMoreThanWasOfUse) {
  Make({.max_depth = 4, .min_confidence = 0});
  std::vector<DraftContext> contexts = Contexts(/*max_nodes=*/8);
  ASSERT_TRUE(chained_->Propose(contexts).ok());
  for (DraftContext& context : contexts) context.min_probability = 0.999f;  // nothing is that sure
  ASSERT_TRUE(chained_->Propose(contexts).ok());
  ASSERT_TRUE(chained_->Propose(contexts).ok());
  for (DraftContext& context : contexts) context.min_probability = 0;
  ASSERT_TRUE(chained_->Propose(contexts).ok());
  ASSERT_TRUE(chained_->Propose(contexts).ok());
  for (DraftContext& context : contexts) context.max_nodes = 3;  // room for two
  ASSERT_TRUE(chained_->Propose(contexts).ok());
  EXPECT_EQ(chains_->asked(), (std::vector<int>{4, 4, 1, 1, 2, 2}));
  EXPECT_EQ(chained_->levels_computed(), 2);
}

TEST_F(DraftChainsTest, IndependentDrawsGoLevelByLevel) {
  Make({.max_depth = 3, .min_confidence = 0});
  const auto trees = chained_->Propose(Contexts(/*max_nodes=*/4, DraftDraw::kIndependent));
  ASSERT_TRUE(trees.ok());
  EXPECT_TRUE(chains_->asked().empty());
  EXPECT_FALSE(trees->back().distributions.empty());
}

TEST_F(DraftChainsTest, TopKIsChecked) {
  auto model = DraftModel();
  auto chains = std::make_unique<HostChains>(model.get());
  const absl::Status status = DraftModelDrafter::Create(std::move(model), 96, {.top_k = 9}, std::move(chains)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace linspec
