// Sampled sequences follow the exact distribution, with speculation as without, whichever way drafts are accepted, save
// the way that is labelled otherwise; and the check can fail.
#include <cmath>
#include <functional>
#include <vector>

#include "gtest/gtest.h"
#include "scheduler/acceptance.h"
#include "tests/scheduler/fake_model.h"

namespace linspec {
namespace {

constexpr int kVocab = 8;
constexpr int kLength = 3;  // 512 cells
constexpr int kSamples = 200000;

std::vector<float> LogitsAfter(std::span<const int32_t> tokens) {
  FakeModel model(kVocab);
  model.spread = 3;
  uint64_t hash = 5;
  for (const int32_t token : tokens) hash = FakeModel::Extend(hash, token);
  std::vector<float> logits(kVocab);
  model.Logits(hash, logits.data());
  return logits;
}

std::vector<double> Softmax(const std::vector<float>& logits) {
  std::vector<double> p;
  double sum = 0;
  for (const float logit : logits) sum += p.emplace_back(std::exp(logit));
  for (double& x : p) x /= sum;
  return p;
}

std::vector<double> ExactDistribution() {
  std::vector<double> exact;
  for (int a = 0; a < kVocab; ++a) {
    for (int b = 0; b < kVocab; ++b) {
      for (int c = 0; c < kVocab; ++c) {
        const std::vector<int32_t> ab = {a, b};
        exact.push_back(Softmax(LogitsAfter({}))[a] * Softmax(LogitsAfter(std::span(ab).first(1)))[b] *
                        Softmax(LogitsAfter(ab))[c]);
      }
    }
  }
  return exact;
}

// What would be sampled after the first tokens, for every prefix: computed once, the walks read it.
class Tables {
 public:
  Tables() { Fill({}); }
  std::span<const float> Logits(const std::vector<int32_t>& prefix) const { return tables_[Key(prefix)]; }

 private:
  static size_t Key(const std::vector<int32_t>& prefix) {
    size_t key = 0;
    for (const int32_t token : prefix) key = key * (kVocab + 1) + token + 1;
    return key;
  }
  void Fill(const std::vector<int32_t>& prefix) {
    tables_.resize(std::max(tables_.size(), Key(prefix) + 1));
    tables_[Key(prefix)] = LogitsAfter(prefix);
    if (prefix.size() == kLength) return;
    for (int32_t token = 0; token < kVocab; ++token) {
      std::vector<int32_t> longer = prefix;
      longer.push_back(token);
      Fill(longer);
    }
  }
  std::vector<std::vector<float>> tables_;
};

using Acceptor = std::function<std::vector<int32_t>(const DraftTree&, std::span<const float>, const WalkInput&)>;

std::vector<int32_t> Exact(const DraftTree& tree, std::span<const float> logits, const WalkInput& input) {
  std::vector<int32_t> tokens;
  for (const SampledToken& token : WalkTree(tree, logits, kVocab, input).tokens) tokens.push_back(token.token);
  return tokens;
}

Acceptor By(AcceptanceMode mode) {
  return [mode](const DraftTree& tree, std::span<const float> logits, WalkInput input) {
    input.acceptance = mode;
    return Exact(tree, logits, input);
  };
}

// The classic mistake: a draft that is merely likely enough is taken.
std::vector<int32_t> Biased(const DraftTree& tree, std::span<const float> logits, const WalkInput& input) {
  if (tree.num_nodes() > 1) {
    const std::vector<double> p = Softmax({logits.begin(), logits.begin() + kVocab});
    if (p[tree.tokens[1]] > 0.2) return {tree.tokens[1]};
  }
  return Exact(tree, logits, input);
}

// Node i's path below the root, after `prefix`.
std::vector<float> TreeLogits(const Tables& tables, const std::vector<int32_t>& prefix, const DraftTree& tree) {
  std::vector<float> logits;
  std::vector<std::vector<int32_t>> paths;
  for (int node = 0; node < tree.num_nodes(); ++node) {
    paths.push_back(node == 0 ? prefix : paths[tree.parents[node]]);
    if (node > 0) paths.back().push_back(tree.tokens[node]);
    if (paths.back().size() > kLength) paths.back().resize(kLength);
    const std::span<const float> row = tables.Logits(paths.back());
    logits.insert(logits.end(), row.begin(), row.end());
  }
  return logits;
}

// Drafts depend on the seed alone here, as a real drafter's do through the shared noise.
DraftTree SomeTree(uint64_t seed, size_t step) {
  DraftTree tree = DraftTree::Root(0);
  for (int node = 1; node < 6; ++node) {
    const uint64_t bits = MixHash(seed * 31 + step * 7 + node);
    tree.Add(static_cast<int32_t>(bits % kVocab), static_cast<int>((bits >> 8) % node));
  }
  return tree;
}

using TreeMaker = std::function<DraftTree(uint64_t seed, const std::vector<int32_t>& prefix)>;

TreeMaker Fixed() {
  return [](uint64_t seed, const std::vector<int32_t>& prefix) { return SomeTree(seed, prefix.size()); };
}

// What a draft model believes: the truth of another prefix.
std::vector<TokenProbability> DraftDistribution(const Tables& tables, std::vector<int32_t> prefix) {
  for (int32_t& token : prefix) token = (token + 1) % kVocab;
  const std::vector<double> q = Softmax({tables.Logits(prefix).begin(), tables.Logits(prefix).end()});
  std::vector<TokenProbability> distribution;
  for (int32_t token = 0; token < kVocab; ++token) distribution.push_back({token, static_cast<float>(q[token])});
  return distribution;
}

// `width` children of the root, drawn independently, and a chain below each of them. What the drafter says it drew from
// is the truth, or `lie`.
TreeMaker Drawn(const Tables& tables, int width, bool lie = false) {
  return [&tables, width, lie](uint64_t seed, const std::vector<int32_t>& prefix) {
    DraftTree tree = DraftTree::Root(0);
    tree.distributions.resize(1);
    for (int child = 0; child < width; ++child) {
      std::vector<int32_t> path = prefix;
      for (int node = 0; path.size() < kLength;) {
        const std::vector<TokenProbability> q = DraftDistribution(tables, path);
        const uint64_t noise = MixHash(MixHash(seed) + 1000 * child + 17);
        path.push_back(DrawToken(q, noise, static_cast<int64_t>(path.size()), NoiseStream::kDraft));
        node = tree.Add(path.back(), node);
        tree.distributions.push_back(lie ? std::vector<TokenProbability>{{path.back(), 0.05f}} : q);
      }
    }
    return tree;
  };
}

std::vector<int64_t> Count(const Tables& tables, const Acceptor& acceptor, const TreeMaker& draft) {
  std::vector<int64_t> counts(kVocab * kVocab * kVocab, 0);
  for (uint64_t seed = 1; seed <= kSamples; ++seed) {
    SamplingParams params;
    params.seed = MixHash(seed);
    params.max_tokens = 100;
    PenaltyHistory history({});
    std::vector<int32_t> tokens;
    while (tokens.size() < kLength) {
      const DraftTree tree = draft ? draft(seed, tokens) : DraftTree::Root(0);
      const WalkInput input{.params = &params,
                            .history = &history,
                            .eos_token_ids = {},
                            .position = static_cast<int64_t>(tokens.size()),
                            .num_output_tokens = 0};
      for (const int32_t token : acceptor(tree, TreeLogits(tables, tokens, tree), input)) tokens.push_back(token);
    }
    ++counts[(tokens[0] * kVocab + tokens[1]) * kVocab + tokens[2]];
  }
  return counts;
}

double ChiSquare(const std::vector<double>& p, const std::vector<int64_t>& counts) {
  double chi2 = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    const double expected = p[i] * kSamples;
    chi2 += (counts[i] - expected) * (counts[i] - expected) / expected;
  }
  return chi2;
}

// 511 degrees of freedom: mean 511, standard deviation 32; 640 is four of those above.
constexpr double kLimit = 640;

TEST(LosslessTest, SequencesFollowTheExactDistribution) {
  const Tables tables;
  const std::vector<double> exact = ExactDistribution();
  const std::vector<int64_t> plain = Count(tables, Exact, nullptr);
  const std::vector<int64_t> drafted = Count(tables, Exact, Fixed());
  EXPECT_LT(ChiSquare(exact, plain), kLimit);
  EXPECT_GT(ChiSquare(exact, plain), 400) << "too good to be random";
  EXPECT_EQ(plain, drafted);
}

TEST(LosslessTest, ABiasedAcceptorFailsTheSameCheck) {
  const Tables tables;
  EXPECT_GT(ChiSquare(ExactDistribution(), Count(tables, Biased, Fixed())), 2 * kLimit);
}

TEST(LosslessTest, RejectionSamplingIsExactForChainsAndForSeveralChildren) {
  const Tables tables;
  const std::vector<double> exact = ExactDistribution();
  const Acceptor rejection = By(AcceptanceMode::kRejection);
  EXPECT_LT(ChiSquare(exact, Count(tables, rejection, nullptr)), kLimit);
  EXPECT_LT(ChiSquare(exact, Count(tables, rejection, Drawn(tables, 1))), kLimit);
  EXPECT_LT(ChiSquare(exact, Count(tables, rejection, Drawn(tables, 3))), kLimit);
  EXPECT_LT(ChiSquare(exact, Count(tables, rejection, Fixed())), kLimit) << "tokens that were certain";
}

TEST(LosslessTest, RejectionSamplingNeedsTheTrueDraftDistribution) {
  const Tables tables;
  const Acceptor rejection = By(AcceptanceMode::kRejection);
  EXPECT_GT(ChiSquare(ExactDistribution(), Count(tables, rejection, Drawn(tables, 1, /*lie=*/true))), 2 * kLimit);
}

TEST(LosslessTest, TypicalAcceptanceIsNotExact) {
  const Tables tables;
  const std::vector<int64_t> counts = Count(tables, By(AcceptanceMode::kTypical), Fixed());
  EXPECT_GT(ChiSquare(ExactDistribution(), counts), 2 * kLimit);
}

// As often as two distributions overlap: the sum of the smaller probabilities, which no coupling can better.
TEST(LosslessTest, RejectionSamplingAcceptsAsOftenAsPossible) {
  const Tables tables;
  const std::vector<TokenProbability> q = DraftDistribution(tables, {3});
  const std::vector<double> p = Softmax({tables.Logits({3}).begin(), tables.Logits({3}).end()});
  double overlap = 0;
  for (int token = 0; token < kVocab; ++token) overlap += std::min<double>(p[token], q[token].probability);
  constexpr int kTries = 50000;
  int accepted = 0;
  for (uint64_t seed = 1; seed <= kTries; ++seed) {
    SamplingParams params;
    params.seed = MixHash(seed);
    params.max_tokens = 100;
    PenaltyHistory history({});
    DraftTree tree = DraftTree::Root(0);
    tree.Add(DrawToken(q, params.seed, 1, NoiseStream::kDraft), 0);
    tree.distributions = {{}, q};
    const Walk walk = WalkTree(tree, TreeLogits(tables, {3}, tree), kVocab,
                               {.params = &params,
                                .history = &history,
                                .eos_token_ids = {},
                                .position = 1,
                                .num_output_tokens = 0,
                                .acceptance = AcceptanceMode::kRejection});
    accepted += walk.path.size() > 1;
  }
  EXPECT_NEAR(static_cast<double>(accepted) / kTries, overlap, 4 * std::sqrt(0.25 / kTries));
}

TEST(LosslessTest, EveryWayIsGreedyAtTemperatureZero) {
  const Tables tables;
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    SamplingParams params;
    params.temperature = 0;
    params.max_tokens = 100;
    const DraftTree tree = SomeTree(seed, 0);
    const std::vector<float> logits = TreeLogits(tables, {}, tree);
    std::vector<std::vector<int32_t>> chosen;
    for (const AcceptanceMode mode : {AcceptanceMode::kGumbel, AcceptanceMode::kRejection, AcceptanceMode::kTypical}) {
      PenaltyHistory history({});
      const WalkInput input{
          .params = &params, .history = &history, .eos_token_ids = {}, .position = 0, .num_output_tokens = 0};
      chosen.push_back(By(mode)(tree, logits, input));
    }
    EXPECT_EQ(chosen[0], chosen[1]);
    EXPECT_EQ(chosen[0], chosen[2]);
  }
}

}  // namespace
}  // namespace linspec
