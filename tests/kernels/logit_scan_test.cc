// The vectorised passes against the plain loops that they stand for.
#include "kernels/logit_scan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/philox.h"

namespace linspec {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> RandomRow(int size, uint32_t seed, float spread = 5) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> row(size);
  for (float& value : row) value = normal(random);
  return row;
}

TEST(LogitScanTest, MaximumIsTheFirstLargestAndNansAreSeenAnywhere) {
  for (const int size : {1, 2, 31, 32, 33, 63, 64, 100, 1000}) {
    std::vector<float> row = RandomRow(size, size);
    const auto largest = std::max_element(row.begin(), row.end());
    LogitMaximum max = FindLogitMaximum(row);
    EXPECT_EQ(max.value, *largest) << size;
    EXPECT_EQ(max.index, largest - row.begin()) << size;
    EXPECT_FALSE(max.has_nan);
    row.back() = *largest;
    EXPECT_EQ(FindLogitMaximum(row).index, std::max_element(row.begin(), row.end()) - row.begin()) << "a tie";
    for (int at = 0; at < size; ++at) {
      std::vector<float> spoiled = row;
      spoiled[at] = kNan;
      EXPECT_TRUE(FindLogitMaximum(spoiled).has_nan) << at << " of " << size;
    }
  }
  const LogitMaximum nothing = FindLogitMaximum(std::vector<float>(70, -kInf));
  EXPECT_EQ(nothing.value, -kInf);
  EXPECT_EQ(nothing.index, -1);
  EXPECT_EQ(FindLogitMaximum({}).index, -1);
}

TEST(LogitScanTest, SumsAreThoseOfTheMathLibrary) {
  for (const int size : {1, 15, 16, 17, 40, 8192}) {
    std::vector<float> scores = RandomRow(size, size, 20);
    const float max = *std::max_element(scores.begin(), scores.end());
    TemperLogits(scores, max, 0.7f, scores.data());
    for (const float score : scores) EXPECT_LE(score, 0.0f);
    if (size > 20) scores[7] = -kInf, scores[19] = kNan;
    for (const float floor : {-kInf, -30.0f, -2.0f}) {
      double sum = 0;
      int64_t count = 0;
      for (const float score : scores) {
        if (score >= floor) sum += std::exp(double{score});
        count += score >= floor ? 1 : 0;
      }
      EXPECT_NEAR(SumExpAtLeast(scores, floor) / sum, 1, 1e-13) << size << " from " << floor;
      EXPECT_EQ(CountAtLeast(scores, floor), count);
    }
  }
  for (double x = 0; x > -690; x -= 0.37) EXPECT_NEAR(ExpNonPositive(x) / std::exp(x), 1, 1e-14) << x;
  EXPECT_EQ(ExpNonPositive(0), 1);
  EXPECT_EQ(ExpNonPositive(-1e30), 0);
}

TEST(LogitScanTest, RoughSumIsWithinThreePercent) {
  const std::vector<float> row = RandomRow(1000, 4);
  const float max = *std::max_element(row.begin(), row.end());
  double sum = 0;
  for (const float logit : row) sum += std::exp(double{logit - max} * 0.8);
  EXPECT_NEAR(RoughSumExp(row, max, 0.8f) / sum, 1, 0.03);
}

TEST(LogitScanTest, ChunkBitsAreThePhiloxWordsOfTheirTokens) {
  for (const int64_t position : {int64_t{0}, int64_t{7}, int64_t{1} << 40}) {
    const NoiseKey key{0x123456789abcdef0, position, 3};
    for (const int32_t begin : {0, 32, 4096}) {
      std::array<uint32_t, kNoiseChunk> bits;
      NoiseChunkBits(key, begin, bits.data());
      for (int i = 0; i < kNoiseChunk; ++i) {
        const auto block = Philox4x32({static_cast<uint32_t>((begin + i) / 4), key.stream,
                                       static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32)},
                                      {static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32)});
        EXPECT_EQ(bits[i], block[i % 4]) << begin << " + " << i;
      }
    }
  }
}

// The bound may let a score through that does not reach the floor; it may never hold one back that does.
TEST(LogitScanTest, NothingThatReachesTheFloorIsHeldBack) {
  const auto gumbel = [](uint32_t bits) { return static_cast<float>(-std::log(-std::log1p(-(bits + 0.5) * 0x1p-32))); };
  std::mt19937 random(9);
  std::vector<uint32_t> words = {0,          1,          2,          127,        128,        255,
                                 256,        257,        511,        512,        0x7fffff,   0x800000,
                                 0x00ffffff, 0x01000000, 0x7fffffff, 0x80000000, 0xfffffeff, 0xffffffff};
  for (int i = 0; i < 20000; ++i) words.push_back(static_cast<uint32_t>(random()) >> random() % 32);
  int held_back = 0;
  for (const uint32_t word : words) {
    const float score = -static_cast<float>(random() % 1000) / 50, noisy = score + gumbel(word);
    for (const float floor : {noisy, std::nextafter(noisy, -kInf), noisy - 1}) {
      EXPECT_TRUE(NoisyScoreMayReach(&score, &word, 1, floor)) << word;
      EXPECT_TRUE(ScoreMayReach(&score, 1, floor)) << word;
    }
    held_back += NoisyScoreMayReach(&score, &word, 1, noisy + 1.5f) ? 0 : 1;
  }
  EXPECT_GT(held_back, 10000) << "the bound is worth nothing";
  const float minus_infinity = -kInf;
  EXPECT_TRUE(ScoreMayReach(&minus_infinity, 1, -kInf));
  EXPECT_FALSE(ScoreMayReach(&minus_infinity, 1, 0));
  const std::vector<float> low(kNoiseChunk, -100.0f);
  EXPECT_FALSE(ScoreMayReach(low.data(), kNoiseChunk, 0));
}

}  // namespace
}  // namespace linspec
