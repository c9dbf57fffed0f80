// What 16-bit states are rounded by: to a neighbour, right on average, so that small sums are not lost.
#include "kernels/state_rounding.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "kernels/dtype.h"

namespace linspec {
namespace {

TEST(StateRoundingTest, GivesOneOfTheTwoNeighboursAndTheValueOnAverage) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (int trial = 0; trial < 50; ++trial) {
    const float value = normal(random) * std::exp(3 * normal(random));
    const float below = BFloat16ToFloat(StochasticBFloat16(value, 0) & 0xffff);
    const double ulp = std::ldexp(1.0, std::ilogb(value) - 7);
    double sum = 0;
    constexpr int kTries = 20000;
    for (int i = 0; i < kTries; ++i) {
      const double rounded = BFloat16ToFloat(StochasticBFloat16(value, RoundingKey(1, trial) + i));
      ASSERT_LT(std::abs(rounded - value), ulp) << value;
      sum += rounded;
    }
    EXPECT_LT(std::abs(below - value), ulp);
    EXPECT_NEAR(sum / kTries, value, 5 * ulp * 0.5 / std::sqrt(kTries)) << value;  // five standard deviations at most
  }
}

TEST(StateRoundingTest, WhatFitsStays) {
  for (const float value : {0.0f, -0.0f, 1.0f, -2.5f, 3e38f, std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity()}) {
    const uint16_t stored = FloatToBFloat16(value);
    for (uint32_t key = 0; key < 1000; ++key) EXPECT_EQ(StochasticBFloat16(BFloat16ToFloat(stored), key), stored);
  }
  for (uint32_t key = 0; key < 1000; ++key) {
    EXPECT_TRUE(std::isnan(BFloat16ToFloat(StochasticBFloat16(std::numeric_limits<float>::quiet_NaN(), key))));
  }
}

// 16,384 groups, a million tokens: to nearest, the sum stops at 256 times what a group adds, and a decay of 1/1,024 a
// fold does nothing at all.
TEST(StateRoundingTest, LongSumsAndSlowDecaysAreNotLost) {
  float nearest = 0, decayed_nearest = 1;
  double sum = 0, decayed = 0;
  constexpr int kElements = 64, kFolds = 16384;
  for (int element = 0; element < kElements; ++element) {
    float stochastic = 0, decayed_stochastic = 1;
    for (int group = 0; group < kFolds; ++group) {
      const uint32_t key = RoundingKey(0, group) + element;
      stochastic = BFloat16ToFloat(StochasticBFloat16(stochastic + 1, key));
      if (group < 1024) {
        decayed_stochastic = BFloat16ToFloat(StochasticBFloat16(decayed_stochastic * (1 - 1.0f / 1024), key));
      }
    }
    sum += stochastic / kElements;
    decayed += decayed_stochastic / kElements;
  }
  for (int group = 0; group < kFolds; ++group) {
    nearest = BFloat16ToFloat(FloatToBFloat16(nearest + 1));
    decayed_nearest = BFloat16ToFloat(FloatToBFloat16(decayed_nearest * (1 - 1.0f / 1024)));
  }
  EXPECT_EQ(nearest, 256);
  EXPECT_EQ(decayed_nearest, 1);
  EXPECT_NEAR(sum, kFolds, 0.03 * kFolds);
  EXPECT_NEAR(decayed, std::exp(-1.0), 0.03);
}

}  // namespace
}  // namespace linspec
