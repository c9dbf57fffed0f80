// What a drafter believes about the target's next choice, given its own logits: likely tokens, and how likely each is.
//
// Threads: pure functions.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "models/sampler.h"
#include "models/sampling_params.h"

namespace linspec {

struct DraftCandidate {
  int32_t token;
  float probability;  // that the target chooses it
};

// The k likeliest choices of the target at `position`, best first; fewer if the logits offer fewer (NaN and -Inf are
// never chosen). Coupled: the target will add the same noise to much the same logits, so candidates are the best by
// noisy score, and their odds are those of the noisy scores. Greedy or not coupled: the softmax of the tempered logits.
std::vector<DraftCandidate> LikelyChoices(std::span<const float> logits, const SamplingParams& sampling,
                                          int64_t position, int k, bool coupled);

// For rejection sampling: what a drafter draws, and from which distribution (the request's temperature and truncation,
// no penalties). Empty where the logits offer nothing.
struct IndependentDraw {
  DraftCandidate candidate;
  std::vector<TokenProbability> distribution;
};
std::optional<IndependentDraw> DrawIndependently(std::span<const float> logits, const SamplingParams& sampling,
                                                 int64_t position);

}  // namespace linspec
