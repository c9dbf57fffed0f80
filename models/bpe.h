// Byte-pair encoding of one pre-token: repeatedly merges the adjacent pair of lowest rank.
//
// Threads: const after construction.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace linspec {

struct StringHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};
using Vocabulary = std::unordered_map<std::string, int32_t, StringHash, std::equal_to<>>;

class Bpe {
 public:
  struct Merge {
    int32_t rank;
    int32_t merged;  // id of the joined token
  };

  Vocabulary vocabulary;
  std::unordered_map<uint64_t, Merge> merges;  // key: PairKey(left, right)
  int32_t unk_id = -1;
  bool fuse_unk = false;
  bool byte_fallback = false;
  bool ignore_merges = false;  // a pre-token that is a whole token is taken as it is
  int32_t byte_ids[256];       // byte_fallback: id of <0xNN>, -1 if absent

  static uint64_t PairKey(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }

  // Appends the ids of `text` (valid UTF-8). O(n log n). Characters that are neither in the vocabulary nor covered by
  // byte fallback or unk are dropped, as the reference implementation does.
  void Encode(std::string_view text, std::vector<int32_t>* ids) const;

 private:
  std::vector<int32_t> InitialTokens(std::string_view text) const;
};

}  // namespace linspec
