#include "models/ngram_drafter.h"

#include <algorithm>
#include <array>
#include <bit>

namespace linspec {
namespace {

constexpr int kPlaceShift = 40;  // the bits above choose the entry, those below are its tag

uint64_t Mix(uint64_t hash, int32_t token) {
  hash = (hash ^ static_cast<uint32_t>(token)) * 0x9E3779B97F4A7C15;
  return hash ^ hash >> 29;
}

// Of the n tokens before `end`, the last one first, so that a longer n-gram's hash goes on from a shorter one's.
uint64_t Hash(std::span<const int32_t> tokens, int64_t end, int n) {
  uint64_t hash = 0xCBF29CE484222325;
  for (int i = 1; i <= n; ++i) hash = Mix(hash, tokens[end - i]);
  return hash;
}

// How likely the token after a match is to follow again: first guesses, which the engine corrects by what happens.
float Confidence(int match_length) {
  constexpr std::array kConfidence = {0.45f, 0.65f, 0.8f, 0.9f};  // of 2, 3, 4 and more tokens
  return kConfidence[std::clamp<int>(match_length - 2, 0, kConfidence.size() - 1)];
}

constexpr float kSecondPlace = 0.3f;  // where the older of two places differs from the newer

// Adds tokens[begin..] under the root until the tree has max_nodes; shares the nodes that are there already. Past the
// last token it starts over: a match so close to the end means that the text repeats itself.
void AddContinuation(const DraftContext& context, int64_t begin, int match_length, int max_nodes, DraftTree* tree) {
  const std::span<const int32_t> tokens = context.tokens;
  int node = 0;
  bool branched = tree->num_nodes() == 1;
  for (int64_t i = begin;; i = i + 1 < std::ssize(tokens) ? i + 1 : begin) {
    const int child = tree->FindChild(node, tokens[i]);
    if (child >= 0) {
      node = child;
    } else {
      const float probability = tree->probabilities[node] * (branched ? Confidence(match_length) : kSecondPlace);
      if (tree->num_nodes() >= max_nodes || probability < context.min_probability) return;
      branched = true;
      node = tree->Add(tokens[i], node);
      tree->probabilities.push_back(probability);
    }
    ++match_length;
  }
}

}  // namespace

// An n-gram enters the index with the token that follows it, so the final tokens never match themselves.
void NgramDrafter::Extend(std::span<const int32_t> tokens, Index* index) {
  if (2 * std::ssize(tokens) > index->size &&
      index->size < kTableSize) {  // room to grow: all that is there goes in anew
    const auto wanted = static_cast<int64_t>(std::bit_ceil(4 * tokens.size()));
    *index = {.num_indexed = 0, .size = std::clamp(wanted, kSmallestTable, kTableSize), .tables = {}};
    for (std::vector<Entry>& table : index->tables) table.resize(index->size);
  }
  index->num_indexed = std::max(index->num_indexed, std::ssize(tokens) - kMaxBacklog);
  const uint64_t places = index->size - 1;
  for (; index->num_indexed < std::ssize(tokens); ++index->num_indexed) {
    const int64_t next = index->num_indexed;
    if (next < kShortest) continue;
    uint64_t hash = Hash(tokens, next, kShortest);
    for (int n = kShortest; n <= kLongest && n <= next; ++n) {
      if (n > kShortest) hash = Mix(hash, tokens[next - n]);
      Entry& entry = index->tables[n - kShortest][hash >> kPlaceShift & places];
      const auto tag = static_cast<uint32_t>(hash);
      entry = {.tag = tag, .latest = static_cast<int32_t>(next), .previous = entry.tag == tag ? entry.latest : -1};
    }
  }
}

NgramDrafter::Match NgramDrafter::Find(std::span<const int32_t> tokens, const Index& index) {
  for (int n = kLongest; n >= kShortest; --n) {
    if (std::ssize(tokens) < n) continue;
    const uint64_t hash = Hash(tokens, std::ssize(tokens), n);
    const Entry& entry = index.tables[n - kShortest][hash >> kPlaceShift & (index.size - 1)];
    if (entry.latest >= 0 && entry.tag == static_cast<uint32_t>(hash)) return {entry, n};
  }
  return {};
}

absl::StatusOr<std::vector<DraftTree>> NgramDrafter::Propose(std::span<const DraftContext> contexts) {
  std::vector<DraftTree> trees;
  for (const DraftContext& context : contexts) {
    DraftTree tree = DraftTree::Root(context.tokens.back());
    Index& index = indices_[context.sequence_id];
    Extend(context.tokens, &index);
    const auto [places, length] = Find(context.tokens, index);
    tree.probabilities = {1.0f};
    if (context.max_nodes > 1 && places.latest >= 0) {
      tree.Reserve(context.max_nodes);
      // The latest place gets most of the nodes; a quarter is kept for the other continuation.
      const int reserved = places.previous >= 0 ? (context.max_nodes - 1) / 4 : 0;
      AddContinuation(context, places.latest, length, context.max_nodes - reserved, &tree);
      if (places.previous >= 0) AddContinuation(context, places.previous, length, context.max_nodes, &tree);
    }
    trees.push_back(std::move(tree));
  }
  return trees;
}

}  // namespace linspec
