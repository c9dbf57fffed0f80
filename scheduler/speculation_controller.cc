#include "scheduler/speculation_controller.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace linspec {
namespace {

constexpr double kCalibrationDecay = 0.995,
                 kCalibrationStrength = 6;  // observations that a stated probability is worth
constexpr double kSequenceDecay = 0.95, kSequenceStrength = 3;
constexpr double kMaxFactor = 1.2;
constexpr size_t kProfiles = 32;       // proposals remembered per drafter: their mean must tell a gain of a few percent
constexpr double kUnknownLevel = 0.6;  // stands in for proposals not seen yet: optimistic enough to find out
constexpr int kUnknownLevels = 4;
// A drafter comes into use only for more than the noise of the estimates, and stays while it does not cost.
constexpr double kMinGain = 1.05, kKeepGain = 1.02;
constexpr double kPathSlack = 0.7;  // drafters look at paths somewhat less likely than what pays: they may be corrected
constexpr double kProbeShare = 0.015;  // of the time, for trying what is not in use
constexpr double kMaxCredit = 0.25;    // seconds
constexpr int kProbeNodes = 3, kProbeSteps = 3;
constexpr int64_t kCatchUpHorizon = 32;  // output tokens over which a drafter's catch-up has to pay off

// A drafter that states no probabilities is taken to be this sure of each child.
double Stated(const DraftTree& tree, int node) {
  if (tree.probabilities.empty()) return kUnknownLevel;
  const float parent = tree.probabilities[tree.parents[node]];
  return parent > 0 ? tree.probabilities[node] / parent : 0;
}

}  // namespace

double Calibration::Correct(double stated) const {
  const Rate& rate = rates_[std::clamp(static_cast<int>(stated * kBuckets), 0, kBuckets - 1)];
  return (rate.hits + stated * kCalibrationStrength) / (rate.tries + kCalibrationStrength);
}

void Calibration::Observe(double stated, bool hit) {
  Rate& rate = rates_[std::clamp(static_cast<int>(stated * kBuckets), 0, kBuckets - 1)];
  rate.tries = rate.tries * kCalibrationDecay + 1;
  rate.hits = rate.hits * kCalibrationDecay + (hit ? 1 : 0);
}

double SpeculationController::Record::Factor() const {
  return std::min((hits + kSequenceStrength) / (expected + kSequenceStrength), kMaxFactor);
}

std::vector<double> SpeculationController::PathProbabilities(uint64_t sequence_id, int drafter,
                                                             const DraftTree& tree) const {
  const auto known = sequences_.find(sequence_id);
  const double factor = known == sequences_.end() ? 1 : known->second[drafter].Factor();
  std::vector<double> paths(tree.num_nodes(), 1.0);
  for (int node = 1; node < tree.num_nodes(); ++node) {
    const double child = drafters_[drafter].calibration.Correct(Stated(tree, node)) * factor;
    paths[node] = paths[tree.parents[node]] * std::min(child, 1.0);
  }
  return paths;
}

double SpeculationController::ExpectedTokens(const SpeculationProposal& proposal, float min_probability) const {
  double tokens = 0;
  const std::vector<double> paths = PathProbabilities(proposal.sequence_id, proposal.drafter, *proposal.tree);
  for (size_t node = 1; node < paths.size(); ++node) tokens += paths[node] >= min_probability ? paths[node] : 0;
  return tokens;
}

void SpeculationController::Learn(const SpeculationProposal& proposal) {
  const std::vector<double> paths = PathProbabilities(proposal.sequence_id, proposal.drafter, *proposal.tree);
  Profile profile{.paths = {paths.begin() + 1, paths.end()},
                  .levels = std::max({proposal.tree->Depth(), proposal.levels, 1})};
  std::sort(profile.paths.rbegin(), profile.paths.rend());
  std::deque<Profile>& profiles = drafters_[proposal.drafter].profiles;
  profiles.push_back(std::move(profile));
  if (profiles.size() > kProfiles) profiles.pop_front();
}

void SpeculationController::Prune(std::span<const SpeculationProposal> proposals, int num_requests,
                                  double draft_seconds) {
  struct Node {
    size_t proposal;
    int node;
    double path;
  };
  std::vector<Node> nodes;
  double tokens = num_requests, rows = num_requests;
  for (size_t i = 0; i < proposals.size(); ++i) {
    const SpeculationProposal& proposal = proposals[i];
    const DraftTree& tree = *proposal.tree;
    const std::vector<double> paths = PathProbabilities(proposal.sequence_id, proposal.drafter, tree);
    const bool whole = proposal.probe || !tree.distributions.empty();
    for (int node = 1; node < tree.num_nodes(); ++node) {
      if (whole) {
        tokens += paths[node];
        rows += 1;
      } else {
        nodes.push_back({i, node, paths[node]});
      }
    }
  }
  std::stable_sort(nodes.begin(), nodes.end(), [](const Node& a, const Node& b) { return a.path > b.path; });
  double highest = tokens / (draft_seconds + step_costs_.Estimate(rows, num_requests));
  size_t best = 0;
  for (size_t n = 0; n < nodes.size(); ++n) {
    tokens += nodes[n].path;
    rows += 1;
    const double rate = tokens / (draft_seconds + step_costs_.Estimate(rows, num_requests));
    if (rate <= highest) continue;
    highest = rate;
    best = n + 1;
  }
  std::vector<std::vector<bool>> keep(proposals.size());
  for (size_t n = 0; n < nodes.size(); ++n) {
    std::vector<bool>& kept = keep[nodes[n].proposal];
    if (kept.empty()) {
      kept.resize(proposals[nodes[n].proposal].tree->num_nodes(), false);
      kept[0] = true;
    }
    kept[nodes[n].node] = n < best;
  }
  for (size_t i = 0; i < proposals.size(); ++i) {
    const bool cut = std::find(keep[i].begin(), keep[i].end(), false) != keep[i].end();
    if (cut) *proposals[i].tree = proposals[i].tree->Keep(keep[i]);
  }
}

void SpeculationController::ObserveStep(int rows, int requests, double seconds) {
  const double factor = step_costs_.Observe(rows, requests, seconds);
  for (DrafterState& drafter : drafters_) drafter.costs.Scale(factor);
}

void SpeculationController::Observe(const Outcome& outcome) {
  const DraftTree& tree = *outcome.tree;
  std::vector<Record>& records = sequences_[outcome.sequence_id];
  records.resize(drafters_.size());
  Record& record = records[outcome.drafter];
  Calibration& calibration = drafters_[outcome.drafter].calibration;
  for (size_t i = 0; i < outcome.path.size(); ++i) {
    const bool last = i + 1 == outcome.path.size();
    if (last && !outcome.rejected) break;
    for (int child = outcome.path[i] + 1; child < tree.num_nodes(); ++child) {
      if (tree.parents[child] != outcome.path[i]) continue;
      const bool hit = !last && outcome.path[i + 1] == child;
      record.expected = record.expected * kSequenceDecay + calibration.Correct(Stated(tree, child));
      record.hits = record.hits * kSequenceDecay + (hit ? 1 : 0);
      calibration.Observe(Stated(tree, child), hit);
    }
  }
}

// Each remembered proposal, made to every request and pruned.
SpeculationController::Estimate SpeculationController::EstimateStep(int drafter, int num_requests,
                                                                    int max_nodes) const {
  const DrafterState& state = drafters_[drafter];
  std::vector<double> verify;  // [nodes beyond the root per request]
  for (int n = 0; n < max_nodes; ++n) {
    verify.push_back(step_costs_.Estimate(num_requests * (1.0 + n), num_requests));
  }
  Estimate sum;
  const auto add = [&](std::span<const float> paths, int levels) {
    const double draft = state.costs.PerLevel(num_requests) * levels;
    double tokens = 1, best_tokens = 1, best_seconds = verify[0] + draft;
    for (size_t n = 0; n < paths.size() && n + 1 < verify.size(); ++n) {
      tokens += paths[n];
      if (tokens / (verify[n + 1] + draft) <= best_tokens / best_seconds) continue;
      best_tokens = tokens;
      best_seconds = verify[n + 1] + draft;
    }
    sum.tokens += best_tokens * num_requests;
    sum.seconds += best_seconds;
    sum.draft_seconds += draft;
  };
  for (const Profile& profile : state.profiles) add(profile.paths, profile.levels);
  const Estimate seen = sum;
  // Where fewer were seen: a chain of the length that would pay best.
  std::vector<float> unknown;
  Estimate best;
  for (int level = 1; level <= kUnknownLevels && state.profiles.size() < kProfiles; ++level) {
    unknown.push_back(static_cast<float>(std::pow(kUnknownLevel, level)));
    sum = {};
    add(unknown, level);
    if (sum.rate() > best.rate()) best = sum;
  }
  const double rest = 1 - static_cast<double>(state.profiles.size()) / kProfiles;
  const auto mean = [&](double total, double of_unknown) { return total / kProfiles + rest * of_unknown; };
  return {mean(seen.tokens, best.tokens), mean(seen.seconds, best.seconds),
          mean(seen.draft_seconds, best.draft_seconds)};
}

double SpeculationController::CatchUpCost(const SpeculationRequest& request, int drafter) const {
  const int64_t tokens = request.catch_up_tokens[drafter];
  return tokens > DraftCosts::kLongCatchUp ? drafters_[drafter].costs.PerCatchUpToken() * static_cast<double>(tokens)
                                           : 0;
}

std::vector<SpeculationChoice> SpeculationController::Choose(std::span<const SpeculationRequest> requests,
                                                             int max_draft_rows) {
  const int num_requests = static_cast<int>(requests.size());
  int max_nodes = 1;
  for (const SpeculationRequest& request : requests) max_nodes = std::max(max_nodes, request.max_nodes);
  const double step_seconds = step_costs_.Estimate(num_requests, num_requests), plain = num_requests / step_seconds;
  std::vector<SpeculationChoice> choices(requests.size());
  if (!step_costs_.known() || !(plain > 0) || !std::isfinite(plain)) return choices;

  std::vector<Estimate> estimates;
  int best = 0;
  for (int d = 0; d < static_cast<int>(drafters_.size()); ++d) {
    estimates.push_back(EstimateStep(d, num_requests, max_nodes));
    const bool better = estimates[d].rate() > estimates[best].rate() && !costs_nothing_[d];
    if (better || costs_nothing_[best]) best = d;
  }
  const double row_seconds = (step_costs_.Estimate(2.0 * num_requests, num_requests) - step_seconds) / num_requests;
  int rows_left = max_draft_rows;
  for (int r = 0; r < num_requests; ++r) {
    const SpeculationRequest& request = requests[r];
    SpeculationChoice& choice = choices[r];
    choice.drafter = request.drafter == kAnyDrafter ? best : request.drafter;
    const Estimate& estimate = estimates[choice.drafter];
    const double rate = std::max(plain, estimate.rate());
    // One node more costs a row of verification and, of a chain, a level of drafting.
    const double level_seconds =
        costs_nothing_[choice.drafter] ? 0 : drafters_[choice.drafter].costs.PerLevel(num_requests) / num_requests;
    const auto worth = [&](double seconds) {
      return static_cast<float>(std::clamp(kPathSlack * rate * seconds, 0.0, 1.0));
    };
    choice.min_probability = worth(row_seconds);
    choice.min_level_probability = worth(row_seconds + level_seconds);
    const int64_t steps = std::max<int64_t>(std::min(request.tokens_left, kCatchUpHorizon) / 2, 1);
    const double catch_up = CatchUpCost(request, choice.drafter) / static_cast<double>(steps);
    const int share = rows_left / (num_requests - r);
    if (share < 1 || request.max_nodes <= 1) continue;
    const double gain = estimate.tokens / (estimate.seconds + catch_up) / plain;
    if (gain <= (drafters_[choice.drafter].in_use ? kKeepGain : kMinGain)) continue;
    choice.nodes = 1 + std::min(share, request.max_nodes - 1);
    choice.expected_tokens = (estimate.tokens - estimate.draft_seconds * rate) / num_requests - 1;
    rows_left -= choice.nodes - 1;
  }
  for (int d = 0; d < static_cast<int>(drafters_.size()); ++d) {
    drafters_[d].in_use = std::any_of(choices.begin(), choices.end(),
                                      [&](const SpeculationChoice& c) { return c.drafter == d && c.nodes > 1; });
    credit_[d] = std::min(credit_[d] + kProbeShare * step_seconds / static_cast<double>(drafters_.size()), kMaxCredit);
    if (rows_left >= kProbeNodes - 1) Probe(requests, d, &choices);
  }
  return choices;
}

// Lets one request that does not draft try this drafter, for a few steps in a row once its credit covers what they cost:
// the first draft after a while finds cold caches and says little about the next.
void SpeculationController::Probe(std::span<const SpeculationRequest> requests, int drafter,
                                  std::vector<SpeculationChoice>* choices) {
  const int num_requests = static_cast<int>(requests.size());
  ProbeRun& run = probe_runs_[drafter];
  const auto may_try = [&](int r) {
    return (requests[r].drafter == kAnyDrafter || requests[r].drafter == drafter) && (*choices)[r].nodes <= 1 &&
           requests[r].max_nodes >= 2;
  };
  const auto step_cost = [&](int r) {
    const int extra = std::min(kProbeNodes, requests[r].max_nodes) - 1;
    return drafters_[drafter].costs.PerLevel(1) * extra + step_costs_.Estimate(num_requests + extra, num_requests) -
           step_costs_.Estimate(num_requests, num_requests);
  };
  int chosen = -1;
  for (int r = 0; r < num_requests && run.steps_left > 0; ++r) {
    if (requests[r].sequence_id == run.sequence_id && may_try(r)) chosen = r;
  }
  if (chosen < 0) {
    run.steps_left = 0;
    double lowest = credit_[drafter];
    for (int i = 0; i < num_requests; ++i) {
      const int r = (i + probe_turn_) % num_requests;
      if (!may_try(r)) continue;
      const double cost = kProbeSteps * step_cost(r) + CatchUpCost(requests[r], drafter);
      if (cost > lowest) continue;
      if (chosen >= 0 && cost > 0.9 * lowest) continue;  // about as cheap: whose turn it is
      lowest = cost;
      chosen = r;
    }
    if (chosen < 0) return;
    ++probe_turn_;
    run = {requests[chosen].sequence_id, kProbeSteps};
    credit_[drafter] -= lowest;
  }
  --run.steps_left;
  (*choices)[chosen] = {.drafter = drafter,
                        .nodes = std::min(kProbeNodes, requests[chosen].max_nodes),
                        .min_probability = 0,
                        .probe = true,
                        .expected_tokens = 0};
}

}  // namespace linspec
