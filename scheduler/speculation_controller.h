// Decides which drafter a decoding request uses in a step, and after drafting which of the drafted nodes are verified, so
// that expected tokens per second are highest; none at all when drafting does not pay.
//
// It knows three things, all measured: what a verify step costs, what a drafter costs (speculation_costs.h), and how
// often a drafter is right. Drafters say how likely the target is to follow each path; what really happened corrects
// them, over all requests and for each request. Before drafting, drafters are compared by their latest proposals. After
// it, the nodes of all requests compete for one budget by the probability of their paths. What is not in use is tried
// again now and then, for a small share of the time (kProbeShare).
//
// Threads: engine thread only. No clock: times come in as arguments, so tests are exact.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "models/draft_tree.h"
#include "scheduler/speculation_costs.h"

namespace linspec {

inline constexpr int kAnyDrafter = -1;

// Turns the probability that a drafter states for a child, given its parent, into how often that came true.
class Calibration {
 public:
  double Correct(double stated) const;
  void Observe(double stated, bool hit);

 private:
  static constexpr int kBuckets = 12;
  struct Rate {
    double tries = 0, hits = 0;  // decaying
  };
  std::array<Rate, kBuckets> rates_;
};

struct SpeculationRequest {
  uint64_t sequence_id = 0;
  int max_nodes = 1;                     // root included
  int drafter = kAnyDrafter;             // or the only one it may use
  std::vector<int64_t> catch_up_tokens;  // [num_drafters] tokens of the sequence the drafter has not seen
  int64_t tokens_left = 0;               // output tokens it may still produce
};

struct SpeculationChoice {
  int drafter = 0;
  int nodes = 1;                    // to ask for; 1: do not draft
  float min_probability = 0;        // paths less likely than this are not worth verifying
  float min_level_probability = 0;  // nor are those worth computing first
  bool probe = false;               // tried out: not pruned
  double expected_tokens = 0;       // beyond the pending one, less what drafting costs; to compare a free draft with
};

// A tree as drafted, for one request of the step.
struct SpeculationProposal {
  uint64_t sequence_id;
  int drafter;
  bool probe;
  DraftTree* tree;
  int levels = 0;  // that were computed for it, if more than it is deep
};

class SpeculationController {
 public:
  // costs_nothing: [num_drafters], as Drafter::costs_nothing. Requests that may use any drafter are given the best of
  // the others; what a free one proposes is compared with that by ExpectedTokens.
  explicit SpeculationController(std::vector<bool> costs_nothing)
      : costs_nothing_(std::move(costs_nothing)),
        drafters_(costs_nothing_.size()),
        credit_(costs_nothing_.size(), 0.0),
        probe_runs_(costs_nothing_.size()) {}

  StepCosts& step_costs() { return step_costs_; }
  DraftCosts& draft_costs(int drafter) { return drafters_[drafter].costs; }

  // One choice per request. max_draft_rows bounds the nodes of all trees, roots not counted.
  std::vector<SpeculationChoice> Choose(std::span<const SpeculationRequest> requests, int max_draft_rows);
  // Expected tokens beyond the pending one if all nodes of the tree that are at least this likely are verified.
  double ExpectedTokens(const SpeculationProposal& proposal, float min_probability) const;
  // Remembers what was proposed, verified or not.
  void Learn(const SpeculationProposal& proposal);
  // Cuts the trees down to the nodes that pay. draft_seconds: spent on them already. Trees with distributions stay
  // whole: what is verified must not depend on what was drawn.
  void Prune(std::span<const SpeculationProposal> proposals, int num_requests, double draft_seconds);

  // What a verify step took, and with it how the machine's costs change.
  void ObserveStep(int rows, int requests, double seconds);

  // path: accepted nodes of the verified tree, the root first. rejected: the walk left the tree (false when the request
  // ended inside it, which says nothing about the children of its last node).
  struct Outcome {
    uint64_t sequence_id;
    int drafter;
    const DraftTree* tree;
    std::span<const int32_t> path;
    bool rejected;
  };
  void Observe(const Outcome& outcome);
  void Forget(uint64_t sequence_id) { sequences_.erase(sequence_id); }

 private:
  // The latest proposals of a drafter: paths by probability, corrected, the likeliest first.
  struct Profile {
    std::vector<float> paths;
    int levels;
  };
  struct DrafterState {
    DraftCosts costs;
    Calibration calibration;
    std::deque<Profile> profiles;
    bool in_use = false;  // in the last step, other than for a probe
  };
  // How a request's drafts compare with everybody's. Decaying sums.
  struct Record {
    double expected = 0, hits = 0;
    double Factor() const;
  };
  struct Estimate {  // of a step in which all requests use one drafter
    double tokens = 0, seconds = 0, draft_seconds = 0;
    double rate() const { return seconds > 0 ? tokens / seconds : 0; }
  };

  Estimate EstimateStep(int drafter, int num_requests, int max_nodes) const;
  double CatchUpCost(const SpeculationRequest& request, int drafter) const;
  // Corrected probability of the path to each node.
  std::vector<double> PathProbabilities(uint64_t sequence_id, int drafter, const DraftTree& tree) const;
  void Probe(std::span<const SpeculationRequest> requests, int drafter, std::vector<SpeculationChoice>* choices);

  const std::vector<bool> costs_nothing_;
  StepCosts step_costs_;
  std::vector<DrafterState> drafters_;
  std::vector<double> credit_;  // [drafter] seconds it may spend on being tried
  struct ProbeRun {
    uint64_t sequence_id = 0;
    int steps_left = 0;
  };
  std::vector<ProbeRun> probe_runs_;  // [drafter]
  int probe_turn_ = 0;
  std::unordered_map<uint64_t, std::vector<Record>> sequences_;  // [drafter]
};

}  // namespace linspec
