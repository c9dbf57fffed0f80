// Walks a draft tree from its root, choosing a token at each node and following it into the tree while it is there.
//
//   gumbel     the tokens that plain decoding would choose ("sample then match"): drafts change how many tokens a step
//              yields and nothing else. The default.
//   rejection  speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318), child after
//              child where a node has several: a child drawn from q is kept with probability min(1, p / q), else
//              what is left of p is sampled. Tokens follow the exact distribution, but which ones a seed gives
//              depends on the drafts. Accepts a little more than gumbel on chains.
//   typical    Medusa's typical acceptance (arXiv 2401.10774): a child is kept when it is likely enough,
//              p > min(0.09, 0.3 exp(-entropy)). CHANGES THE DISTRIBUTION, towards likelier text. At temperature 0
//              greedy.
//
// Pure functions.
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
  AcceptanceMode acceptance = AcceptanceMode::kGumbel;
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
