#include "models/draft_tree.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

namespace linspec {

std::vector<int> DraftTree::Depths() const {
  std::vector<int> depths(tokens.size(), 0);
  for (int node = 1; node < num_nodes(); ++node) depths[node] = depths[parents[node]] + 1;
  return depths;
}

int DraftTree::Depth() const {
  std::array<int, kMaxTreeNodes> depths{};
  int deepest = 0;
  for (int node = 1; node < std::min(num_nodes(), kMaxTreeNodes); ++node) {
    depths[node] = depths[parents[node]] + 1;
    deepest = std::max(deepest, depths[node]);
  }
  return deepest;
}

DraftTree DraftTree::Keep(const std::vector<bool>& keep) const {
  DraftTree kept;
  std::vector<int> places(num_nodes(), -1);
  for (int node = 0; node < num_nodes(); ++node) {
    if (!keep[node]) continue;
    places[node] = kept.Add(tokens[node], parents[node] < 0 ? -1 : places[parents[node]]);
    if (!probabilities.empty()) kept.probabilities.push_back(probabilities[node]);
    if (!distributions.empty()) kept.distributions.push_back(distributions[node]);
  }
  return kept;
}

DraftTree DraftTree::CutBelow(int max_depth) const {
  const std::vector<int> depths = Depths();
  std::vector<bool> keep;
  for (const int depth : depths) keep.push_back(depth <= max_depth);
  return Keep(keep);
}

int DraftTree::FindChild(int node, int32_t token) const {
  for (int child = node + 1; child < num_nodes(); ++child) {
    if (parents[child] == node && tokens[child] == token) return child;
  }
  return -1;
}

absl::Status DraftTree::Validate(int64_t vocab_size) const {
  if (tokens.empty() || num_nodes() > kMaxTreeNodes) {
    return absl::InvalidArgumentError(
        fmt::format("draft tree has {} nodes: expected 1 to {}", tokens.size(), kMaxTreeNodes));
  }
  if (parents.size() != tokens.size()) {
    return absl::InvalidArgumentError(
        fmt::format("draft tree has {} tokens but {} parents", tokens.size(), parents.size()));
  }
  for (int node = 0; node < num_nodes(); ++node) {
    const int32_t parent = parents[node];
    if (node == 0 ? parent != -1 : parent < 0 || parent >= node) {
      return absl::InvalidArgumentError(fmt::format("draft tree node {} has parent {}", node, parent));
    }
    if (tokens[node] < 0 || tokens[node] >= vocab_size) {
      return absl::InvalidArgumentError(
          fmt::format("draft tree node {} has token {} outside the vocabulary of {}", node, tokens[node], vocab_size));
    }
    if (!distributions.empty() && distributions.size() != tokens.size()) {
      return absl::InvalidArgumentError(
          fmt::format("draft tree has {} tokens but {} distributions", tokens.size(), distributions.size()));
    }
    if (probabilities.empty()) continue;
    if (probabilities.size() != tokens.size()) {
      return absl::InvalidArgumentError(
          fmt::format("draft tree has {} tokens but {} probabilities", tokens.size(), probabilities.size()));
    }
    const float most = node == 0 ? 1.0f : probabilities[parent];
    if (!(probabilities[node] >= 0 && probabilities[node] <= most)) {
      return absl::InvalidArgumentError(
          fmt::format("draft tree node {} has probability {}, its parent {}", node, probabilities[node], most));
    }
  }
  return absl::OkStatus();
}

}  // namespace linspec
