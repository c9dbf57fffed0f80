// What a drafter believes about the target's next choice, given its own logits: likely tokens, and how likely each is.
//
// Threads: pure functions.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "models/sampling_params.h"

namespace linspec {

struct DraftCandidate {
  int32_t token;
  float probability;  // that the target chooses it
};

// The k likeliest choices of the target at `position`, best first; fewer if the logits offer fewer (NaN and -Inf are
// never chosen). Greedy: the softmax of the logits. Sampled: the target will add the same noise to much the same
// logits, so candidates are the best by noisy score, and their odds are those of the noisy scores.
std::vector<DraftCandidate> LikelyChoices(std::span<const float> logits, const SamplingParams& sampling,
                                          int64_t position, int k);

}  // namespace linspec
