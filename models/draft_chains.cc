#include "models/draft_chains.h"

#include "models/verify_batch.h"

namespace linspec {

VerifyBatch LookedAt(const VerifyBatch& known, const DraftGuesses& guesses) {
  VerifyBatch grown;
  for (int r = 0; r < known.num_requests(); ++r) {
    DraftTree chain;
    for (int node = 0; node < NumNodes(known, r); ++node) {
      chain.Add(known.tokens[known.row_starts[r] + node], node - 1);
    }
    for (int level = 0; level + 1 < guesses.num_levels; ++level) {
      const std::span<const DraftCandidate> choices = guesses.At(r, level);
      chain.Add(choices.empty() ? 0 : choices.front().token, chain.num_nodes() - 1);
    }
    grown.Add(known.slots[r], chain);
  }
  return grown;
}

}  // namespace linspec
