#include "models/draft_candidates.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "models/sampler.h"

namespace linspec {
namespace {

constexpr int kRivals = 8;  // candidates that odds are taken among, at least

// exp(x) for x <= 0 within 3 %: the exponent's bits from x / ln 2. Estimates need no more, and it vectorises.
float RoughExp(float x) {
  return std::bit_cast<float>(static_cast<int32_t>(std::max(x, -80.0f) * 12102203.0f) + 1064986823);
}

float RoughSumExp(std::span<const float> logits, float max) {
  constexpr size_t kLanes = 16;
  std::array<float, kLanes> sums{};
  size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) sums[lane] += RoughExp(logits[i + lane] - max);
  }
  for (; i < logits.size(); ++i) sums[0] += RoughExp(logits[i] - max);
  float sum = 0;
  for (const float lane : sums) sum += lane;
  return sum;
}

}  // namespace

std::vector<DraftCandidate> LikelyChoices(std::span<const float> logits, const SamplingParams& sampling,
                                          int64_t position, int k) {
  const bool greedy = sampling.temperature == 0;
  const std::vector<ScoredToken> best = CoupledTopK(logits, sampling, position, greedy ? k : std::max(k, kRivals));
  if (best.empty()) return {};
  float sum = 0;
  if (greedy) {
    sum = RoughSumExp(logits, best[0].score);
  } else {
    for (const ScoredToken& rival : best) sum += std::exp(rival.score - best[0].score);
  }
  std::vector<DraftCandidate> choices;
  for (size_t i = 0; i < std::min<size_t>(k, best.size()); ++i) {
    choices.push_back({best[i].token, std::min(std::exp(best[i].score - best[0].score) / sum, 1.0f)});
  }
  return choices;
}

}  // namespace linspec
