// The part of the vocabulary that drafters on a CPU look at for greedy requests: the frequent half, as FR-Spec does
// (arXiv 2502.14856), and the tokens of the text so far, which replies repeat. The unembedding is most of what a level
// of a draft costs there. What is left out is never drafted; it costs acceptance, not correctness.
//
// Frequent are low numbers: tokenizers made of merges number their tokens from the most frequent pair on. SentencePiece
// puts single characters last, so commas and digits of such a model come with the text. Requests with a temperature
// draw from the tail too, so for them everything counts (docs/speculation.md has the figures). Threads: one at a time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "models/drafter.h"

namespace linspec {

class DraftVocabulary {
 public:
  explicit DraftVocabulary(int64_t vocab_size);

  // Begins the next drafts: the frequent tokens alone.
  void Clear();
  // What a draft for this context needs besides.
  void Add(const DraftContext& context);
  // VerifyBatch::logit_blocks for all that was added; empty: every token counts. Valid until the next Clear or Add.
  std::span<const int32_t> Blocks();

 private:
  std::vector<bool> wanted_;     // [blocks]; none for small vocabularies, of which everything counts
  std::vector<int32_t> blocks_;  // the wanted ones, once asked for
  bool everything_ = false;
};

}  // namespace linspec
