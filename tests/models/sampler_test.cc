#include "models/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace linspec {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> SomeLogits(int size, float spread = 8) {
  std::vector<float> logits(size);
  for (int v = 0; v < size; ++v) logits[v] = spread * static_cast<float>(std::sin(v * 12.9898 + 1) * 0.5);
  return logits;
}

SampleResult Sample(const std::vector<float>& logits, const SamplingParams& params, int64_t position,
                    std::span<const int32_t> prompt = {}, std::span<const int32_t> output = {},
                    std::span<const int32_t> banned = {}) {
  PenaltyHistory history(prompt);
  for (const int32_t token : output) history.Push(token);
  return SampleToken(logits, {.params = &params, .history = &history, .banned = banned, .position = position});
}

SamplingParams Params(const std::function<void(SamplingParams*)>& set = [](SamplingParams*) {}) {
  SamplingParams params;
  params.seed = 42;
  set(&params);
  return params;
}

std::vector<double> Softmax(const std::vector<double>& logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  std::vector<double> p;
  for (const double logit : logits) p.push_back(std::exp(logit - max));
  const double sum = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& x : p) x /= sum;
  return p;
}

// Pearson's statistic; cells with p = 0 must stay empty.
double ChiSquare(const std::vector<double>& p, const std::vector<int64_t>& counts) {
  const double n = static_cast<double>(std::accumulate(counts.begin(), counts.end(), int64_t{0}));
  double chi2 = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    if (p[i] == 0) {
      EXPECT_EQ(counts[i], 0) << "token " << i;
    } else {
      chi2 += (counts[i] - n * p[i]) * (counts[i] - n * p[i]) / (n * p[i]);
    }
  }
  return chi2;
}

// The 1e-4 quantile of chi-square with k degrees of freedom (Wilson and Hilferty).
double ChiSquareLimit(double k) {
  const double z = 3.719, a = 2 / (9 * k);
  return k * std::pow(1 - a + z * std::sqrt(a), 3);
}

TEST(GumbelTest, HasTheRightMeanVarianceAndBounds) {
  const int n = 400000;
  double sum = 0, squares = 0;
  for (int i = 0; i < n; ++i) {
    const double g = GumbelNoise(7, i / 100, i % 100);
    EXPECT_GT(g, -3.2);
    EXPECT_LT(g, 22.9);
    sum += g;
    squares += g * g;
  }
  const double mean = sum / n, variance = squares / n - mean * mean;
  EXPECT_NEAR(mean, 0.5772157, 0.01);  // 5 standard errors: 0.0101
  EXPECT_NEAR(variance, M_PI * M_PI / 6, 0.03);
}

TEST(GumbelTest, SeedsPositionsAndTokensAreUncorrelated) {
  const int n = 100000;
  const auto correlation = [&](const std::function<float(int)>& a, const std::function<float(int)>& b) {
    double sa = 0, sb = 0, saa = 0, sbb = 0, sab = 0;
    for (int i = 0; i < n; ++i) {
      const double x = a(i), y = b(i);
      sa += x, sb += y, saa += x * x, sbb += y * y, sab += x * y;
    }
    return (sab / n - sa / n * sb / n) / std::sqrt((saa / n - sa / n * sa / n) * (sbb / n - sb / n * sb / n));
  };
  const auto base = [](int i) { return GumbelNoise(1, i, 3); };
  EXPECT_LT(std::abs(correlation(base, [](int i) { return GumbelNoise(1, i + 1, 3); })), 0.016);
  EXPECT_LT(std::abs(correlation(base, [](int i) { return GumbelNoise(2, i, 3); })), 0.016);
  EXPECT_LT(std::abs(correlation(base, [](int i) { return GumbelNoise(1, i, 2); })), 0.016);
  EXPECT_LT(std::abs(correlation(base, [](int i) { return GumbelNoise(1, i, 7); })), 0.016);
  EXPECT_LT(std::abs(correlation(base, [](int i) { return GumbelNoise(1 + (uint64_t{1} << 32), i, 3); })), 0.016);
  EXPECT_LT(std::abs(correlation(base, [](int i) { return GumbelNoise(1, i + (int64_t{1} << 32), 3); })), 0.016);
}

// The fast path skips noise that cannot win; the plain definition skips nothing.
TEST(SamplerTest, EqualsTheDefinition) {
  for (const int size : {1, 3, 4, 5, 7, 64, 1001}) {
    for (const float temperature : {0.2f, 1.0f, 3.0f}) {
      const std::vector<float> logits = SomeLogits(size, 20);
      const float max = *std::max_element(logits.begin(), logits.end());
      const SamplingParams params = Params([&](SamplingParams* p) { p->temperature = temperature; });
      for (int64_t position = 0; position < 200; ++position) {
        std::vector<std::pair<float, int32_t>> scores;
        for (int v = 0; v < size; ++v) {
          scores.push_back({-((logits[v] - max) / temperature + GumbelNoise(42, position, v)), v});
        }
        std::sort(scores.begin(), scores.end());
        EXPECT_EQ(Sample(logits, params, position).token.token, scores[0].second);
        const std::vector<ScoredToken> top = CoupledTopK(logits, params, position, 5);
        ASSERT_EQ(top.size(), std::min<size_t>(5, size));
        for (size_t i = 0; i < top.size(); ++i) EXPECT_EQ(top[i].token, scores[i].second);
      }
    }
  }
}

TEST(SamplerTest, GreedyTakesTheLowestOfEqualIds) {
  const SamplingParams greedy = Params([](SamplingParams* p) { p->temperature = 0; });
  EXPECT_EQ(Sample({1, 5, 5, 2}, greedy, 0).token.token, 1);
  const std::vector<ScoredToken> top = CoupledTopK(std::vector<float>{1, 5, 5, 2}, greedy, 0, 3);
  ASSERT_EQ(top.size(), 3u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(top[i].token, i + 1);
}

TEST(SamplerTest, ExtremeTemperaturesAreFinite) {
  for (const float temperature : {1e-45f, 1e-30f, 100.0f}) {
    const SamplingParams params = Params([&](SamplingParams* p) { p->temperature = temperature; });
    const SampleResult result = Sample({1, 3, 2, -1e30f}, params, 5);
    EXPECT_TRUE(result.ok);
    if (temperature < 1) {
      EXPECT_EQ(result.token.token, 1);
    }
  }
}

TEST(SamplerTest, UnusableLogitsAreReported) {
  for (const float temperature : {0.0f, 1.0f}) {
    const SamplingParams params = Params([&](SamplingParams* p) { p->temperature = temperature; });
    EXPECT_FALSE(Sample({1, kNan, 2}, params, 0).ok);
    EXPECT_FALSE(Sample({1, kInf, 2}, params, 0).ok);
    EXPECT_FALSE(Sample({-kInf, -kInf}, params, 0).ok);
    EXPECT_FALSE(Sample({1, 2}, params, 0, {}, {}, std::vector<int32_t>{0, 1}).ok);
    EXPECT_TRUE(Sample({1, -kInf}, params, 0).ok);
  }
  EXPECT_TRUE(CoupledTopK(std::vector<float>{kNan, kNan}, Params(), 0, 2).empty());
  EXPECT_FALSE(ScoreToken(std::vector<float>{kNan, 1}, 0, 0).ok);
}

TEST(SamplerTest, PenaltiesFollowHuggingFaceAndOpenAi) {
  SamplingParams params = Params([](SamplingParams* p) {
    p->temperature = 0;
    p->repetition_penalty = 2;
    p->frequency_penalty = 0.5f;
    p->presence_penalty = 0.25f;
    p->logit_bias = {{3, 1.0f}};
    p->logprobs = 5;
  });
  // 0: prompt only, 1: twice in the output, 2: negative and once in both, 3: biased, 4: untouched.
  const std::vector<float> logits = {4, 4, -1, 1, 2.5f};
  const SampleResult result = Sample(logits, params, 0, std::vector<int32_t>{0, 2}, std::vector<int32_t>{1, 1, 2});
  const std::vector<double> p = Softmax({2, 4.0 / 2 - 1 - 0.25, -2 - 0.5 - 0.25, 2, 2.5});
  ASSERT_EQ(result.token.top_logprobs.size(), 5u);
  EXPECT_EQ(result.token.token, 4);
  for (const TokenLogprob& top : result.token.top_logprobs) EXPECT_NEAR(top.logprob, std::log(p[top.token]), 1e-5);
  EXPECT_NEAR(result.token.logprob, std::log(p[4]), 1e-5);
}

TEST(SamplerTest, LogprobsAreTakenBeforeTemperatureAndTruncation) {
  const SamplingParams params = Params([](SamplingParams* p) {
    p->temperature = 0.1f;
    p->top_k = 1;
    p->logprobs = 2;
  });
  const SampleResult result = Sample({1, 2, 3}, params, 0);
  EXPECT_NEAR(result.token.logprob, std::log(Softmax({1, 2, 3})[2]), 1e-6);
  EXPECT_EQ(result.token.top_logprobs[1].token, 1);
}

TEST(PenaltyHistoryTest, KnowsCountsAndTheEndOfTheOutput) {
  PenaltyHistory history(std::vector<int32_t>{1, 1});
  for (const int32_t token : {2, 2, 3}) history.Push(token);
  EXPECT_EQ(history.OutputCount(2), 2);
  EXPECT_EQ(history.OutputCount(1), 0);  // the prompt's
  const auto ends_with = [&](std::vector<int32_t> tokens) { return history.OutputEndsWith(tokens); };
  EXPECT_TRUE(ends_with({}) && ends_with({3}) && ends_with({2, 3}) && ends_with({2, 2, 3}));
  EXPECT_FALSE(ends_with({2}) || ends_with({3, 3}) || ends_with({1, 2, 2, 3}));
}

// What each truncation keeps, written down independently: probabilities in, the renormalised kept ones out.
using Keep = std::function<std::vector<double>(std::vector<double>)>;

std::vector<double> KeepWhere(const std::vector<double>& p, const std::vector<size_t>& order, double mass) {
  std::vector<double> kept(p.size(), 0);
  double sum = 0;
  for (size_t i = 0; i < order.size() && sum < mass; ++i) sum += kept[order[i]] = p[order[i]];
  for (double& x : kept) x /= sum;
  return kept;
}

std::vector<size_t> OrderBy(const std::vector<double>& keys) {
  std::vector<size_t> order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return keys[a] < keys[b]; });
  return order;
}

std::vector<double> Negated(std::vector<double> p) {
  for (double& x : p) x = -x;
  return p;
}

struct TruncationCase {
  std::string name;
  std::function<void(SamplingParams*)> set;
  Keep keep;
};

std::vector<TruncationCase> TruncationCases() {
  const Keep top_p = [](std::vector<double> p) { return KeepWhere(p, OrderBy(Negated(p)), 0.7); };
  const Keep top_k = [](std::vector<double> p) {
    std::vector<size_t> order = OrderBy(Negated(p));
    order.resize(3);
    return KeepWhere(p, order, 2);
  };
  const Keep min_p = [](std::vector<double> p) {
    const double floor = 0.2 * *std::max_element(p.begin(), p.end());
    std::vector<size_t> order;
    for (size_t v = 0; v < p.size(); ++v) {
      if (p[v] >= floor) order.push_back(v);
    }
    return KeepWhere(p, order, 2);
  };
  const Keep typical_p = [](std::vector<double> p) {
    double entropy = 0;
    for (const double x : p) entropy -= x > 0 ? x * std::log(x) : 0;
    std::vector<double> keys;
    for (const double x : p) keys.push_back(x > 0 ? std::abs(-std::log(x) - entropy) : 1e9);
    return KeepWhere(p, OrderBy(keys), 0.6);
  };
  return {
      {"plain", [](SamplingParams*) {}, [](std::vector<double> p) { return p; }},
      {"top_p", [](SamplingParams* p) { p->top_p = 0.7f; }, top_p},
      {"top_k", [](SamplingParams* p) { p->top_k = 3; }, top_k},
      {"min_p", [](SamplingParams* p) { p->min_p = 0.2f; }, min_p},
      {"typical_p", [](SamplingParams* p) { p->typical_p = 0.6f; }, typical_p},
      {"all in order",
       [](SamplingParams* p) {
         p->min_p = 0.2f;
         p->top_k = 3;
         p->typical_p = 0.6f;
         p->top_p = 0.7f;
       },
       [=](std::vector<double> p) { return top_p(typical_p(top_k(min_p(p)))); }},
  };
}

TEST(SamplerTest, TruncatedDistributionsPassChiSquare) {
  const std::vector<float> logits = {0.3f, 1.9f, -0.7f, 1.2f, 0.8f, -2.0f, 2.2f, 0.1f};
  for (const TruncationCase& test : TruncationCases()) {
    for (const float temperature : {1.0f, 1.7f}) {
      const SamplingParams params = Params([&](SamplingParams* p) {
        p->temperature = temperature;
        test.set(p);
      });
      std::vector<double> tempered(logits.begin(), logits.end());
      for (double& logit : tempered) logit /= temperature;
      const std::vector<double> expected = test.keep(Softmax(tempered));
      std::vector<int64_t> counts(logits.size(), 0);
      for (int64_t position = 0; position < 60000; ++position) ++counts[Sample(logits, params, position).token.token];
      const auto cells = std::count_if(expected.begin(), expected.end(), [](double p) { return p > 0; });
      if (cells > 1) {
        EXPECT_LT(ChiSquare(expected, counts), ChiSquareLimit(static_cast<double>(cells) - 1)) << test.name;
      }
    }
  }
}

TEST(SamplerTest, TruncationAtItsLimitsKeepsSomething) {
  const std::vector<float> logits = {0, 0, 0, 5};
  for (const auto& set : std::vector<std::function<void(SamplingParams*)>>{
           [](SamplingParams* p) { p->top_p = 1e-30f; }, [](SamplingParams* p) { p->typical_p = 1e-30f; },
           [](SamplingParams* p) { p->min_p = 1; }, [](SamplingParams* p) { p->top_k = 1; },
           [](SamplingParams* p) { p->top_k = 1 << 30; }}) {
    const SampleResult result = Sample(logits, Params(set), 1);
    EXPECT_TRUE(result.ok);
  }
  EXPECT_EQ(Sample(logits, Params([](SamplingParams* p) { p->min_p = 1; }), 1).token.token, 3);
}

TEST(SamplingParamsTest, NamesFieldAndValue) {
  struct Case {
    std::function<void(SamplingParams*)> set;
    std::string message;
  };
  const std::vector<Case> cases = {
      {[](SamplingParams* p) { p->temperature = -1; }, "temperature = -1"},
      {[](SamplingParams* p) { p->temperature = kNan; }, "temperature = nan"},
      {[](SamplingParams* p) { p->temperature = kInf; }, "temperature = inf"},
      {[](SamplingParams* p) { p->top_p = 0; }, "top_p = 0"},
      {[](SamplingParams* p) { p->top_p = 1.5f; }, "top_p = 1.5"},
      {[](SamplingParams* p) { p->top_k = -1; }, "top_k = -1"},
      {[](SamplingParams* p) { p->min_p = kNan; }, "min_p = nan"},
      {[](SamplingParams* p) { p->typical_p = 0; }, "typical_p = 0"},
      {[](SamplingParams* p) { p->repetition_penalty = 0; }, "repetition_penalty = 0"},
      {[](SamplingParams* p) { p->repetition_penalty = kInf; }, "repetition_penalty = inf"},
      {[](SamplingParams* p) { p->frequency_penalty = 3; }, "frequency_penalty = 3"},
      {[](SamplingParams* p) { p->presence_penalty = -2.5f; }, "presence_penalty = -2.5"},
      {[](SamplingParams* p) { p->max_tokens = 0; }, "max_tokens = 0"},
      {[](SamplingParams* p) { p->min_tokens = 17; }, "min_tokens = 17"},
      {[](SamplingParams* p) { p->logprobs = 21; }, "logprobs = 21"},
      {[](SamplingParams* p) { p->logit_bias = {{100, 0.0f}}; }, "logit_bias = token 100"},
      {[](SamplingParams* p) { p->logit_bias = {{-1, 0.0f}}; }, "logit_bias = token -1"},
      {[](SamplingParams* p) { p->logit_bias = {{5, kNan}}; }, "logit_bias[5] = nan"},
      {[](SamplingParams* p) { p->logit_bias = {{5, 101.0f}}; }, "logit_bias[5] = 101"},
      {[](SamplingParams* p) { p->stop_token_ids = {1, 100}; }, "stop_token_ids[1] = 100"},
      {[](SamplingParams* p) { p->stop = {"a", ""}; }, "stop[1] = \"\""},
  };
  EXPECT_TRUE(SamplingParams().Validate(100).ok());
  for (const Case& test : cases) {
    SamplingParams params;
    test.set(&params);
    const absl::Status status = params.Validate(100);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), testing::StartsWith(test.message));
  }
}

TEST(SamplerTest, TokenDistributionIsWhatSampleTokenDrawsFrom) {
  const std::vector<float> logits = {1.0f, 0.2f, -0.5f, 2.0f, 1.7f, -3.0f, 0.9f, 0.0f};
  const SamplingParams params = Params([](SamplingParams* p) {
    p->temperature = 0.8f;
    p->top_p = 0.9f;
    p->top_k = 6;
    p->presence_penalty = 0.5f;
    p->logit_bias = {{0, 0.7f}};
  });
  PenaltyHistory history({});
  history.Push(3);
  const std::vector<int32_t> banned = {6};
  const SamplingContext context{.params = &params, .history = &history, .banned = banned, .position = 0};
  const std::vector<TokenProbability> distribution = TokenDistribution(logits, context);
  ASSERT_GE(distribution.size(), 3u);
  ASSERT_LT(distribution.size(), 7u) << "something is cut off";
  constexpr int kDraws = 40000;
  std::map<int32_t, int> sampled, drawn;
  for (int position = 0; position < kDraws; ++position) {
    SamplingContext here = context;
    here.position = position;
    ++sampled[SampleToken(logits, here).token.token];
    ++drawn[DrawToken(distribution, params.seed, position, NoiseStream::kDraft)];
  }
  double total = 0;
  for (const TokenProbability& item : distribution) {
    const double expected = kDraws * item.probability, deviation = 5 * std::sqrt(expected);
    EXPECT_NEAR(sampled[item.token], expected, deviation) << item.token;
    EXPECT_NEAR(drawn[item.token], expected, deviation) << item.token;
    total += item.probability;
  }
  EXPECT_NEAR(total, 1, 1e-5);
  EXPECT_EQ(sampled.size(), distribution.size());
  EXPECT_TRUE(std::is_sorted(distribution.begin(), distribution.end(),
                             [](const auto& a, const auto& b) { return a.token < b.token; }));
}

TEST(SamplerTest, NoiseStreamsAreIndependentAndTakenTokensScoreAlike) {
  EXPECT_NE(GumbelNoise(1, 2, 3, NoiseStream::kTarget), GumbelNoise(1, 2, 3, NoiseStream::kDraft));
  EXPECT_NE(UniformNoise(1, 2, 0, NoiseStream::kAcceptance), UniformNoise(1, 2, 1, NoiseStream::kAcceptance));
  const SamplingParams params = Params([](SamplingParams* p) { p->logprobs = 2; });
  const std::vector<float> logits = {1, 3, 2, 0};
  PenaltyHistory history({});
  const SamplingContext context{.params = &params, .history = &history, .banned = {}, .position = 4};
  const SampleResult sampled = SampleToken(logits, context);
  const SampleResult taken = TakeToken(logits, context, sampled.token.token);
  EXPECT_EQ(taken.token.logprob, sampled.token.logprob);
  ASSERT_EQ(taken.token.top_logprobs.size(), 2u);
  EXPECT_EQ(taken.token.top_logprobs[0].token, 1);
}

}  // namespace
}  // namespace linspec
