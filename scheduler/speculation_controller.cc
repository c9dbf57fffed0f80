#include "scheduler/speculation_controller.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace linspec {
namespace {

constexpr double kStepSmoothing = 0.05;  // weight of a new verify time
constexpr double kDraftSmoothing = 0.1;
constexpr double kShapeSmoothing = 0.05;
constexpr double kGlobalDecay = 0.99, kSequenceDecay = 0.95;
constexpr double kPriorAcceptance = 0.6;  // before anything is known: optimistic enough to find out
constexpr double kPriorStrength = 4;      // observations that a prior is worth
constexpr double kMinGain = 1.02;         // speculate only for more than the noise of the estimates
constexpr double kProbeShare = 0.01;      // of the time, for trying what is not in use
constexpr double kMaxCredit = 0.25;       // seconds
constexpr int kProbeNodes = 4;
constexpr int64_t kCatchUpHorizon = 64;  // output tokens over which a drafter's catch-up has to pay off
constexpr int64_t kLongCatchUp = 16;     // tokens per context; less is part of every draft

void Smooth(double* average, double value, double weight) { *average += weight * (value - *average); }

int CeilLog2(int value) { return std::bit_width(static_cast<unsigned>(std::max(value, 1)) - 1); }

}  // namespace

void StepCosts::Calibrate(int rows, double seconds) {
  const int bucket = CeilLog2(rows);
  if (bucket >= kBuckets) return;
  seconds_[bucket] = seconds;
  known_ = std::max(known_, bucket + 1);
}

// Piecewise linear in the rows; never falling, because a dip is noise; beyond the last sample along the last segment.
double StepCosts::RowCost(double rows) const {
  if (known_ == 0) return 0;
  double low = seconds_[0];
  for (int b = 1; b < known_; ++b) {
    const double high = std::max(low, seconds_[b]);
    const double begin = std::ldexp(1.0, b - 1);
    if (rows <= 2 * begin || b == known_ - 1) return low + (high - low) * std::max(rows - begin, 0.0) / begin;
    low = high;
  }
  return low * std::max(rows, 1.0);  // one sample: assume the worst
}

double StepCosts::Estimate(double rows, int requests) const { return RowCost(rows) + per_request_ * (requests - 1); }

void StepCosts::Observe(int rows, int requests, double seconds) {
  const int bucket = CeilLog2(rows);
  if (known_ == 0 || bucket >= kBuckets) return;
  for (; known_ <= bucket; ++known_) {  // the estimate up to here becomes the sample it will be corrected from
    seconds_[known_] = RowCost(std::ldexp(1.0, known_));
  }
  const double expected = Estimate(rows, requests);
  if (expected <= 0) return;
  Smooth(&seconds_[bucket], seconds_[bucket] * std::clamp(seconds / expected, 0.5, 2.0), kStepSmoothing);
}

void DraftCosts::Observe(int contexts, int levels, int64_t catch_up_tokens, double seconds) {
  const int bucket = CeilLog2(contexts);
  if (bucket >= kBuckets) return;
  levels = std::max(levels, 1);
  if (catch_up_tokens > kLongCatchUp * contexts) {
    const double excess = std::max(seconds - PerLevel(contexts) * levels, 0.0) / static_cast<double>(catch_up_tokens);
    Smooth(&per_token_, excess, per_token_ == 0 ? 1 : kDraftSmoothing);
  } else {
    double* known = &per_level_[bucket];
    // A drafter may hide a long catch-up in an ordinary call: outliers count at most double.
    const double observed = *known == 0 ? seconds / levels : std::min(seconds / levels, 2 * *known);
    Smooth(known, observed, *known == 0 ? 1 : kDraftSmoothing);
  }
}

double DraftCosts::PerLevel(int contexts) const {
  const int bucket = std::min(CeilLog2(contexts), kBuckets - 1);
  for (int b = bucket; b >= 0; --b) {  // fewer contexts measured: assume proportional, the worst
    if (per_level_[b] > 0) return std::ldexp(per_level_[b], bucket - b);
  }
  for (int b = bucket + 1; b < kBuckets; ++b) {
    if (per_level_[b] > 0) return per_level_[b];
  }
  return 0;
}

void SpeculationController::Rate::Add(bool hit, double decay) {
  tries = tries * decay + 1;
  hits = hits * decay + (hit ? 1 : 0);
}

void SpeculationController::Observe(const Outcome& outcome) {
  DrafterState& drafter = drafters_[outcome.drafter];
  std::vector<Record>& records = sequences_[outcome.sequence_id];
  records.resize(drafters_.size());
  const auto update = [&](Record* record, double decay) {
    record->drafted.Add(outcome.nodes > 1, decay);
    for (int d = 0; d < std::min(outcome.depth, kMaxTrackedDepth) && d <= outcome.accepted; ++d) {
      if (d < outcome.accepted || outcome.rejected) record->depth[d].Add(d < outcome.accepted, decay);
    }
  };
  update(&drafter.record, kGlobalDecay);
  update(&records[outcome.drafter], kSequenceDecay);
  if (outcome.nodes <= 1 || outcome.asked <= 1) return;
  const double asked = outcome.asked - 1;
  Smooth(&drafter.depth_per_node, outcome.depth / asked, kShapeSmoothing);
  Smooth(&drafter.nodes_per_node, (outcome.nodes - 1) / asked, kShapeSmoothing);
}

// Expected tokens that each further node brings, the first beyond the root first. Never rising.
std::vector<double> SpeculationController::NodeGains(const SpeculationRequest& request, int drafter) const {
  const DrafterState& state = drafters_[drafter];
  const auto known = sequences_.find(request.sequence_id);
  const Record own = known == sequences_.end() ? Record{} : known->second[drafter];
  const double drafted = own.drafted.Mean(state.record.drafted.Mean(1, kPriorStrength), kPriorStrength);

  std::array<double, kMaxTrackedDepth + 1> path{};  // [depth] probability that all levels to there are accepted
  path[0] = 1;
  double prior = kPriorAcceptance;
  for (int d = 0; d < kMaxTrackedDepth; ++d) {
    prior = state.record.depth[d].Mean(prior, kPriorStrength);
    path[d + 1] = path[d] * own.depth[d].Mean(prior, kPriorStrength);
  }
  std::vector<double> gains;
  for (int node = 1; node < request.max_nodes; ++node) {
    const int depth = static_cast<int>(std::ceil(node * state.depth_per_node));
    gains.push_back(depth > kMaxTrackedDepth ? 0 : drafted * state.depth_per_node * path[std::max(depth, 1)]);
  }
  return gains;
}

double SpeculationController::CatchUpCost(const SpeculationRequest& request, int drafter) const {
  const int64_t tokens = request.catch_up_tokens[drafter];
  return tokens > kLongCatchUp ? drafters_[drafter].costs.PerCatchUpToken() * static_cast<double>(tokens) : 0;
}

// Hands out nodes in order of what they bring, and keeps the number at which tokens per second were highest.
SpeculationController::Allocation SpeculationController::Allocate(std::span<const SpeculationRequest> requests,
                                                                  int any_drafter, int max_draft_rows) const {
  const int num_requests = static_cast<int>(requests.size());
  Allocation best;
  std::vector<NodeStep> steps;
  for (int r = 0; r < num_requests; ++r) {
    const int drafter = requests[r].drafter == kAnyDrafter ? any_drafter : requests[r].drafter;
    best.choices.push_back({drafter, 1});
    for (const double gain : NodeGains(requests[r], drafter)) steps.push_back({r, gain});
  }
  const auto brings_more = [](const NodeStep& a, const NodeStep& b) { return a.tokens > b.tokens; };
  std::stable_sort(steps.begin(), steps.end(), brings_more);

  std::vector<SpeculationChoice> choices = best.choices;
  std::vector<DraftLoad> loads(drafters_.size());
  double tokens = num_requests, rows = num_requests;
  best.tokens_per_s = tokens / step_costs_.Estimate(rows, num_requests);
  const int num_steps = std::min<int>(max_draft_rows, static_cast<int>(steps.size()));
  int best_count = 0;
  for (int i = 0; i < num_steps; ++i) {
    SpeculationChoice& choice = choices[steps[i].request];
    AddNode(requests[steps[i].request], &choice, &loads[choice.drafter]);
    tokens += steps[i].tokens;
    rows += drafters_[choice.drafter].nodes_per_node;
    double seconds = step_costs_.Estimate(rows, num_requests);
    for (size_t d = 0; d < loads.size(); ++d) {
      if (loads[d].contexts == 0) continue;
      seconds += drafters_[d].costs.PerLevel(loads[d].contexts) * loads[d].levels + loads[d].catch_up_s;
    }
    if (tokens / seconds <= best.tokens_per_s) continue;
    best.tokens_per_s = tokens / seconds;
    best_count = i + 1;
  }
  for (int i = 0; i < best_count; ++i) ++best.choices[steps[i].request].nodes;
  return best;
}

void SpeculationController::AddNode(const SpeculationRequest& request, SpeculationChoice* choice,
                                    DraftLoad* load) const {
  if (choice->nodes++ == 1) {
    ++load->contexts;
    const int64_t steps = std::max<int64_t>(std::min(request.tokens_left, kCatchUpHorizon) / 2, 1);
    load->catch_up_s += CatchUpCost(request, choice->drafter) / static_cast<double>(steps);
  }
  load->levels = std::max(load->levels, std::ceil((choice->nodes - 1) * drafters_[choice->drafter].depth_per_node));
}

std::vector<SpeculationChoice> SpeculationController::Choose(std::span<const SpeculationRequest> requests,
                                                             int max_draft_rows) {
  const int num_requests = static_cast<int>(requests.size());
  Allocation best = Allocate(requests, 0, 0);
  const double plain = best.tokens_per_s;
  if (!step_costs_.known() || !(plain > 0) || !std::isfinite(plain)) return best.choices;
  bool any = false;
  for (const SpeculationRequest& request : requests) any |= request.drafter == kAnyDrafter;
  double highest = plain * kMinGain;
  for (int d = 0; d < (any ? static_cast<int>(drafters_.size()) : 1); ++d) {
    Allocation allocation = Allocate(requests, d, max_draft_rows);
    if (allocation.tokens_per_s <= highest) continue;
    highest = allocation.tokens_per_s;
    best = std::move(allocation);
  }
  int used = 0;
  for (const SpeculationChoice& choice : best.choices) used += choice.nodes - 1;
  const double step_seconds = step_costs_.Estimate(num_requests, num_requests);
  for (int d = 0; d < static_cast<int>(drafters_.size()); ++d) {
    credit_[d] = std::min(credit_[d] + kProbeShare * step_seconds / static_cast<double>(drafters_.size()), kMaxCredit);
    if (max_draft_rows - used >= kProbeNodes - 1) Probe(requests, d, &best.choices);
  }
  return best.choices;
}

// Lets one request that does not draft try this drafter, once its credit covers what that costs.
void SpeculationController::Probe(std::span<const SpeculationRequest> requests, int drafter,
                                  std::vector<SpeculationChoice>* choices) {
  const int num_requests = static_cast<int>(requests.size());
  int chosen = -1;
  double lowest = credit_[drafter];
  for (int i = 0; i < num_requests; ++i) {
    const int r = (i + probe_turn_) % num_requests;
    const SpeculationRequest& request = requests[r];
    const bool allowed = request.drafter == kAnyDrafter || request.drafter == drafter;
    if (!allowed || (*choices)[r].nodes > 1 || request.max_nodes < 2) continue;
    const int extra = std::min(kProbeNodes, request.max_nodes) - 1;
    const double cost = drafters_[drafter].costs.PerLevel(1) * extra + CatchUpCost(request, drafter) +
                        step_costs_.Estimate(num_requests + extra, num_requests) -
                        step_costs_.Estimate(num_requests, num_requests);
    if (cost > lowest) continue;
    if (chosen >= 0 && cost > 0.9 * lowest) continue;  // about as cheap: whose turn it is
    lowest = cost;
    chosen = r;
  }
  if (chosen < 0) return;
  ++probe_turn_;
  credit_[drafter] -= lowest;
  (*choices)[chosen] = {drafter, std::min(kProbeNodes, requests[chosen].max_nodes)};
}

}  // namespace linspec
