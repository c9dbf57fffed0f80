// "Sample then match": walks a draft tree with the tokens that plain decoding would choose, so drafts can only change
// how many tokens a step yields. Pure functions.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "models/draft_tree.h"
#include "models/sampler.h"
#include "scheduler/request.h"

namespace linspec {

struct WalkInput {
  const SamplingParams* params;
  PenaltyHistory* history;  // every chosen token is pushed
  std::span<const int32_t> eos_token_ids;
  int64_t position;           // of the first token to choose: one past the root's
  int64_t num_output_tokens;  // before this walk
};

struct Walk {
  bool ok = true;                                    // false: logits that nothing can be chosen from
  std::vector<int32_t> path;                         // accepted nodes, the root first
  std::vector<SampledToken> tokens;                  // chosen, in order; one per path node, less a final stop token
  FinishReason finish_reason = FinishReason::kNone;  // kStop, kLength or kNone
  int32_t stop_token = -1;
};

// The tokens that end a request: its stop tokens, and the model's unless ignore_eos.
std::vector<int32_t> EndTokens(const WalkInput& input);

// logits: [tree.num_nodes(), vocab_size]. Ends, max_tokens and min_tokens cut inside the run exactly where decoding one
// token at a time would.
Walk WalkTree(const DraftTree& tree, std::span<const float> logits, int64_t vocab_size, const WalkInput& input);
// The same with the token after each node chosen already (device_sampling.h); -1: none could be.
Walk WalkTree(const DraftTree& tree, std::span<const int32_t> sampled, const WalkInput& input);

}  // namespace linspec
