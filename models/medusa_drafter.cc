#include "models/medusa_drafter.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <queue>
#include <utility>

namespace linspec {
namespace {

// Medusa's mc_sim_7b_63: the number of children of each node, level by level from the root; nodes past the end of the
// list have none. A node's children are its first guesses.
constexpr std::array kMcSim7b63Children = {10,                                   // the root
                                           10, 7, 3, 2, 1, 1, 1, 1, 1, 1,        // depth 1
                                           10, 3, 2, 1, 1, 1, 1, 1, 0, 0,        // depth 2, below 0
                                           2,  0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0,  // below 1, 2, 3
                                           0,  0, 0, 0, 0, 0,                    // below 4 to 9
                                           2};                                   // depth 3

// A node that may be added: guess `rank` of the head for its depth, below tree node `parent`.
struct Step {
  float probability;  // of the path to it
  int parent, rank, depth;
  bool operator<(const Step& other) const {
    if (probability != other.probability) return probability < other.probability;
    return std::pair(depth, rank) > std::pair(other.depth, other.rank);
  }
};

// Where the first child of each node of the static tree stands in its level order.
int FirstChild(int place) {
  const auto end = kMcSim7b63Children.begin() + std::min<int>(place, kMcSim7b63Children.size());
  return 1 + std::accumulate(kMcSim7b63Children.begin(), end, 0);
}

}  // namespace

absl::StatusOr<std::unique_ptr<MedusaDrafter>> MedusaDrafter::Create(std::unique_ptr<MedusaHeads> heads, Model* target,
                                                                     MedusaOptions options) {
  if (options.top_k < 1 || options.top_k >= kMaxTreeNodes) {
    return absl::InvalidArgumentError(
        fmt::format("medusa options out of range: top_k {} (1 to {})", options.top_k, kMaxTreeNodes - 1));
  }
  return std::unique_ptr<MedusaDrafter>(new MedusaDrafter(std::move(heads), target, options));
}

absl::StatusOr<std::vector<DraftTree>> MedusaDrafter::Propose(std::span<const DraftContext> contexts) {
  const size_t dim = target_->config().hidden_size, vocab = target_->config().vocab_size;
  std::vector<DraftTree> trees;
  std::vector<size_t> drafted;  // contexts
  std::vector<float> hidden;
  int depth = 0;
  for (size_t i = 0; i < contexts.size(); ++i) {
    trees.push_back(DraftTree::Root(contexts[i].tokens.back()));
    if (contexts[i].max_nodes <= 1 || contexts[i].hidden.size() != dim) continue;
    drafted.push_back(i);
    hidden.insert(hidden.end(), contexts[i].hidden.begin(), contexts[i].hidden.end());
    depth = std::max(depth, std::min(contexts[i].max_nodes - 1, heads_->num_heads()));
  }
  if (drafted.empty()) return trees;
  const absl::StatusOr<std::span<const float>> logits = heads_->Logits(hidden, depth, target_);
  if (!logits.ok()) return logits.status();
  for (size_t r = 0; r < drafted.size(); ++r) {
    const DraftContext& context = contexts[drafted[r]];
    const auto position = static_cast<int64_t>(context.tokens.size());
    Guesses guesses;
    for (int n = 0; n < std::min(depth, context.max_nodes - 1); ++n) {
      // Without noise a guess is certain, given the hidden state: that serves rejection sampling too.
      guesses.push_back(LikelyChoices(logits->subspan((n * drafted.size() + r) * vocab, vocab), *context.sampling,
                                      position + n, options_.top_k, context.draw == DraftDraw::kCoupled));
    }
    trees[drafted[r]] = Grow(context, guesses);
  }
  return trees;
}

int MedusaDrafter::MaxChildren(int place) const {
  if (options_.tree == MedusaTree::kDynamic) return options_.top_k;
  return place < std::ssize(kMcSim7b63Children) ? kMcSim7b63Children[place] : 0;
}

// Best first: whoever is taken offers its first child and its next sibling, both no likelier than itself.
DraftTree MedusaDrafter::Grow(const DraftContext& context, const Guesses& guesses) const {
  DraftTree tree = DraftTree::Root(context.tokens.back());
  const int max_nodes = std::min(context.max_nodes, kMaxTreeNodes);
  tree.probabilities = {1.0f};
  std::vector<int> places = {0};  // [node] in the static tree
  std::priority_queue<Step> open;
  const auto offer = [&](int parent, int rank, int depth) {
    if (depth > std::ssize(guesses) || rank >= std::ssize(guesses[depth - 1]) || rank >= MaxChildren(places[parent])) {
      return;
    }
    const float probability = tree.probabilities[parent] * guesses[depth - 1][rank].probability;
    if (probability >= context.min_probability) open.push({probability, parent, rank, depth});
  };
  offer(0, 0, 1);
  while (!open.empty() && tree.num_nodes() < max_nodes) {
    const Step best = open.top();
    open.pop();
    const int node = tree.Add(guesses[best.depth - 1][best.rank].token, best.parent);
    tree.probabilities.push_back(best.probability);
    places.push_back(options_.tree == MedusaTree::kDynamic ? 0 : FirstChild(places[best.parent]) + best.rank);
    offer(node, 0, best.depth + 1);
    offer(best.parent, best.rank + 1, best.depth);
  }
  return tree;
}

}  // namespace linspec
