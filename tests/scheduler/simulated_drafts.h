// Trees that simulated drafters draft, and what a simulated target accepts of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "models/draft_tree.h"
#include "scheduler/speculation_controller.h"
#include "tests/scheduler/simulated_machine.h"

namespace linspec {

inline double Uniform(std::mt19937* random) { return std::uniform_real_distribution<double>()(*random); }

// A chain and other guesses beside each of its nodes. levels: computed.
inline DraftTree SimulateDraft(const SimulatedDrafter& drafter, double quality, const SpeculationChoice& choice,
                               int* levels, std::mt19937* random) {
  struct Node {
    double stated, truth;
    int parent;
  };
  std::vector<Node> nodes = {{1, 1, -1}};
  double path = 1, mean = quality;
  int parent = 0;
  *levels = 0;
  for (int level = 0; level < std::min({drafter.depth, choice.nodes - 1, choice.max_levels});
       ++level, mean *= drafter.decay) {
    if (level > 0 && path * 0.65 < choice.min_level_probability) break;
    ++*levels;
    const double spread = 0.9 * std::min(mean, 1 - mean);
    const double p = mean + spread * (2 * Uniform(random) - 1);
    const double stated =
        drafter.stated > 0 ? drafter.stated : std::pow(p, 0.7);  // drafters are too sure of themselves
    const int above = parent;
    if (path * stated < choice.min_probability) break;
    parent = static_cast<int>(nodes.size());
    nodes.push_back({path * stated, p, above});
    for (int s = 0; s < drafter.siblings; ++s) {
      const double share = std::pow(0.5, s + 1);
      if (path * (1 - stated) * share >= choice.min_probability) {
        nodes.push_back({path * (1 - stated) * share, 0.8 * (1 - p) * share, above});
      }
    }
    path *= stated;
  }
  std::vector<int> order;
  for (size_t i = 1; i < nodes.size(); ++i) order.push_back(static_cast<int>(i));
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return nodes[a].stated > nodes[b].stated; });
  order.resize(std::min<size_t>(order.size(), choice.nodes - 1));
  DraftTree tree = DraftTree::Root(0);
  tree.probabilities = {1.0f};
  std::vector<int> place(nodes.size(), 0);
  for (const int i : order) {
    place[i] = tree.Add(static_cast<int32_t>(std::lround(1e6 * nodes[i].truth)), place[nodes[i].parent]);
    tree.probabilities.push_back(static_cast<float>(nodes[i].stated));
  }
  return tree;
}

// A node's token says how likely it is, in millionths, so that this survives pruning.
inline std::vector<int32_t> SimulateWalk(const DraftTree& tree, std::mt19937* random) {
  std::vector<int32_t> path = {0};
  for (bool moved = true; moved;) {
    moved = false;
    double draw = 1e6 * Uniform(random);
    for (int child = path.back() + 1; child < tree.num_nodes() && !moved; ++child) {
      if (tree.parents[child] != path.back()) continue;
      moved = draw < tree.tokens[child];
      draw -= tree.tokens[child];
      if (moved) path.push_back(child);
    }
  }
  return path;
}

// To its first nodes, the likeliest.
inline void Cut(DraftTree* tree, int nodes) {
  std::vector<bool> keep(tree->num_nodes(), false);
  std::fill_n(keep.begin(), std::min(nodes, tree->num_nodes()), true);
  *tree = tree->Keep(keep);
}

}  // namespace linspec
