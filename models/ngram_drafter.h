// Prompt lookup: proposes what followed the last time the sequence's final tokens occurred in it. No weights.
//
// Each sequence keeps an index from its n-grams (4, 3 and 2 tokens) to the two latest places that followed them,
// extended by what is new at each call: O(1) per token. The longest match wins; where its two places continue
// differently, the second becomes a branch of the tree. The index is a fixed table in which new n-grams displace old
// ones, so like a state it does not grow with the context. A hash collision costs a bad draft, nothing else.
//
// Threads: engine thread only.
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
  int64_t bytes_per_request() const override {  // at most
    return kNumLengths * kTableSize * static_cast<int64_t>(sizeof(Entry));
  }
  bool costs_nothing() const override { return true; }
  size_t num_sequences() const { return indices_.size(); }

 private:
  static constexpr int kShortest = 2, kLongest = 4, kNumLengths = kLongest - kShortest + 1;
  static constexpr int64_t kSmallestTable = 1 << 8, kTableSize = 1 << 14;  // entries
  static constexpr int64_t kMaxBacklog = 2 * kTableSize;  // older tokens of a long prompt would be displaced anyway
  struct Entry {
    uint32_t tag = 0;                    // the hash bits that do not choose the entry
    int32_t latest = -1, previous = -1;  // index of the token after the n-gram
  };
  struct Index {
    int64_t num_indexed = 0;  // tokens that were looked at
    int64_t size = 0;         // of each table, a power of two
    std::array<std::vector<Entry>, kNumLengths> tables;
  };

  static void Extend(std::span<const int32_t> tokens, Index* index);
  struct Match {
    Entry entry;
    int length = 0;  // tokens
  };
  static Match Find(std::span<const int32_t> tokens, const Index& index);

  std::unordered_map<uint64_t, Index> indices_;
};

}  // namespace linspec
