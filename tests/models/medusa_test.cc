// The heads say what Python says in float64; the drafter draws the likeliest tree of what they say.
#include <algorithm>
#include <cmath>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "models/medusa_drafter.h"
#include "models/medusa_heads.h"
#include "models/safetensors.h"
#include "models/sampler.h"
#include "models/weights.h"
#include "tests/models/model_test_util.h"

namespace linspec {
namespace {

using ::absl::StatusCode;

constexpr double kTolerance = 1e-5;  // of the largest logit; fp32 against float64

std::string TinyFolder(const std::string& name) { return std::string(LINSPEC_SOURCE_DIR) + "/tests/data/tiny/" + name; }

std::shared_ptr<CpuOps> Ops() { return *CpuOps::Create({.num_threads = 1}); }

class MedusaGoldenTest : public ::testing::TestWithParam<std::string> {};

TEST_P(MedusaGoldenTest, HeadLogitsAreThoseOfPython) {
  const std::string folder = TinyFolder(GetParam());
  const auto ops = Ops();
  const auto target = *LoadModel({.path = folder, .weight_dtype = "f32", .ops = ops});
  const auto heads = MedusaHeads::Load(folder, target->config(), "f32", ops);
  ASSERT_TRUE(heads.ok()) << heads.status().message();
  EXPECT_EQ((*heads)->shares_unembedding(), GetParam() == "full");
  const auto golden = *OpenSafetensors(folder + "/medusa_golden.safetensors");
  const std::vector<float> hidden = ToFloats(golden.at("hidden")), expected = ToFloats(golden.at("logits"));
  const auto logits = (*heads)->Logits(hidden, (*heads)->num_heads(), target.get());
  ASSERT_TRUE(logits.ok()) << logits.status().message();
  ASSERT_EQ(logits->size(), expected.size());
  double difference = 0, largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference = std::max(difference, std::abs(double{(*logits)[i]} - expected[i]));
    largest = std::max(largest, std::abs(double{expected[i]}));
  }
  EXPECT_LT(difference / largest, kTolerance);
  RecordProperty("worst_relative_difference", fmt::format("{:.2e}", difference / largest));
}

TEST_P(MedusaGoldenTest, ARowDoesNotDependOnItsNeighboursNorOnDeeperHeads) {
  const std::string folder = TinyFolder(GetParam());
  const auto ops = Ops();
  const auto target = *LoadModel({.path = folder, .weight_dtype = "int8", .ops = ops});
  const auto heads = *MedusaHeads::Load(folder, target->config(), "int8", ops);
  const std::vector<float> hidden = ToFloats(OpenSafetensors(folder + "/medusa_golden.safetensors")->at("hidden"));
  const size_t dim = target->config().hidden_size, vocab = target->config().vocab_size, rows = hidden.size() / dim;
  const auto all = *heads->Logits(hidden, heads->num_heads(), target.get());
  const std::vector<float> together(all.begin(), all.end());
  for (size_t row = 0; row < rows; ++row) {
    for (int n = 1; n <= heads->num_heads(); ++n) {
      const auto alone = *heads->Logits(std::span(hidden).subspan(row * dim, dim), n, target.get());
      EXPECT_TRUE(SameBits(alone.data() + (n - 1) * vocab, together.data() + ((n - 1) * rows + row) * vocab, vocab));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tiny, MedusaGoldenTest, ::testing::Values("full", "paper"),
                         [](const auto& info) { return info.param; });

constexpr char kConfig[] = R"({"version": 1, "medusa_num_heads": 2, "medusa_num_layers": 1})";

StoredTensor Filled(std::vector<int64_t> shape) {
  int64_t size = 1;
  for (const int64_t dim : shape) size *= dim;
  std::vector<float> values(size);
  for (int64_t i = 0; i < size; ++i) values[i] = static_cast<float>(i % 13 - 6) / 16;
  return F32Tensor(std::move(shape), values);
}

StoredTensors TwoHeads() {
  StoredTensors tensors;
  for (const std::string head : {"0", "1"}) {
    tensors[head + ".0.linear.weight"] = Filled({32, 32});
    tensors[head + ".0.linear.bias"] = Filled({32});
  }
  return tensors;
}

class MedusaFilesTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<MedusaHeads>> Load(const std::string& config, const StoredTensors& tensors,
                                                    const std::string& dtype = "auto") {
    folder_.Write("medusa_config.json", config);
    folder_.Write("medusa.safetensors", Safetensors(tensors));
    return MedusaHeads::Load(folder_.path(), TinyConfig(), dtype, Ops());
  }
  void ExpectRefused(const std::function<void(StoredTensors&)>& change, const std::string& part) {
    StoredTensors tensors = TwoHeads();
    change(tensors);
    ExpectError(Load(kConfig, tensors).status(), StatusCode::kInvalidArgument, part);
  }
  TempFolder folder_;
};

TEST_F(MedusaFilesTest, StrictAboutTensors) {
  ASSERT_TRUE(Load(kConfig, TwoHeads()).ok());
  for (const auto& [name, tensor] : TwoHeads()) {
    ExpectRefused([&](StoredTensors& t) { t.erase(name); }, "tensor " + name + " is missing");
    ExpectRefused([&](StoredTensors& t) { t[name].shape.insert(t[name].shape.begin(), 1); }, "tensor " + name + " has");
    ExpectRefused([&](StoredTensors& t) { t[name].dtype = "I32"; }, "tensor " + name + " is I32");
  }
  ExpectRefused([](StoredTensors& t) { t["2.0.linear.bias"] = Filled({32}); }, "unexpected tensor 2.0.linear.bias");
  ExpectRefused([](StoredTensors& t) { t["0.1.weight"] = Filled({96, 32}); }, "tensor 1.1.weight is missing");
  ExpectRefused([](StoredTensors& t) { t["1.1.weight"] = Filled({96, 32}); }, "unexpected tensor 1.1.weight");
  ExpectRefused([](StoredTensors& t) { t["0.0.linear.weight"] = {"I8", {32, 32}, std::string(1024, '\1')}; },
                "0.0.linear.weight_scale is missing");
}

TEST_F(MedusaFilesTest, StrictAboutTheConfiguration) {
  const auto refused = [&](const std::string& config, const std::string& part) {
    ExpectError(Load(config, TwoHeads()).status(), StatusCode::kInvalidArgument, part);
  };
  refused("[]", "medusa_config.json: expected a JSON object");
  refused("{", "medusa_config.json");
  refused(R"({"medusa_num_heads": 2, "medusa_num_layers": 1})", "version is missing");
  refused(R"({"version": 2, "medusa_num_heads": 2, "medusa_num_layers": 1})", "version = 2");
  refused(R"({"version": 1, "medusa_num_heads": 0, "medusa_num_layers": 1})", "medusa_num_heads = 0");
  refused(R"({"version": 1, "medusa_num_heads": "2", "medusa_num_layers": 1})", "medusa_num_heads = \"2\"");
  refused(R"({"version": 1, "medusa_num_heads": 2, "medusa_num_layers": 99})", "medusa_num_layers = 99");
  ExpectError(Load(kConfig, TwoHeads(), "int3").status(), StatusCode::kInvalidArgument, "\"int3\"");
  ExpectError(MedusaHeads::Load("/nonexistent", TinyConfig(), "auto", Ops()).status(), StatusCode::kNotFound,
              "/nonexistent/medusa_config.json");
}

class MedusaDrafterTest : public ::testing::Test {
 protected:
  MedusaDrafterTest()
      : folder_(TinyFolder("full")),
        ops_(Ops()),
        target_(*LoadModel({.path = folder_, .weight_dtype = "f32", .ops = ops_})),
        hidden_(ToFloats(OpenSafetensors(folder_ + "/medusa_golden.safetensors")->at("hidden"))) {
    hidden_.resize(target_->config().hidden_size);
    sampling_.temperature = 0;
  }
  std::unique_ptr<MedusaHeads> Heads() const { return *MedusaHeads::Load(folder_, target_->config(), "f32", ops_); }
  DraftContext Context(int max_nodes) const {
    return {.sequence_id = 1,
            .tokens = tokens_,
            .num_prompt_tokens = 2,
            .sampling = &sampling_,
            .hidden = hidden_,
            .max_nodes = max_nodes};
  }
  DraftTree Propose(MedusaOptions options, int max_nodes) const {
    const auto drafter = *MedusaDrafter::Create(MakeMedusaGuesser(Heads(), target_.get()), options);
    const std::vector<DraftContext> contexts = {Context(max_nodes)};
    const auto trees = drafter->Propose(contexts);
    EXPECT_TRUE(trees.ok()) << trees.status().message();
    EXPECT_TRUE(trees->front().Validate(target_->config().vocab_size).ok());
    return trees->front();
  }
  // What head n would have chosen, best first.
  std::vector<DraftCandidate> Guesses(int n, int k) const {
    const auto heads = Heads();
    const auto logits = *heads->Logits(hidden_, heads->num_heads(), target_.get());
    const size_t vocab = target_->config().vocab_size;
    return LikelyChoices(logits.subspan(n * vocab, vocab), sampling_, static_cast<int64_t>(tokens_.size()) + n, k,
                         /*coupled=*/true);
  }

  const std::string folder_;
  const std::shared_ptr<CpuOps> ops_;
  const std::unique_ptr<Model> target_;
  std::vector<float> hidden_;
  std::vector<int32_t> tokens_ = {5, 9, 33, 2};
  SamplingParams sampling_;
};

// All paths over the heads' guesses, likeliest first: the tree must hold exactly the first of them.
TEST_F(MedusaDrafterTest, DynamicTreeHoldsTheLikeliestPaths) {
  for (const float temperature : {0.0f, 1.0f}) {
    sampling_.temperature = temperature;
    sampling_.seed = 3;
    constexpr int kTopK = 4;
    std::vector<float> paths;
    for (int depth = 0; depth < 3; ++depth) {
      const size_t begin = paths.size() - static_cast<size_t>(std::pow(kTopK, depth)) * (depth > 0);
      const std::vector<float> above =
          depth == 0 ? std::vector<float>{1} : std::vector(paths.begin() + begin, paths.end());
      for (const float path : above) {
        for (const DraftCandidate& guess : Guesses(depth, kTopK)) paths.push_back(path * guess.probability);
      }
    }
    std::sort(paths.rbegin(), paths.rend());
    for (const int max_nodes : {2, 5, 17, 64}) {
      DraftTree tree = Propose({.top_k = kTopK}, max_nodes);
      ASSERT_EQ(tree.num_nodes(), max_nodes);
      std::sort(tree.probabilities.rbegin(), tree.probabilities.rend());
      for (int i = 1; i < max_nodes; ++i) EXPECT_FLOAT_EQ(tree.probabilities[i], paths[i - 1]) << i;
    }
  }
}

TEST_F(MedusaDrafterTest, SampledChildrenAreTheBestUnderTheNoiseOfTheirPosition) {
  sampling_.temperature = 0.7f;
  sampling_.seed = 11;
  const DraftTree tree = Propose({}, 64);
  const std::vector<int> depths = tree.Depths();
  std::set<int> seen;
  for (int node = 1; node < tree.num_nodes(); ++node) {
    if (tree.parents[node] != 0) continue;
    seen.insert(tree.tokens[node]);
  }
  const std::vector<DraftCandidate> guesses = Guesses(0, static_cast<int>(seen.size()));
  for (const DraftCandidate& guess : guesses) EXPECT_TRUE(seen.contains(guess.token));
  EXPECT_EQ(*std::max_element(depths.begin(), depths.end()), 3);
}

TEST_F(MedusaDrafterTest, PublishedTreeHasItsShape) {
  // With four heads the depths are 1, 10, 28, 23 and 2 nodes; these heads are three.
  const DraftTree tree = Propose({.tree = MedusaTree::kMcSim7b63}, 64);
  const std::vector<int> depths = tree.Depths();
  EXPECT_EQ(std::count(depths.begin(), depths.end(), 1), 10);
  EXPECT_EQ(std::count(depths.begin(), depths.end(), 2), 28);
  EXPECT_EQ(std::count(depths.begin(), depths.end(), 3), 23);
  std::vector<int> children(tree.num_nodes(), 0);
  for (int node = 1; node < tree.num_nodes(); ++node) ++children[tree.parents[node]];
  const int best = tree.FindChild(0, Guesses(0, 1)[0].token), second = tree.FindChild(0, Guesses(0, 2)[1].token);
  EXPECT_EQ(children[best], 10);
  EXPECT_EQ(children[second], 7);
  EXPECT_EQ(children[tree.FindChild(best, Guesses(1, 1)[0].token)], 10);
  EXPECT_EQ(children[tree.FindChild(second, Guesses(1, 1)[0].token)], 2);
  EXPECT_EQ(Propose({.tree = MedusaTree::kMcSim7b63}, 9).num_nodes(), 9);
}

TEST_F(MedusaDrafterTest, SomeContextsSitOut) {
  const auto drafter = *MedusaDrafter::Create(MakeMedusaGuesser(Heads(), target_.get()), {});
  std::vector<DraftContext> contexts = {Context(4), Context(1), Context(6), Context(3)};
  contexts[2].hidden = {};
  const auto trees = *drafter->Propose(contexts);
  ASSERT_EQ(trees.size(), 4u);
  EXPECT_EQ(trees[0].num_nodes(), 4);
  EXPECT_EQ(trees[1].num_nodes(), 1);
  EXPECT_EQ(trees[2].num_nodes(), 1);
  EXPECT_EQ(trees[3].tokens, Propose({}, 3).tokens);
}

TEST_F(MedusaDrafterTest, UnlikelyPathsAreLeftOut) {
  const auto drafter = *MedusaDrafter::Create(MakeMedusaGuesser(Heads(), target_.get()), {});
  std::vector<DraftContext> contexts = {Context(64), Context(64)};
  contexts[0].min_probability = 0.01f;
  contexts[1].min_probability = 1.0f;
  const auto trees = *drafter->Propose(contexts);
  for (const float probability : trees[0].probabilities) EXPECT_GE(probability, 0.01f);
  EXPECT_GT(trees[0].num_nodes(), 1);
  EXPECT_EQ(trees[1].num_nodes(), 1);
  const auto error = MedusaDrafter::Create(MakeMedusaGuesser(Heads(), target_.get()), {.top_k = 64}).status();
  ExpectError(error, StatusCode::kInvalidArgument, "top_k 64");
}

}  // namespace
}  // namespace linspec
