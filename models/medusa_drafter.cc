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

class HostGuesser final : public DraftGuesser {
 public:
  HostGuesser(std::unique_ptr<MedusaHeads> heads, Model* target) : heads_(std::move(heads)), target_(target) {}

  int max_levels() const override { return heads_->num_heads(); }
  int max_top_k() const override { return kMaxTreeNodes - 1; }
  bool reads_hidden() const override { return true; }
  bool CanGuess(const DraftContext& context) const override {
    return std::ssize(context.hidden) == target_->config().hidden_size;
  }

  absl::StatusOr<DraftGuesses> Guess(std::span<const DraftContext* const> contexts, int num_levels,
                                     int top_k) override {
    std::vector<float> hidden;
    for (const DraftContext* context : contexts) {
      hidden.insert(hidden.end(), context->hidden.begin(), context->hidden.end());
    }
    const absl::StatusOr<std::span<const float>> logits = heads_->Logits(hidden, num_levels, target_);
    if (!logits.ok()) return logits.status();
    const size_t vocab = target_->config().vocab_size;
    DraftGuesses guesses{num_levels, top_k, {}};
    guesses.candidates.resize(contexts.size() * num_levels * top_k, {.token = -1, .probability = 0});
    for (size_t r = 0; r < contexts.size(); ++r) {
      const DraftContext& context = *contexts[r];
      for (int n = 0; n < num_levels; ++n) {
        // Without noise a guess is certain, given the hidden state: that serves rejection sampling too.
        const std::vector<DraftCandidate> choices =
            LikelyChoices(logits->subspan((n * contexts.size() + r) * vocab, vocab), *context.sampling,
                          std::ssize(context.tokens) + n, top_k, context.draw == DraftDraw::kCoupled);
        std::ranges::copy(choices, guesses.Slots(r, n).begin());
      }
    }
    return guesses;
  }

 private:
  const std::unique_ptr<MedusaHeads> heads_;
  Model* const target_;
};

}  // namespace

std::unique_ptr<DraftGuesser> MakeMedusaGuesser(std::unique_ptr<MedusaHeads> heads, Model* target) {
  return std::make_unique<HostGuesser>(std::move(heads), target);
}

absl::StatusOr<std::unique_ptr<MedusaDrafter>> MedusaDrafter::Create(std::unique_ptr<DraftGuesser> heads,
                                                                     MedusaOptions options) {
  if (options.top_k < 1 || options.top_k > heads->max_top_k()) {
    return absl::InvalidArgumentError(
        fmt::format("medusa options out of range: top_k {} (1 to {})", options.top_k, heads->max_top_k()));
  }
  return std::unique_ptr<MedusaDrafter>(new MedusaDrafter(std::move(heads), options));
}

absl::StatusOr<std::vector<DraftTree>> MedusaDrafter::Propose(std::span<const DraftContext> contexts) {
  std::vector<DraftTree> trees;
  std::vector<size_t> indices;
  std::vector<const DraftContext*> drafted;
  int depth = 0;
  for (size_t i = 0; i < contexts.size(); ++i) {
    trees.push_back(DraftTree::Root(contexts[i].tokens.back()));
    if (contexts[i].max_nodes <= 1 || !heads_->CanGuess(contexts[i])) continue;
    indices.push_back(i);
    drafted.push_back(&contexts[i]);
    depth = std::max(depth, std::min({contexts[i].max_nodes - 1, contexts[i].max_levels, heads_->max_levels()}));
  }
  if (drafted.empty()) return trees;
  const absl::StatusOr<DraftGuesses> guesses = heads_->Guess(drafted, depth, options_.top_k);
  if (!guesses.ok()) return guesses.status();
  for (size_t r = 0; r < drafted.size(); ++r) {
    trees[indices[r]] =
        Grow(*drafted[r], *guesses, r, std::min({depth, drafted[r]->max_nodes - 1, drafted[r]->max_levels}));
  }
  return trees;
}

int MedusaDrafter::MaxChildren(int place) const {
  if (options_.tree == MedusaTree::kDynamic) return options_.top_k;
  return place < std::ssize(kMcSim7b63Children) ? kMcSim7b63Children[place] : 0;
}

// Best first: whoever is taken offers its first child and its next sibling, both no likelier than itself.
DraftTree MedusaDrafter::Grow(const DraftContext& context, const DraftGuesses& guesses, size_t index, int depth) const {
  DraftTree tree = DraftTree::Root(context.tokens.back());
  const int max_nodes = std::min(context.max_nodes, kMaxTreeNodes);
  tree.probabilities = {1.0f};
  std::vector<int> places = {0};  // [node] in the static tree
  std::priority_queue<Step> open;
  const auto offer = [&](int parent, int rank, int level) {
    if (level > depth || rank >= MaxChildren(places[parent])) return;
    const std::span<const DraftCandidate> choices = guesses.At(index, level - 1);
    if (rank >= std::ssize(choices)) return;
    const float probability = tree.probabilities[parent] * choices[rank].probability;
    if (probability >= std::max(context.min_probability, context.min_level_probability))
      open.push({probability, parent, rank, level});
  };
  offer(0, 0, 1);
  while (!open.empty() && tree.num_nodes() < max_nodes) {
    const Step best = open.top();
    open.pop();
    const int node = tree.Add(guesses.At(index, best.depth - 1)[best.rank].token, best.parent);
    tree.probabilities.push_back(best.probability);
    places.push_back(options_.tree == MedusaTree::kDynamic ? 0 : FirstChild(places[best.parent]) + best.rank);
    offer(node, 0, best.depth + 1);
    offer(best.parent, best.rank + 1, best.depth);
  }
  return tree;
}

}  // namespace linspec
