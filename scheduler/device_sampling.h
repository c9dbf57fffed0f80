// How a request's sampling parameters become the per-row form in which a model chooses tokens itself.
//
// Whatever the model does not know (logprobs, typical_p, allowed and banned tokens) is chosen on the host from
// downloaded logits, by the same rules: a request is wholly one or the other, so its text does not depend on what its
// neighbours ask for. Pure functions; engine thread.
#pragma once

#include <cstdint>
#include <span>

#include "models/draft_tree.h"
#include "models/model.h"
#include "scheduler/acceptance.h"

namespace linspec {

// Only with Gumbel coupling: the other ways of acceptance need the distribution.
bool ChosenOnDevice(const SamplingParams& params, AcceptanceMode acceptance);

// Whether rows after so many more tokens, and all before, will be chosen like the row under way but for positions,
// whatever the tokens: without penalties, and on the same side of min_tokens. REQUIRES: ChosenOnDevice.
bool ChosenAlike(const WalkInput& input, int64_t more_tokens);

// Appends one RowSampling for each node of tree, and the logit edits of its history: prompt and output so far, and the
// nodes above it. A request that is chosen on the host gets rows that choose greedily, without edits, to be ignored.
void AppendRowSampling(const DraftTree& tree, const WalkInput& input, VerifyBatch* batch);

}  // namespace linspec
