#include "loadtest/statistics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace linspec::loadtest {
namespace {

TEST(Percentile, InterpolatesBetweenRanks) {
  const std::vector<double> values = {1, 2, 3, 4};
  EXPECT_DOUBLE_EQ(Percentile(values, 0), 1);
  EXPECT_DOUBLE_EQ(Percentile(values, 50), 2.5);
  EXPECT_DOUBLE_EQ(Percentile(values, 90), 3.7);
  EXPECT_DOUBLE_EQ(Percentile(values, 100), 4);
}

TEST(Percentile, OneValueAndNone) {
  EXPECT_DOUBLE_EQ(Percentile(std::vector<double>{7}, 99), 7);
  EXPECT_DOUBLE_EQ(Percentile({}, 99), 0);
}

TEST(Summarize, SortsFirst) {
  const Summary summary = Summarize({4, 2}, std::vector<double>{50, 100});
  EXPECT_DOUBLE_EQ(summary.mean, 3);
  EXPECT_DOUBLE_EQ(summary.median, 3);
  EXPECT_DOUBLE_EQ(summary.std, 1);
  EXPECT_EQ(summary.percentiles, (std::vector<double>{3, 4}));
}

struct GapMoments {
  double mean, variation;  // variation: standard deviation over mean
};
GapMoments Gaps(double rate, double burstiness) {
  ArrivalGenerator arrivals(rate, burstiness, 42);
  constexpr int kCount = 20000;
  double last = 0, sum = 0, squares = 0;
  for (int i = 0; i < kCount; ++i) {
    const double now = arrivals.Next(), gap = now - last;
    EXPECT_GE(gap, 0);
    last = now;
    sum += gap;
    squares += gap * gap;
  }
  const double mean = sum / kCount;
  return {mean, std::sqrt(squares / kCount - mean * mean) / mean};
}

TEST(ArrivalGenerator, PoissonGapsHaveTheirMeanAndUnitVariation) {
  const GapMoments gaps = Gaps(50, 1);
  EXPECT_NEAR(gaps.mean, 0.02, 0.0005);
  EXPECT_NEAR(gaps.variation, 1, 0.03);
}

TEST(ArrivalGenerator, BurstinessKeepsTheRate) {
  const GapMoments bursty = Gaps(50, 0.25);
  EXPECT_NEAR(bursty.mean, 0.02, 0.001);
  EXPECT_NEAR(bursty.variation, 2, 0.1);
  EXPECT_NEAR(Gaps(50, 4).variation, 0.5, 0.02);
}

TEST(ArrivalGenerator, InfiniteRateIsAllAtOnce) {
  ArrivalGenerator arrivals(std::numeric_limits<double>::infinity(), 1, 0);
  EXPECT_EQ(arrivals.Next(), 0);
  EXPECT_EQ(arrivals.Next(), 0);
}

TEST(ArrivalGenerator, SameSeedSameTimes) {
  ArrivalGenerator a(10, 1, 7), b(10, 1, 7), c(10, 1, 8);
  const double first = a.Next();
  EXPECT_EQ(first, b.Next());
  EXPECT_NE(first, c.Next());
}

}  // namespace
}  // namespace linspec::loadtest
