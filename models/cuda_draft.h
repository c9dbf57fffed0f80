// What drafting on a GPU tells the plugin, and what it reads back.
#pragma once

#include <cstdint>

#include "kernels/cuda/plugin_api.h"
#include "models/draft_guesser.h"
#include "models/drafter.h"

namespace linspec {

inline LinspecCudaDraftRow DraftRowOf(const DraftContext& context) {
  return {.seed = context.sampling->seed,
          .position = std::ssize(context.tokens),
          .temperature = context.sampling->temperature,
          .coupled = context.draw == DraftDraw::kCoupled,
          .token = context.tokens.back(),
          .hidden_row = context.hidden_row};
}

// The candidates of `count` rows into those of the contexts from `begin` on.
inline void ReadCandidates(const LinspecCudaDraftResult& result, size_t begin, size_t count, DraftGuesses* guesses) {
  for (size_t r = 0; r < count; ++r) {
    for (int level = 0; level < guesses->num_levels; ++level) {
      const LinspecCudaDraftCandidate* from =
          result.candidates + (int64_t{level} * result.row_stride + static_cast<int64_t>(r)) * guesses->top_k;
      for (DraftCandidate& to : guesses->Slots(begin + r, level)) {
        to = {from->token, from->probability};
        ++from;
      }
    }
  }
}

}  // namespace linspec
