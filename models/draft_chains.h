// Whole chains from a draft model in one call, where the model can choose tokens level after level without its caller:
// what DraftModelDrafter asks for instead of one forward a level.
//
// Threads: engine thread only.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "models/draft_guesser.h"
#include "models/drafter.h"
#include "models/model.h"
#include "models/state_pool.h"

namespace linspec {

class DraftChains {
 public:
  virtual ~DraftChains() = default;
  virtual int max_levels() const = 0;
  virtual int max_top_k() const = 0;
  // known: of each context the tokens that its slot lacks, as a chain that ends with the pending one. Level n guesses
  // the token n + 1 after it, each level after the best guess of the level before, by LikelyChoices of the context's
  // sampling. Writes no state. REQUIRES: at most 5 tokens a request, which are none of independent draws; levels and
  // top_k in range.
  virtual absl::StatusOr<DraftGuesses> Guess(const VerifyBatch& known, const StatePool& pool,
                                             std::span<const DraftContext* const> contexts, int num_levels,
                                             int top_k) = 0;
  // looked_at: LookedAt of the last Guess: behind each request's tokens its best guesses but for the last level's.
  // Paths as for Model::Commit. Once for each Guess.
  virtual absl::Status Commit(const VerifyBatch& looked_at, std::span<const std::vector<int32_t>> paths,
                              StatePool* pool) = 0;
};

// known with the tokens that Guess looked at: what Commit takes.
VerifyBatch LookedAt(const VerifyBatch& known, const DraftGuesses& guesses);

}  // namespace linspec
