// Tokens that a request allows or forbids.
#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"
#include "models/sampler.h"

namespace linspec {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int kDraws = 200;

SampleResult Sample(const std::vector<float>& logits, const SamplingParams& params, int64_t position,
                    std::vector<int32_t> prompt = {}, std::vector<int32_t> output = {}) {
  PenaltyHistory history(prompt);
  for (const int32_t token : output) history.Push(token);
  return SampleToken(logits, {.params = &params, .history = &history, .banned = {}, .position = position});
}

TEST(SamplerBans, AllowedTokensKeepTheirOddsAndTheirNoise) {
  const std::vector<float> logits = {0, 1, 2, 3}, masked = {-kInf, 1, -kInf, 3};
  SamplingParams allowed, all;
  allowed.allowed_token_ids = {3, 1, 3};
  for (int64_t position = 0; position < kDraws; ++position) {
    const int32_t token = Sample(logits, allowed, position).token.token;
    EXPECT_TRUE(token == 1 || token == 3);
    EXPECT_EQ(token, Sample(masked, all, position).token.token);
  }
}

TEST(SamplerBans, ABannedSequenceBansItsLastTokenOnlyWhereItsBeginningStands) {
  SamplingParams params;
  params.temperature = 0;
  params.banned_sequences = {{5, 3}, {2}};
  const std::vector<float> logits = {0, 1, 9, 8, 7, 6};
  EXPECT_EQ(Sample(logits, params, 0).token.token, 3);       // 2 never
  EXPECT_EQ(Sample(logits, params, 0, {5}).token.token, 3);  // a beginning in the prompt does not count
  EXPECT_EQ(Sample(logits, params, 0, {}, {5}).token.token, 4);
  EXPECT_EQ(Sample(logits, params, 0, {}, {5, 1}).token.token, 3);
}

TEST(SamplerBans, NothingLeftIsReported) {
  SamplingParams params;
  params.allowed_token_ids = {1};
  params.banned_sequences = {{1}};
  EXPECT_FALSE(Sample({0, 1, 2}, params, 0).ok);
  EXPECT_TRUE(TokenDistribution(std::vector<float>{0, 1, 2}, {&params, nullptr, {}, 0}).empty());
}

TEST(SamplerBans, IdsAreChecked) {
  SamplingParams params;
  params.allowed_token_ids = {0, 9};
  EXPECT_EQ(params.Validate(10), absl::OkStatus());
  params.allowed_token_ids = {0, 10};
  EXPECT_NE(std::string(params.Validate(10).message()).find("allowed_token_ids[1] = 10"), std::string::npos);
  params.allowed_token_ids = {};
  for (const std::vector<int32_t>& bad : {std::vector<int32_t>{}, {-1}, {1, 10}}) {
    params.banned_sequences = {{3}, bad};
    EXPECT_NE(std::string(params.Validate(10).message()).find("banned_sequences[1]"), std::string::npos);
  }
}

}  // namespace
}  // namespace linspec
