// A draft tree that grows level by level along the likeliest paths, for drafters that ask a model for one level's
// logits after the other. It knows candidates and their probabilities; whoever grows it knows where the logits come
// from.
//
// Ownership: borrows the context. Threads: engine thread only.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "models/draft_candidates.h"
#include "models/drafter.h"

namespace linspec {

struct GrowthOptions {
  int max_depth = 4;            // drafted tokens on a path
  int top_k = 1;                // children of a node, and nodes looked at per level; 1: a chain
  float min_confidence = 0.3f;  // no children for a node whose likeliest token is less probable than this

  absl::Status Validate() const;  // INVALID_ARGUMENT names what is out of range
};

class DraftGrowth {
 public:
  // A token that may be proposed. parent is a candidate, kPending for the pending token.
  static constexpr int kPending = -1;
  struct Candidate {
    int32_t token;
    int parent;
    int depth;                                        // 1 below the pending token
    float probability;                                // of the path to it, as the draft sees it
    std::vector<TokenProbability> distribution = {};  // it was drawn from, if independently
  };

  DraftGrowth(const DraftContext* context, GrowthOptions options) : context_(context), options_(options) {}

  const DraftContext& context() const { return *context_; }
  const Candidate& candidate(int index) const { return candidates_[index]; }
  // Tokens to propose at most: the context's nodes less the root.
  int budget() const;

  // What follows the candidate `parent` (or the pending token) by its logits [V].
  void AddChildren(int parent, std::span<const float> logits);
  // The same by its likely choices, best first. REQUIRES: a context that is not drawn for independently.
  void AddChoices(int parent, std::span<const DraftCandidate> choices);
  // The likeliest candidates of this depth, best first, at most top_k and `room`: those whose children promise to be
  // worth the level.
  // Empty: the tree is as deep as it may be, or nothing is likely enough.
  std::vector<int> NextLevel(int depth, int room) const;
  // The most probable candidates that the budget allows, as a tree. The growth is used up.
  DraftTree TakeTree();

 private:
  const DraftContext* context_;
  GrowthOptions options_;
  // Of the path to a candidate, or to the pending token.
  int DepthOf(int candidate) const { return candidate == kPending ? 0 : candidates_[candidate].depth; }
  float ProbabilityOf(int candidate) const { return candidate == kPending ? 1.0f : candidates_[candidate].probability; }

  std::vector<Candidate> candidates_;
};

}  // namespace linspec
