// Prompt lookup: proposes what followed the last time the sequence's final tokens occurred in it. No weights.
//
// Each sequence keeps a hash index from its n-grams (4, 3 and 2 tokens) to the two latest places that followed them,
// extended by what is new at each call: O(1) per token. The longest match wins; where its two places continue
// differently, the second becomes a branch of the tree. A hash collision costs a bad draft, nothing else.
//
// Threads: engine thread only. Memory: about 100 bytes per token and n-gram length, until Forget.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "models/drafter.h"

namespace linspec {

class NgramDrafter : public Drafter {
 public:
  std::string_view name() const override { return "ngram"; }
  absl::StatusOr<std::vector<DraftTree>> Propose(std::span<const DraftContext> contexts) override;
  void Forget(uint64_t sequence_id) override { indices_.erase(sequence_id); }
  size_t num_sequences() const { return indices_.size(); }

 private:
  static constexpr int kShortest = 2, kLongest = 4;
  struct Places {
    int64_t latest = -1, previous = -1;     // index of the token after the n-gram
  };
  struct Index {
    int64_t num_indexed = 0;                // tokens whose n-grams (ending there) are in the maps
    std::array<std::unordered_map<uint64_t, Places>, kLongest - kShortest + 1> maps;
  };

  static void Extend(std::span<const int32_t> tokens, Index* index);
  static Places Find(std::span<const int32_t> tokens, const Index& index);

  std::unordered_map<uint64_t, Index> indices_;
};

}  // namespace linspec
