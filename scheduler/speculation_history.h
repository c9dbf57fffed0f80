// What a drafter proposed lately, and what its use would bring by that: each remembered proposal is made to every
// request of a step, cut to the nodes that pay, and averaged.
//
// Threads: engine thread only.
#pragma once

#include <array>
#include <deque>
#include <span>
#include <vector>

#include "models/draft_tree.h"
#include "scheduler/speculation_costs.h"

namespace linspec {

// The step that a proposal is imagined in.
struct SpeculationStep {
  int num_requests;
  double price;                    // tokens that a second has to bring
  std::span<const double> verify;  // [nodes beyond the root] seconds when each request has so many
  double most_seconds;             // it may take, drafts included

  // Seconds of one row more beside some drafted ones: the first takes what it takes to verify drafts at all.
  double RowSeconds() const;
  // What the beginning of a path has to promise for one level more, which costs a row of verification and the level.
  double LevelWorth(const DraftCosts& costs) const;
};

class ProposalHistory {
 public:
  static constexpr int kMostLevels = 8;

  ProposalHistory() { onward_.fill(kUnknown); }

  // paths: [num_nodes] corrected probabilities. cut_short: no deeper level was to be computed, so what it would have
  // held is unknown.
  void Add(const DraftTree& tree, std::span<const double> paths, bool cut_short);
  // Forgets the older proposals when the recent ones promise something else: the text changed.
  void NoticeChange();

  // Of a step in which all requests use the drafter.
  struct Estimate {
    double tokens = 0, seconds = 0;
    double levels = 0, nodes = 0;  // of a request, beyond the root; as verified
    double doubt = 0;              // standard deviation of tokens a request and step, beside what the time is worth
    double rate() const { return seconds > 0 ? tokens / seconds : 0; }
  };
  // With no more than max_levels (1 or more) computed. Where a proposal was cut short, the next level is guessed by how
  // paths usually go on. As long as few are known, the rest is what would be worth finding out about.
  Estimate Evaluate(const SpeculationStep& step, const DraftCosts& costs, int max_levels) const;
  // Paths as the drafter states them, beside as corrected.
  double overstated() const { return overstated_; }
  int64_t num_added() const { return num_added_; }

 private:
  static constexpr float kUnknown = 0.6f;
  struct Path {
    float probability;
    int depth;
  };
  struct Proposal {
    std::vector<Path> paths = {};     // the likeliest first
    std::vector<float> deepest = {};  // [level - 1] the likeliest path that deep
    bool cut_short = false;
    float tokens = 0;  // sum of paths
  };
  struct Sums;

  int Levels(const Proposal& proposal, double level_worth, int max_levels) const;
  void AddTo(Sums* sums, const Proposal& proposal, int levels, const SpeculationStep& step, const DraftCosts& costs,
             double weight) const;

  static double DraftSeconds(const Sums& sums, int num_requests, const DraftCosts& costs);

  std::deque<Proposal> proposals_;
  std::array<float, kMostLevels> onward_;  // [level - 1] the likeliest path of the next level, beside this level's
  double overstated_ = 1;
  int64_t num_added_ = 0;
};

}  // namespace linspec
