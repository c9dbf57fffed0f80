// A speculative token tree: node 0 is the pending token (sampled, not yet in the state), parents come before children.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "models/sampler.h"

namespace linspec {

inline constexpr int kMaxTreeNodes = 64;  // an ancestor set is one uint64_t

struct DraftTree {
  std::vector<int32_t> tokens;   // [num_nodes]
  std::vector<int32_t> parents;  // [num_nodes]; parents[0] == -1, parents[i] < i
  // [num_nodes] that the target will follow the path to the node, as the drafter sees it: 1 for the root, never rising
  // along a path. Empty: the drafter does not know.
  std::vector<float> probabilities = {};
  // [num_nodes] what a node's token was drawn from, independently of the target, by ascending id; the root's is unused.
  // For rejection sampling, which is exact only if it is true. An empty one: the token was certain.
  std::vector<std::vector<TokenProbability>> distributions = {};

  static DraftTree Root(int32_t pending_token) { return {{pending_token}, {-1}}; }
  int num_nodes() const { return static_cast<int>(tokens.size()); }
  void Reserve(int num_nodes) {
    tokens.reserve(num_nodes);
    parents.reserve(num_nodes);
    probabilities.reserve(num_nodes);
  }
  int Add(int32_t token, int parent) {  // returns the new node's index
    tokens.push_back(token);
    parents.push_back(parent);
    return num_nodes() - 1;
  }
  std::vector<int> Depths() const;                      // root 0
  int Depth() const;                                    // of the deepest node; 0 for a root alone
  DraftTree Keep(const std::vector<bool>& keep) const;  // [num_nodes]; whoever is kept has its parent kept
  DraftTree CutBelow(int max_depth) const;              // without the nodes deeper than max_depth >= 0
  int FindChild(int node, int32_t token) const;         // -1: none
  // 1..64 nodes, parents topological, tokens inside the vocabulary, probabilities as above. Drafters are not trusted:
  // the engine checks.
  absl::Status Validate(int64_t vocab_size) const;
};

}  // namespace linspec
