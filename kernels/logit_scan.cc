#include "kernels/logit_scan.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

// Loops below are written so that the compiler vectorises them; the loader picks the widest clone that the processor
// runs.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define LINSPEC_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define LINSPEC_CLONES
#endif

namespace linspec {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int kLanes = 32;
constexpr float kLn2 = 0.69314718f;
constexpr float kLargestGumbel = 22.9f;  // 32 random bits bound the noise: 33 ln 2 = 22.87

// The largest of n values, and whether one is NaN. n is a multiple of kLanes.
LINSPEC_CLONES float LaneMaximum(const float* x, int64_t n, int32_t* nans) {
  std::array<float, kLanes> best;
  std::array<int32_t, kLanes> unordered{};
  best.fill(kMinusInfinity);
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float value = x[i + lane];
      best[lane] = value > best[lane] ? value : best[lane];
      unordered[lane] |= value != value ? 1 : 0;
    }
  }
  float max = kMinusInfinity;
  for (int lane = 0; lane < kLanes; ++lane) {
    max = std::max(max, best[lane]);
    *nans |= unordered[lane];
  }
  return max;
}

// exp(x) for x <= 0 within 3 %: the exponent's bits from x / ln 2. Estimates need no more.
inline float RoughExp(float x) {
  return std::bit_cast<float>(static_cast<int32_t>(std::max(x, -80.0f) * 12102203.0f) + 1064986823);
}

// exp(x), -700 <= x <= 0: x = n ln 2 + r with |r| <= ln 2 / 2, exp(r) by its series to r^13 (error below 1e-16).
inline double SeriesExp(double x) {
  constexpr double kRound = 0x1.8p52;  // adding it rounds to an integer, which then stands in the low bits
  const double shifted = x * 1.4426950408889634 + kRound;
  const double n = shifted - kRound;
  const double r = (x - n * 0x1.62e42fefa38p-1) - n * 0x1.ef35793c7673p-45;
  double p = 1.0 / 6227020800;
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return p * std::bit_cast<double>((std::bit_cast<int64_t>(shifted) + 1023) << 52);
}

}  // namespace

LogitMaximum FindLogitMaximum(std::span<const float> logits) {
  const int64_t whole = std::ssize(logits) / kLanes * kLanes;
  int32_t nans = 0;
  LogitMaximum max{LaneMaximum(logits.data(), whole, &nans), -1, false};
  for (const float value : logits.subspan(whole)) {
    max.value = value > max.value ? value : max.value;
    nans |= value != value ? 1 : 0;
  }
  max.has_nan = nans != 0;
  if (max.value == kMinusInfinity) return max;
  max.index = static_cast<int32_t>(std::find(logits.begin(), logits.end(), max.value) - logits.begin());
  return max;
}

LINSPEC_CLONES void TemperLogits(std::span<const float> logits, float max, float temperature, float* scores) {
  for (size_t i = 0; i < logits.size(); ++i) scores[i] = (logits[i] - max) / temperature;
}

double ExpNonPositive(double x) { return x > -700 ? SeriesExp(x) : 0; }

LINSPEC_CLONES double SumExpAtLeast(std::span<const float> scores, float floor) {
  constexpr int64_t kSums = 16;
  std::array<double, kSums> sums{};
  const int64_t whole = std::ssize(scores) / kSums * kSums;
  for (int64_t i = 0; i < whole; i += kSums) {
    for (int lane = 0; lane < kSums; ++lane) {
      const float score = scores[i + lane];
      // A product, since the compiler would turn a condition into a branch around the exponential.
      const double weight = (score >= floor ? 1 : 0) & (score > -700 ? 1 : 0);
      sums[lane] += SeriesExp(score > -700 ? double{score} : -700.0) * weight;
    }
  }
  double sum = 0;
  for (const double lane : sums) sum += lane;
  for (const float score : scores.subspan(whole)) sum += score >= floor && score > -700 ? SeriesExp(score) : 0.0;
  return sum;
}

LINSPEC_CLONES float RoughSumExp(std::span<const float> logits, float max, float scale) {
  std::array<float, kLanes> sums{};
  const int64_t whole = std::ssize(logits) / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += RoughExp((logits[i + lane] - max) * scale);
  }
  for (const float logit : logits.subspan(whole)) sums[0] += RoughExp((logit - max) * scale);
  float sum = 0;
  for (const float lane : sums) sum += lane;
  return sum;
}

LINSPEC_CLONES int64_t CountAtLeast(std::span<const float> scores, float floor) {
  int32_t count = 0;
  for (const float score : scores) count += score >= floor ? 1 : 0;
  return count;
}

LINSPEC_CLONES void NoiseChunkBits(const NoiseKey& key, int32_t begin, uint32_t* bits) {
  constexpr int kBlocks = kNoiseChunk / 4;
  std::array<uint32_t, kBlocks> c0, c1, c2, c3;
  for (int b = 0; b < kBlocks; ++b) {
    c0[b] = static_cast<uint32_t>(begin / 4 + b);
    c1[b] = key.stream;
    c2[b] = static_cast<uint32_t>(key.position);
    c3[b] = static_cast<uint32_t>(static_cast<uint64_t>(key.position) >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int b = 0; b < kBlocks; ++b) {
      const uint64_t x = uint64_t{0xD2511F53} * c0[b], y = uint64_t{0xCD9E8D57} * c2[b];
      c0[b] = static_cast<uint32_t>(y >> 32) ^ c1[b] ^ k0;
      c1[b] = static_cast<uint32_t>(y);
      c2[b] = static_cast<uint32_t>(x >> 32) ^ c3[b] ^ k1;
      c3[b] = static_cast<uint32_t>(x);
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  for (int b = 0; b < kBlocks; ++b) {
    bits[4 * b] = c0[b];
    bits[4 * b + 1] = c1[b];
    bits[4 * b + 2] = c2[b];
    bits[4 * b + 3] = c3[b];
  }
}

// With E = -log(1 - u) >= u >= 2^-(leading zeros + 1) the noise -log E is at most (leading zeros + 1) ln 2. The zeros
// are read from the exponent of the upper 24 bits, which a float holds exactly; of fewer bits it takes too many, never
// too few.
LINSPEC_CLONES bool NoisyScoreMayReach(const float* scores, const uint32_t* bits, int count, float floor) {
  int32_t any = 0;
  for (int i = 0; i < count; ++i) {
    const auto exponent = std::bit_cast<int32_t>(static_cast<float>(static_cast<int32_t>(bits[i] >> 8))) >> 23;
    const float bound = static_cast<float>(151 - exponent) * kLn2 + 1e-4f;
    any |= scores[i] + bound >= floor ? 1 : 0;
  }
  return any != 0;
}

LINSPEC_CLONES bool ScoreMayReach(const float* scores, int count, float floor) {
  int32_t any = 0;
  for (int i = 0; i < count; ++i) any |= scores[i] + kLargestGumbel >= floor ? 1 : 0;
  return any != 0;
}

}  // namespace linspec
