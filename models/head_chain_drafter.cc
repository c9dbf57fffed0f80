#include "models/head_chain_drafter.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace linspec {
namespace {

struct Candidate {
  int32_t token;
  int parent;  // candidate, -1: the root
  float probability;
};

int Budget(const DraftContext& context) { return std::min(context.max_nodes, kMaxTreeNodes) - 1; }

int MostLevels(const DraftContext& context) { return std::min(Budget(context), context.max_levels); }

// Of the first num_levels levels, without what the engine holds not worth verifying.
std::vector<Candidate> Candidates(const DraftContext& context, const DraftGuesses& guesses, size_t index,
                                  int num_levels) {
  std::vector<Candidate> candidates;
  // All levels are computed together, so a node has to be worth its share of them too.
  const float least = std::max(context.min_probability, context.min_level_probability);
  int parent = -1;
  float path = 1;
  for (int level = 0; level < num_levels; ++level) {
    const std::span<const DraftCandidate> choices = guesses.At(index, level);
    if (choices.empty() || path * choices[0].probability < least) break;
    const int above = std::exchange(parent, static_cast<int>(candidates.size()));
    for (size_t i = 0; i < choices.size(); ++i) {
      const float probability = path * choices[i].probability;
      if (probability < least) break;
      candidates.push_back({choices[i].token, above, probability});
    }
    path *= choices[0].probability;
  }
  return candidates;
}

// The most probable candidates that the budget allows. A path is never likelier than its beginning, so they contain
// their parents, and come after them.
DraftTree Tree(const DraftContext& context, const std::vector<Candidate>& candidates) {
  std::vector<int> order(candidates.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return candidates[a].probability > candidates[b].probability; });
  order.resize(std::min<size_t>(order.size(), Budget(context)));
  DraftTree tree = DraftTree::Root(context.tokens.back());
  tree.probabilities = {1.0f};
  std::vector<int> node_of(candidates.size(), 0);
  for (const int i : order) {
    node_of[i] = tree.Add(candidates[i].token, candidates[i].parent < 0 ? 0 : node_of[candidates[i].parent]);
    tree.probabilities.push_back(candidates[i].probability);
  }
  return tree;
}

}  // namespace

absl::StatusOr<std::unique_ptr<HeadChainDrafter>> HeadChainDrafter::Create(std::string name,
                                                                           std::unique_ptr<DraftGuesser> heads,
                                                                           HeadChainOptions options) {
  if (options.max_depth < 1 || options.top_k < 1 || options.top_k > heads->max_top_k()) {
    return absl::InvalidArgumentError(
        fmt::format("{} options out of range: max_depth {} (1 or more), top_k {} (1 to {})", name, options.max_depth,
                    options.top_k, heads->max_top_k()));
  }
  options.max_depth = std::min(options.max_depth, heads->max_levels());
  return std::unique_ptr<HeadChainDrafter>(new HeadChainDrafter(std::move(name), std::move(heads), options));
}

absl::StatusOr<std::vector<DraftTree>> HeadChainDrafter::Propose(std::span<const DraftContext> contexts) {
  std::vector<DraftTree> trees;
  std::vector<size_t> indices;
  std::vector<const DraftContext*> drafted;
  int wanted = 0;
  for (size_t i = 0; i < contexts.size(); ++i) {
    trees.push_back(DraftTree::Root(contexts[i].tokens.back()));
    if (contexts[i].max_nodes <= 1 || !heads_->CanGuess(contexts[i])) continue;
    indices.push_back(i);
    drafted.push_back(&contexts[i]);
    wanted = std::max(wanted, std::min(MostLevels(contexts[i]), options_.max_depth));
  }
  levels_computed_ = 0;
  if (drafted.empty()) return trees;
  const int num_levels = levels_computed_ = std::min(wanted, levels_);
  const absl::StatusOr<DraftGuesses> guesses = heads_->Guess(drafted, num_levels, options_.top_k);
  if (!guesses.ok()) return guesses.status();
  int useful = 0;
  for (size_t r = 0; r < drafted.size(); ++r) {
    const DraftContext& context = *drafted[r];
    const std::vector<Candidate> candidates =
        Candidates(context, *guesses, r, std::min(num_levels, MostLevels(context)));
    trees[indices[r]] = Tree(context, candidates);
    useful = std::max(useful, trees[indices[r]].Depth());
  }
  NoteDepth(useful);
  return trees;
}

void HeadChainDrafter::NoteDepth(int depth) { levels_ = std::clamp(depth + 1, 1, options_.max_depth); }

}  // namespace linspec
