#include "models/bpe.h"

#include <queue>

#include "models/utf8.h"

namespace linspec {
namespace {

struct Symbol {
  int32_t id;
  int previous, next;  // neighbours in the linked list; -1: none
};

struct Candidate {
  int32_t rank;
  int left;  // index of the left symbol
  int32_t left_id, right_id, merged;
  bool operator<(const Candidate& other) const {  // priority_queue: the largest comes first
    return rank != other.rank ? rank > other.rank : left > other.left;
  }
};

}  // namespace

std::vector<int32_t> Bpe::InitialTokens(std::string_view text) const {
  std::vector<int32_t> ids;
  bool last_was_unk = false;
  while (!text.empty()) {
    const Utf8Char c = DecodeUtf8(text);
    const std::string_view piece = text.substr(0, c.length);
    text.remove_prefix(c.length);
    if (const auto it = vocabulary.find(piece); it != vocabulary.end()) {
      ids.push_back(it->second);
      last_was_unk = false;
      continue;
    }
    bool fell_back = byte_fallback;
    for (const char byte : piece) fell_back = fell_back && byte_ids[static_cast<uint8_t>(byte)] >= 0;
    if (fell_back) {
      for (const char byte : piece) ids.push_back(byte_ids[static_cast<uint8_t>(byte)]);
      last_was_unk = false;
    } else if (unk_id >= 0) {
      if (!(fuse_unk && last_was_unk)) ids.push_back(unk_id);
      last_was_unk = true;
    }
  }
  return ids;
}

void Bpe::Encode(std::string_view text, std::vector<int32_t>* ids) const {
  if (ignore_merges) {
    if (const auto it = vocabulary.find(text); it != vocabulary.end()) {
      ids->push_back(it->second);
      return;
    }
  }
  const std::vector<int32_t> initial = InitialTokens(text);
  const int n = static_cast<int>(initial.size());
  std::vector<Symbol> symbols(n);
  for (int i = 0; i < n; ++i) symbols[i] = {initial[i], i - 1, i + 1 < n ? i + 1 : -1};
  std::priority_queue<Candidate> queue;
  const auto consider = [&](int left) {
    if (left < 0 || symbols[left].next < 0) return;
    const int32_t a = symbols[left].id, b = symbols[symbols[left].next].id;
    if (const auto it = merges.find(PairKey(a, b)); it != merges.end()) {
      queue.push({it->second.rank, left, a, b, it->second.merged});
    }
  };
  for (int i = 0; i + 1 < n; ++i) consider(i);
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[best.left];
    // Stale: one of the two symbols has been merged away since (a dead symbol has id -1).
    if (left.id != best.left_id || left.next < 0 || symbols[left.next].id != best.right_id) continue;
    Symbol& right = symbols[left.next];
    left.id = best.merged;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbols[left.next].previous = best.left;
    consider(left.previous);
    consider(best.left);
  }
  for (int i = n > 0 ? 0 : -1; i >= 0; i = symbols[i].next) ids->push_back(symbols[i].id);
}

}  // namespace linspec
