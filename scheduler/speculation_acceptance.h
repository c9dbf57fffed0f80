// How likely the target is to follow each path of a draft tree: what the drafter states, corrected by what came true.
//
//   path(node) = trust(drafter) * product over the path of
//                min(1, calibrated(drafter, depth, stated) * habit(request, drafter))
//
// `calibrated` is how often children that were stated that likely, at that depth, were followed. `habit` is how this
// request compares with all. Both look at single children, of trees that were cut to what looked best; and what looks
// best is, on average, looked at too kindly. So `trust` compares what whole verified trees promised with what they
// brought.
//
// The requests of a step may all be wrong for the same reason (they begin together, each with a text that its drafter
// takes for a copy of the prompt), so a step of many counts for no more than one of a few.
//
// Threads: engine thread only.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "models/draft_tree.h"

namespace linspec {

// Turns the probability that a drafter states for a child, given its parent, into how often that came true.
class Calibration {
 public:
  double Correct(double stated) const;
  void Observe(double stated, bool hit, double weight = 1);

 private:
  static constexpr int kBuckets = 12;
  struct Rate {
    double tries = 0, hits = 0;  // decaying
  };
  std::array<Rate, kBuckets> rates_;
};

class AcceptanceModel {
 public:
  explicit AcceptanceModel(size_t num_drafters) : drafters_(num_drafters) {}

  void StartStep(int num_trees);  // so many are verified in it

  // Probability of the path to each node, [num_nodes]; 1 for the root.
  std::vector<double> Paths(uint64_t sequence_id, int drafter, const DraftTree& tree) const;

  // path: accepted nodes of the verified tree, the root first. rejected: the walk left the tree (false when the request
  // ended inside it, which says nothing about the children of its last node).
  struct Outcome {
    uint64_t sequence_id;
    int drafter;
    const DraftTree* tree;
    std::span<const int32_t> path;
    bool rejected;
    bool ended = false;  // the text came to its own end inside the tree, which brought less for it
  };
  void Observe(const Outcome& outcome);
  void Forget(uint64_t sequence_id) { sequences_.erase(sequence_id); }

 private:
  static constexpr int kDepths = 3;  // the last stands for all that are deeper
  // What was promised and what came, decaying sums.
  struct Record {
    double expected = 0, hits = 0;
    void Add(double decay, double promised, double came, double weight = 1);
    void Limit(double most);  // what is remembered, in promised tokens
    double Ratio(double strength) const { return (hits + strength) / (expected + strength); }
  };
  struct DrafterState {
    std::array<Calibration, kDepths> calibrations;
    Record trees;
  };
  double Child(const DrafterState& drafter, const DraftTree& tree, int node, int depth) const;

  std::vector<DrafterState> drafters_;
  double weight_ = 1;                                            // of what one request of the step under way shows
  std::unordered_map<uint64_t, std::vector<Record>> sequences_;  // [drafter]
};

}  // namespace linspec
