// What draft heads guess for the next tokens of several requests, from the target's final hidden states: the part of a
// drafter that computes. Whoever uses it grows the trees. Heads on the CPU read the hidden states that the engine hands
// out; heads on a GPU read them where the target left them and return the candidates only.
//
// Threads: engine thread only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "models/draft_candidates.h"
#include "models/drafter.h"

struct LinspecCudaDrafter;

namespace linspec {

// [num_contexts][num_levels][top_k], best first; token -1 where there are no more.
struct DraftGuesses {
  int num_levels, top_k;
  std::vector<DraftCandidate> candidates;

  std::span<DraftCandidate> Slots(size_t context, int level) {
    return std::span(candidates).subspan((context * num_levels + level) * top_k, top_k);
  }
  // Those that are there.
  std::span<const DraftCandidate> At(size_t context, int level) const {
    const std::span<const DraftCandidate> all =
        std::span(candidates).subspan((context * num_levels + level) * top_k, top_k);
    return all.first(std::ranges::find(all, -1, &DraftCandidate::token) - all.begin());
  }
};

class DraftGuesser {
 public:
  virtual ~DraftGuesser() = default;
  virtual int max_levels() const = 0;
  virtual int max_top_k() const = 0;
  // From DraftContext::hidden, which costs a download from a GPU; else from hidden_row.
  virtual bool reads_hidden() const = 0;
  virtual LinspecCudaDrafter* cuda() const { return nullptr; }  // on a GPU: for a model there that asks them itself
  // Whether what it reads is there: a sequence has no hidden state before its first step.
  virtual bool CanGuess(const DraftContext& context) const = 0;
  // Level n guesses the token n + 1 after the pending one. REQUIRES: CanGuess of each; levels and top_k in range.
  virtual absl::StatusOr<DraftGuesses> Guess(std::span<const DraftContext* const> contexts, int num_levels,
                                             int top_k) = 0;
};

}  // namespace linspec
