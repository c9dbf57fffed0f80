#include "models/draft_candidates.h"

#include <algorithm>
#include <cmath>

#include "kernels/logit_scan.h"

namespace linspec {
namespace {

constexpr int kRivals = 8;  // candidates that odds are taken among, at least

}  // namespace

std::vector<DraftCandidate> LikelyChoices(std::span<const float> logits, const SamplingParams& sampling,
                                          int64_t position, int k, bool coupled) {
  SamplingParams noise;  // what matters of it
  noise.seed = sampling.seed;
  noise.temperature = coupled ? sampling.temperature : 0;
  const bool noisy = noise.temperature > 0;
  const float scale = !noisy && sampling.temperature > 0 ? 1 / sampling.temperature : 1.0f;
  const std::vector<ScoredToken> best = CoupledTopK(logits, noise, position, noisy ? std::max(k, kRivals) : k);
  if (best.empty()) return {};
  float sum = 0;
  if (noisy) {
    for (const ScoredToken& rival : best) sum += std::exp(rival.score - best[0].score);
  } else {
    sum = RoughSumExp(logits, best[0].score, scale);
  }
  std::vector<DraftCandidate> choices;
  for (size_t i = 0; i < std::min<size_t>(k, best.size()); ++i) {
    choices.push_back({best[i].token, std::min(std::exp((best[i].score - best[0].score) * scale) / sum, 1.0f)});
  }
  return choices;
}

std::optional<IndependentDraw> DrawIndependently(std::span<const float> logits, const SamplingParams& sampling,
                                                 int64_t position) {
  SamplingParams shape;
  shape.temperature = sampling.temperature;
  shape.top_p = sampling.top_p;
  shape.top_k = sampling.top_k;
  shape.min_p = sampling.min_p;
  shape.typical_p = sampling.typical_p;
  IndependentDraw draw;
  draw.distribution =
      TokenDistribution(logits, {.params = &shape, .history = nullptr, .banned = {}, .position = position});
  if (draw.distribution.empty()) return std::nullopt;
  const int32_t token = DrawToken(draw.distribution, sampling.seed, position, NoiseStream::kDraft);
  // Its peak stands in for how often the target agrees: of two sharp distributions more is shared than of two flat
  // ones.
  float top = 0;
  for (const TokenProbability& item : draw.distribution) top = std::max(top, item.probability);
  draw.candidate = {token, top};
  return draw;
}

}  // namespace linspec
