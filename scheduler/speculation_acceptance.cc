#include "scheduler/speculation_acceptance.h"

#include <algorithm>
#include <array>

namespace linspec {
namespace {

constexpr double kCalibrationDecay = 0.995;
constexpr double kCalibrationStrength = 6;  // observations that a stated probability is worth
constexpr double kHabitDecay = 0.97, kHabitStrength = 8, kMostHabit = 1.2;
constexpr double kTrustDecay = 0.995, kTrustStrength = 20;
constexpr double kMostTrusted = 150;  // promised tokens that are remembered
constexpr double kFewRequests = 8;    // a step of more counts for as many
constexpr double kUnstated = 0.6;     // what a drafter that states no probabilities is taken to hold of each child

double Stated(const DraftTree& tree, int node) {
  if (tree.probabilities.empty()) return kUnstated;
  const float parent = tree.probabilities[tree.parents[node]];
  return parent > 0 ? tree.probabilities[node] / parent : 0;
}

}  // namespace

double Calibration::Correct(double stated) const {
  const Rate& rate = rates_[std::clamp(static_cast<int>(stated * kBuckets), 0, kBuckets - 1)];
  return (rate.hits + stated * kCalibrationStrength) / (rate.tries + kCalibrationStrength);
}

void Calibration::Observe(double stated, bool hit, double weight) {
  Rate& rate = rates_[std::clamp(static_cast<int>(stated * kBuckets), 0, kBuckets - 1)];
  const double kept = 1 - weight * (1 - kCalibrationDecay);
  rate.tries = rate.tries * kept + weight;
  rate.hits = rate.hits * kept + (hit ? weight : 0);
}

void AcceptanceModel::StartStep(int num_trees) { weight_ = std::min(kFewRequests / std::max(num_trees, 1), 1.0); }

void AcceptanceModel::Record::Add(double decay, double promised, double came, double weight) {
  const double kept = 1 - weight * (1 - decay);
  expected = expected * kept + weight * promised;
  hits = hits * kept + weight * came;
}

void AcceptanceModel::Record::Limit(double most) {
  if (expected <= most) return;
  hits *= most / expected;
  expected = most;
}

double AcceptanceModel::Child(const DrafterState& drafter, const DraftTree& tree, int node, int depth) const {
  return drafter.calibrations[std::min(depth, kDepths) - 1].Correct(Stated(tree, node));
}

std::vector<double> AcceptanceModel::Paths(uint64_t sequence_id, int drafter, const DraftTree& tree) const {
  const DrafterState& state = drafters_[drafter];
  const auto known = sequences_.find(sequence_id);
  const double habit =
      known == sequences_.end() ? 1 : std::min(known->second[drafter].Ratio(kHabitStrength), kMostHabit);
  const double trust = state.trees.Ratio(kTrustStrength);
  std::array<int8_t, kMaxTreeNodes> depths{};
  std::vector<double> paths(tree.num_nodes(), 1.0);
  for (int node = 1; node < tree.num_nodes(); ++node) {
    const int above = tree.parents[node];
    depths[node] = static_cast<int8_t>(depths[above] + 1);
    const double child = std::min(Child(state, tree, node, depths[node]) * habit, 1.0);
    paths[node] = std::min(paths[above] * child * (above == 0 ? trust : 1), 1.0);
  }
  return paths;
}

void AcceptanceModel::Observe(const Outcome& outcome) {
  const DraftTree& tree = *outcome.tree;
  DrafterState& state = drafters_[outcome.drafter];
  if (outcome.rejected || outcome.ended) {
    const double trust = state.trees.Ratio(kTrustStrength);
    double promised = 0;
    const std::vector<double> paths = Paths(outcome.sequence_id, outcome.drafter, tree);
    for (size_t node = 1; node < paths.size(); ++node) promised += paths[node];
    state.trees.Add(kTrustDecay, promised / trust, static_cast<double>(outcome.path.size()) - 1, weight_);
    state.trees.Limit(kMostTrusted);
  }
  std::vector<Record>& records = sequences_[outcome.sequence_id];
  records.resize(drafters_.size());
  for (size_t i = 0; i < outcome.path.size(); ++i) {
    const bool last = i + 1 == outcome.path.size();
    if (last && !outcome.rejected) break;
    const int depth = static_cast<int>(i) + 1;
    for (int child = outcome.path[i] + 1; child < tree.num_nodes(); ++child) {
      if (tree.parents[child] != outcome.path[i]) continue;
      const bool hit = !last && outcome.path[i + 1] == child;
      records[outcome.drafter].Add(kHabitDecay, Child(state, tree, child, depth), hit ? 1 : 0);
      state.calibrations[std::min(depth, kDepths) - 1].Observe(Stated(tree, child), hit, weight_);
    }
  }
}

}  // namespace linspec
