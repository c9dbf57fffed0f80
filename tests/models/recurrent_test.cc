// The recurrent head says what Python says in float64; the drafter draws the likeliest chain or tree of what it says.
#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "models/draft_candidates.h"
#include "models/recurrent_drafter.h"
#include "models/recurrent_head.h"
#include "models/safetensors.h"
#include "models/weights.h"
#include "tests/models/model_test_util.h"

namespace linspec {
namespace {

using ::absl::StatusCode;

constexpr double kTolerance = 1e-5;  // of the largest logit; fp32 against float64

const std::string kFolder = LINSPEC_SOURCE_DIR "/tests/data/tiny/full";

std::shared_ptr<CpuOps> Ops() { return *CpuOps::Create({.num_threads = 1}); }

std::vector<int32_t> ToIds(const TensorView& tensor) {
  std::vector<int32_t> ids(tensor.num_elements());
  std::memcpy(ids.data(), tensor.data, ids.size() * sizeof(int32_t));
  return ids;
}

TEST(RecurrentHeadTest, LogitsAreThoseOfPython) {
  const auto ops = Ops();
  const auto target = *LoadModel({.path = kFolder, .weight_dtype = "f32", .ops = ops});
  const auto head = RecurrentHead::Load(kFolder, target->config(), "f32", ops);
  ASSERT_TRUE(head.ok()) << head.status().message();
  const auto golden = *OpenSafetensors(kFolder + "/recurrent_golden.safetensors");
  std::vector<float> states = ToFloats(golden.at("hidden"));
  const std::vector<float> expected = ToFloats(golden.at("logits"));
  const std::vector<int32_t> tokens = ToIds(golden.at("tokens"));
  const size_t rows = states.size() / target->config().hidden_size, vocab = target->config().vocab_size;
  ASSERT_EQ(expected.size(), tokens.size() * vocab);
  double difference = 0, largest = 0;
  for (size_t step = 0; step < tokens.size() / rows; ++step) {
    const auto logits = (*head)->Step(states, std::span(tokens).subspan(step * rows, rows), target.get());
    ASSERT_TRUE(logits.ok()) << logits.status().message();
    for (size_t i = 0; i < rows * vocab; ++i) {
      difference = std::max(difference, std::abs(double{(*logits)[i]} - expected[step * rows * vocab + i]));
      largest = std::max(largest, std::abs(double{(*logits)[i]}));
    }
  }
  EXPECT_LT(difference / largest, kTolerance);
}

TEST(RecurrentHeadTest, ARowDoesNotDependOnItsNeighbours) {
  const auto ops = Ops();
  const auto target = *LoadModel({.path = kFolder, .weight_dtype = "int8", .ops = ops});
  const auto head = *RecurrentHead::Load(kFolder, target->config(), "int8", ops);
  const auto golden = *OpenSafetensors(kFolder + "/recurrent_golden.safetensors");
  const std::vector<float> hidden = ToFloats(golden.at("hidden"));
  const size_t dim = target->config().hidden_size, vocab = target->config().vocab_size, rows = hidden.size() / dim;
  const std::vector<int32_t> tokens = RandomTokens(static_cast<int>(rows), 96, 3);
  std::vector<float> states = hidden;
  const auto logits = *head->Step(states, tokens, target.get());
  const std::vector<float> together(logits.begin(), logits.end());
  for (size_t row = 0; row < rows; ++row) {
    std::vector<float> state(hidden.begin() + row * dim, hidden.begin() + (row + 1) * dim);
    const auto alone = *head->Step(state, std::span(tokens).subspan(row, 1), target.get());
    EXPECT_TRUE(SameBits(alone.data(), together.data() + row * vocab, vocab)) << row;
    EXPECT_TRUE(SameBits(state.data(), states.data() + row * dim, dim)) << row;
  }
}

TEST(RecurrentHeadTest, WrongCallsAreErrors) {
  const auto ops = Ops();
  const auto target = *LoadModel({.path = kFolder, .weight_dtype = "f32", .ops = ops});
  const auto head = *RecurrentHead::Load(kFolder, target->config(), "f32", ops);
  std::vector<float> states(target->config().hidden_size);
  const std::vector<int32_t> two = {1, 2}, unknown = {1 << 20};
  EXPECT_EQ(head->Step(states, two, target.get()).status().code(), StatusCode::kInternal);
  EXPECT_EQ(head->Step(states, {}, target.get()).status().code(), StatusCode::kInternal);
  EXPECT_EQ(head->Step(states, unknown, target.get()).status().code(), StatusCode::kInvalidArgument);
}

constexpr char kConfig[] = R"({"version": 1, "intermediate_size": 8, "rms_norm_eps": 1e-5})";

StoredTensors HeadTensors() {
  const auto filled = [](std::vector<int64_t> shape, int64_t size) {
    return F32Tensor(std::move(shape), std::vector<float>(size, 0.25f));
  };
  return {{"state_norm.weight", filled({32}, 32)},
          {"token_norm.weight", filled({32}, 32)},
          {"gate_proj.weight", filled({8, 64}, 512)},
          {"up_proj.weight", filled({8, 64}, 512)},
          {"down_proj.weight", filled({32, 8}, 256)}};
}

class RecurrentFilesTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<RecurrentHead>> Load(const std::string& config, const StoredTensors& tensors) {
    folder_.Write(kRecurrentHeadConfigFile, config);
    folder_.Write(kRecurrentHeadWeightsFile, Safetensors(tensors));
    return RecurrentHead::Load(folder_.path(), TinyConfig(), "auto", Ops());
  }
  TempFolder folder_;
};

TEST_F(RecurrentFilesTest, StrictAboutTensors) {
  ASSERT_TRUE(Load(kConfig, HeadTensors()).ok());
  const auto refused = [&](const std::function<void(StoredTensors&)>& change, const std::string& part) {
    StoredTensors tensors = HeadTensors();
    change(tensors);
    ExpectError(Load(kConfig, tensors).status(), StatusCode::kInvalidArgument, part);
  };
  for (const auto& [name, tensor] : HeadTensors()) {
    refused([&](StoredTensors& t) { t.erase(name); }, "tensor " + name + " is missing");
    refused([&](StoredTensors& t) { t[name].shape.insert(t[name].shape.begin(), 1); }, "tensor " + name + " has");
    refused([&](StoredTensors& t) { t[name].dtype = "I32"; }, "tensor " + name + " is I32");
  }
  refused([](StoredTensors& t) { t["bias"] = t["state_norm.weight"]; }, "unexpected tensor bias");
}

TEST_F(RecurrentFilesTest, StrictAboutTheConfiguration) {
  const auto refused = [&](const std::string& config, const std::string& part) {
    ExpectError(Load(config, HeadTensors()).status(), StatusCode::kInvalidArgument, part);
  };
  refused("[]", "recurrent_head_config.json: expected a JSON object");
  refused("{", "recurrent_head_config.json");
  refused(R"({"intermediate_size": 8, "rms_norm_eps": 1e-5})", "version = missing: expected 1");
  refused(R"({"version": 2, "intermediate_size": 8, "rms_norm_eps": 1e-5})", "version = 2");
  refused(R"({"version": 1, "intermediate_size": "8", "rms_norm_eps": 1e-5})", "intermediate_size = \"8\"");
  refused(R"({"version": 1, "intermediate_size": 0, "rms_norm_eps": 1e-5})", "intermediate_size = 0");
  refused(R"({"version": 1, "intermediate_size": 9, "rms_norm_eps": 1e-5})", "tensor gate_proj.weight has");
  refused(R"({"version": 1, "intermediate_size": 8, "rms_norm_eps": -1})", "rms_norm_eps = -1");
  refused(R"({"version": 1, "intermediate_size": 8})", "rms_norm_eps = missing");
  ExpectError(RecurrentHead::Load("/nonexistent", TinyConfig(), "auto", Ops()).status(), StatusCode::kNotFound,
              "/nonexistent/recurrent_head_config.json");
}

class RecurrentDrafterTest : public ::testing::Test {
 protected:
  RecurrentDrafterTest() {
    sampling_.temperature = 0;
    hidden_.resize(target_->config().hidden_size);
  }
  std::unique_ptr<RecurrentHead> Head() const { return *RecurrentHead::Load(kFolder, target_->config(), "f32", ops_); }
  std::unique_ptr<RecurrentDrafter> Drafter(GrowthOptions options) const {
    return *RecurrentDrafter::Create(Head(), target_.get(), options);
  }
  DraftContext Context(int max_nodes) const {
    return {.sequence_id = 1,
            .tokens = tokens_,
            .num_prompt_tokens = 2,
            .sampling = &sampling_,
            .hidden = hidden_,
            .max_nodes = max_nodes};
  }
  DraftTree Propose(GrowthOptions options, int max_nodes) const {
    const std::vector<DraftContext> contexts = {Context(max_nodes)};
    const auto trees = Drafter(options)->Propose(contexts);
    EXPECT_TRUE(trees.ok()) << trees.status().message();
    EXPECT_TRUE(trees->front().Validate(target_->config().vocab_size).ok());
    return trees->front();
  }
  // What the head thinks follows the path of `node` in `tree`.
  std::vector<DraftCandidate> Guesses(const DraftTree& tree, int node, int k) const {
    std::vector<int32_t> path;
    for (int at = node; at >= 0; at = tree.parents[at]) path.insert(path.begin(), tree.tokens[at]);
    std::vector<float> state = hidden_;
    std::span<const float> logits;
    const auto head = Head();
    for (const int32_t token : path) logits = *head->Step(state, {&token, 1}, target_.get());
    return LikelyChoices(logits, sampling_, static_cast<int64_t>(tokens_.size() + path.size()) - 1, k,
                         /*coupled=*/true);
  }

  const std::shared_ptr<CpuOps> ops_ = Ops();
  const std::unique_ptr<Model> target_ = *LoadModel({.path = kFolder, .weight_dtype = "f32", .ops = ops_});
  std::vector<float> hidden_ = ToFloats(OpenSafetensors(kFolder + "/recurrent_golden.safetensors")->at("hidden"));
  const std::vector<int32_t> tokens_ = {5, 9, 33, 2};
  SamplingParams sampling_;
};

TEST_F(RecurrentDrafterTest, AChainIsTheHeadsOwnContinuation) {
  for (const float temperature : {0.0f, 0.9f}) {
    sampling_.temperature = temperature;
    sampling_.seed = 3;
    const DraftTree tree = Propose({.max_depth = 5, .min_confidence = 0}, 8);
    ASSERT_EQ(tree.num_nodes(), 6);
    for (int node = 1; node < tree.num_nodes(); ++node) {
      EXPECT_EQ(tree.parents[node], node - 1);
      const DraftCandidate guess = Guesses(tree, node - 1, 1).front();
      EXPECT_EQ(tree.tokens[node], guess.token);
      EXPECT_NEAR(tree.probabilities[node], tree.probabilities[node - 1] * guess.probability, 1e-5);
    }
  }
}

TEST_F(RecurrentDrafterTest, ATreeHoldsTheBestChildrenOfEachNodeItLookedAt) {
  sampling_.temperature = 0.9f;
  sampling_.seed = 5;
  const DraftTree tree = Propose({.max_depth = 3, .top_k = 3, .min_confidence = 0}, 64);
  EXPECT_EQ(tree.num_nodes(), 1 + 3 + 9 + 9);  // three nodes of each level are looked at
  EXPECT_EQ(tree.Depth(), 3);
  for (int node = 1; node < tree.num_nodes(); ++node) {
    const std::vector<DraftCandidate> guesses = Guesses(tree, tree.parents[node], 3);
    const auto guess = std::find_if(guesses.begin(), guesses.end(),
                                    [&](const DraftCandidate& g) { return g.token == tree.tokens[node]; });
    ASSERT_NE(guess, guesses.end());
    EXPECT_NEAR(tree.probabilities[node], tree.probabilities[tree.parents[node]] * guess->probability, 1e-5);
  }
  const DraftTree cut = Propose({.max_depth = 3, .top_k = 3, .min_confidence = 0}, 7);
  std::vector<float> best = tree.probabilities;
  std::sort(best.rbegin(), best.rend());
  std::vector<float> kept = cut.probabilities;
  std::sort(kept.rbegin(), kept.rend());
  EXPECT_EQ(kept, std::vector<float>(best.begin(), best.begin() + 7));
}

TEST_F(RecurrentDrafterTest, ContextsDoNotDisturbEachOtherAndSomeSitOut) {
  const auto drafter = Drafter({.min_confidence = 0});
  std::vector<DraftContext> contexts = {Context(4), Context(1), Context(6), Context(3)};
  contexts[2].hidden = {};
  const auto trees = *drafter->Propose(contexts);
  ASSERT_EQ(trees.size(), 4u);
  EXPECT_EQ(trees[0].tokens, Propose({.min_confidence = 0}, 4).tokens);
  EXPECT_EQ(trees[0].num_nodes(), 4);
  EXPECT_EQ(trees[1].num_nodes(), 1);
  EXPECT_EQ(trees[2].num_nodes(), 1);
  EXPECT_EQ(trees[3].tokens, Propose({.min_confidence = 0}, 3).tokens);
  EXPECT_TRUE(drafter->Propose({})->empty());
}

TEST_F(RecurrentDrafterTest, IndependentDrawsComeWithTheirDistribution) {
  sampling_.temperature = 0.9f;
  std::vector<DraftContext> contexts = {Context(4)};
  contexts[0].draw = DraftDraw::kIndependent;
  const DraftTree tree = Drafter({.min_confidence = 0})->Propose(contexts)->front();
  ASSERT_EQ(tree.num_nodes(), 4);
  ASSERT_EQ(tree.distributions.size(), 4u);
  for (int node = 1; node < 4; ++node) {
    const auto& distribution = tree.distributions[node];
    EXPECT_TRUE(std::any_of(distribution.begin(), distribution.end(),
                            [&](const TokenProbability& p) { return p.token == tree.tokens[node]; }));
  }
}

TEST_F(RecurrentDrafterTest, LooksNoDeeperThanPays) {
  std::vector<DraftContext> contexts = {Context(64)};
  const auto drafter = Drafter({.max_depth = 5, .min_confidence = 0});
  EXPECT_EQ(drafter->Propose(contexts)->front().Depth(), 5);
  EXPECT_EQ(drafter->levels_computed(), 5);
  contexts[0].min_level_probability = 0.65f;  // no child of a token can be that likely
  EXPECT_EQ(drafter->Propose(contexts)->front().Depth(), 1);
  EXPECT_EQ(drafter->levels_computed(), 1);
}

TEST_F(RecurrentDrafterTest, UnlikelyPathsAndWrongOptionsAreRefused) {
  std::vector<DraftContext> contexts = {Context(64)};
  contexts[0].min_probability = 1.0f;
  EXPECT_EQ(Drafter({.min_confidence = 0})->Propose(contexts)->front().num_nodes(), 1);
  ExpectError(RecurrentDrafter::Create(Head(), target_.get(), {.max_depth = 0}).status(), StatusCode::kInvalidArgument,
              "max_depth 0");
  ExpectError(RecurrentDrafter::Create(Head(), target_.get(), {.top_k = 64}).status(), StatusCode::kInvalidArgument,
              "top_k 64");
}

}  // namespace
}  // namespace linspec
