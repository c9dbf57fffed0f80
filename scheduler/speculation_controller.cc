#include "scheduler/speculation_controller.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <utility>

namespace linspec {
namespace {

constexpr int kRunSteps = 8;
constexpr double kMinGain = 1.01, kDoubt = 0.5;  // to come into use: a gain above this, and so many doubts above 1
constexpr double kStay = 1.01;                   // how much better another drafter must be than the one in use
constexpr int kChecks = 2;
constexpr double kOtherCount = 1.25;  // how many times more or fewer requests make a new evaluation necessary
constexpr int kMostStale = 8;  // evaluations that a drafter is left out of which does not pay and proposed nothing
constexpr double kOutcomeDecay = 0.99, kOutcomeStrength = 50;  // per step of use; steps
constexpr double kOutcomeFade = 0.95;                          // per evaluation without
constexpr double kWorstOutcome = 0.7, kBestOutcome = 1.03;
constexpr double kPathSlack = 0.7;  // drafters look at paths somewhat less likely than what pays: they may be corrected
// Of the time, that trials may lose. Where requests run alone, each brings another text to find out about.
constexpr double kTrialShare = 0.01, kTrialShareOfOne = 0.015;
constexpr double kLeastLoss = 0.1;   // of what a trial takes: estimates are not that sure
constexpr double kCheapTrial = 0.3;  // of the time of a run, where more than one request pays for it
constexpr double kMaxCredit = 0.1;   // seconds
constexpr double kReplySmoothing = 0.1;
constexpr int kTriedShare = 8;  // one in so many requests tries a drafter

}  // namespace

double SpeculationController::Gain(const SpeculationProposal& proposal) const {
  std::vector<double> paths = acceptance_.Paths(proposal.sequence_id, proposal.drafter, *proposal.tree);
  std::sort(paths.begin() + 1, paths.end(), std::greater<>());
  double tokens = 0, best = 0;
  for (size_t n = 1; n < std::min(paths.size(), verify_.size()); ++n) {
    tokens += paths[n];
    best = std::max(best, tokens - price_ * (verify_[n] - verify_[0]) / run_requests_);
  }
  return best;
}

void SpeculationController::Learn(const SpeculationProposal& proposal) {
  drafters_[proposal.drafter].history.Add(
      *proposal.tree, acceptance_.Paths(proposal.sequence_id, proposal.drafter, *proposal.tree), proposal.cut_short);
}

double SpeculationController::Prune(std::span<const SpeculationProposal> proposals, int num_requests) const {
  struct Node {
    size_t proposal;
    int node;
    double path;
  };
  std::vector<Node> nodes;
  std::vector<std::vector<bool>> keep(proposals.size());
  double rows = num_requests, kept = 0;  // kept: tokens that what stays whatever it costs promises
  for (size_t i = 0; i < proposals.size(); ++i) {
    const SpeculationProposal& proposal = proposals[i];
    const DraftTree& tree = *proposal.tree;
    const std::vector<double> paths = acceptance_.Paths(proposal.sequence_id, proposal.drafter, tree);
    const bool whole = !tree.distributions.empty();
    keep[i].assign(tree.num_nodes(), whole);
    keep[i][0] = true;
    if (whole) {
      rows += tree.num_nodes() - 1;
      kept += std::accumulate(paths.begin() + 1, paths.end(), 0.0);
      continue;
    }
    const auto likeliest = std::max_element(paths.begin() + 1, paths.end()) - paths.begin();
    for (int node = 1; node < tree.num_nodes(); ++node) {
      if (proposal.trial && node == likeliest) {
        keep[i][node] = true;
        rows += 1;
        kept += paths[node];
      } else {
        nodes.push_back({i, node, paths[node]});
      }
    }
  }
  std::stable_sort(nodes.begin(), nodes.end(), [](const Node& a, const Node& b) { return a.path > b.path; });
  double tokens = 0, best_tokens = 0, highest = -price_ * step_costs_.Estimate(rows, num_requests);
  size_t best = 0;
  for (size_t n = 0; n < nodes.size(); ++n) {
    tokens += nodes[n].path;
    rows += 1;
    const double value = tokens - price_ * step_costs_.Estimate(rows, num_requests);
    if (value <= highest) continue;
    highest = value;
    best_tokens = tokens;
    best = n + 1;
  }
  for (size_t n = 0; n < best; ++n) keep[nodes[n].proposal][nodes[n].node] = true;
  for (size_t i = 0; i < proposals.size(); ++i) {
    const bool cut = std::find(keep[i].begin(), keep[i].end(), false) != keep[i].end();
    if (cut) *proposals[i].tree = proposals[i].tree->Keep(keep[i]);
  }
  return kept + best_tokens;
}

void SpeculationController::Outcome::Fade(double share) {
  for (double* sum : {&steps, &tokens, &seconds, &expected_tokens, &expected_seconds}) *sum *= share;
}

double SpeculationController::Outcome::Factor() const {
  if (steps < 1) return 1;
  const double ratio = tokens / seconds / (expected_tokens / expected_seconds);
  return std::clamp(std::pow(ratio, steps / (steps + kOutcomeStrength)), kWorstOutcome, kBestOutcome);
}

void SpeculationController::ObserveReply(int64_t tokens) {
  const double counted = static_cast<double>(std::min<int64_t>(tokens, kCatchUpHorizon));
  reply_tokens_ += kReplySmoothing * (counted - reply_tokens_);
}

void SpeculationController::ObserveUse(int drafter, int num_requests, double tokens, double seconds) {
  DrafterState& state = drafters_[drafter];
  const double expected = state.estimate.seconds;
  if (!(expected > 0) || run_requests_ == 0) return;
  Outcome& outcome = state.outcome;
  outcome.Fade(kOutcomeDecay);
  outcome.steps += 1;
  outcome.tokens += tokens;
  outcome.seconds += std::min(seconds, 2 * expected);  // an interruption would have met a plain step as well
  outcome.expected_tokens += state.estimate.tokens * num_requests / run_requests_;
  outcome.expected_seconds += expected;
}

// A drafter displaces the target's weights from caches. So the first step without one is slower than those that follow, and
// the first with one faster; and a step whose drafts came to nothing is no plain step.
void SpeculationController::ObserveStep(int rows, int requests, double seconds) {
  const bool changed = std::exchange(drafted_before_, drafting_) != drafting_;
  if (changed || (drafting_ && rows <= requests)) return;
  const double factor = step_costs_.Observe(rows, requests, seconds);
  for (DrafterState& drafter : drafters_) drafter.costs.Scale(factor);
}

// Looks one level up and down from what paid best.
void SpeculationController::EvaluateDrafter(DrafterState* drafter, int num_requests) const {
  const double plain = num_requests / verify_[0];
  const SpeculationStep step{num_requests, plain * std::max(drafter->gain, 1.0), verify_};
  const int levels = drafter->max_levels;
  drafter->history.NoticeChange();
  drafter->estimate = {};
  for (int n = std::max(levels - 1, 1); n <= std::min(levels + 1, ProposalHistory::kMostLevels); ++n) {
    const ProposalHistory::Estimate estimate = drafter->history.Evaluate(step, drafter->costs, n);
    if (estimate.rate() <= drafter->estimate.rate()) continue;
    drafter->estimate = estimate;
    drafter->max_levels = n;
  }
  drafter->gain = drafter->estimate.rate() / plain * drafter->outcome.Factor();
  drafter->evaluated = drafter->history.num_added();
  drafter->stale = 0;
}

// anew: for another number of requests than before.
void SpeculationController::Evaluate(int num_requests, bool anew) {
  verify_.clear();
  for (int n = 0; n < most_nodes_; ++n) verify_.push_back(step_costs_.Estimate(num_requests * (1.0 + n), num_requests));
  const int before = std::exchange(best_, kPlain);
  double highest = 0;
  for (int d = 0; d < static_cast<int>(drafters_.size()); ++d) {
    DrafterState& drafter = drafters_[d];
    if (costs_nothing_[d]) continue;
    if (!drafter.pays) drafter.outcome.Fade(kOutcomeFade);
    const bool known = !anew && !drafter.pays && drafter.evaluated == drafter.history.num_added();
    if (!known || ++drafter.stale > kMostStale) EvaluateDrafter(&drafter, num_requests);
    const double needed = drafter.pays ? 1 : std::max(kMinGain, 1 + kDoubt * drafter.estimate.doubt);
    drafter.pays = drafter.gain > needed;
    const double rating = drafter.gain * (d == before ? kStay : 1);
    if (!drafter.pays || rating <= highest) continue;
    highest = rating;
    best_ = d;
  }
  if (before != kPlain || best_ == kPlain) return;
  checks_due_ = kChecks;
  after_trial_ = true;  // use it first
}

double SpeculationController::CatchUpCost(const SpeculationRequest& request, int drafter) const {
  const int64_t tokens = request.catch_up_tokens[drafter];
  return tokens > DraftCosts::kLongCatchUp ? drafters_[drafter].costs.PerCatchUpToken() * static_cast<double>(tokens)
                                           : 0;
}

// The drafter that brings the request most over its next tokens, catching up first; kPlain: none brings anything.
int SpeculationController::BestFor(const SpeculationRequest& request, int num_requests) const {
  int best = kPlain;
  double highest = 0;
  for (int d = 0; d < static_cast<int>(drafters_.size()); ++d) {
    const DrafterState& drafter = drafters_[d];
    if (!drafter.pays || (request.drafter != kAnyDrafter && request.drafter != d)) continue;
    const double tokens_per_step = drafter.estimate.tokens / run_requests_;
    const double steps = std::min(static_cast<double>(request.tokens_left), reply_tokens_) / tokens_per_step;
    const double gain = drafter.gain * (d == best_ ? kStay : 1) - 1;
    const double value = gain * steps - CatchUpCost(request, d) * num_requests / plain_seconds_;
    if (value <= highest) continue;
    highest = value;
    best = d;
  }
  return best;
}

// rows: that the step has room for.
SpeculationChoice SpeculationController::Use(int drafter, const SpeculationRequest& request, int num_requests,
                                             int rows) const {
  const DrafterState& state = drafters_[drafter];
  const double price = std::max(price_, state.gain * num_requests / plain_seconds_);
  const SpeculationStep step{run_requests_, price, verify_};
  const auto stated = [&](double worth) {
    return static_cast<float>(std::clamp(worth * state.history.overstated(), 0.0, 1.0));
  };
  return {.drafter = drafter,
          .nodes = 1 + std::min(rows, request.max_nodes - 1),
          .max_levels = std::min(state.max_levels, request.max_levels),
          .min_probability = stated(kPathSlack * price * step.RowSeconds()),
          .min_level_probability = stated(step.LevelWorth(state.costs)),
          .trial = false,
          .gain = state.gain - 1};
}

std::vector<SpeculationChoice> SpeculationController::Choose(std::span<const SpeculationRequest> requests,
                                                             int max_draft_rows) {
  const int num_requests = static_cast<int>(requests.size());
  std::vector<SpeculationChoice> choices(requests.size());
  plain_seconds_ = step_costs_.Estimate(num_requests, num_requests);
  const double plain = num_requests / plain_seconds_;
  price_ = 0;
  if (!step_costs_.known() || !(plain > 0) || !std::isfinite(plain)) return choices;

  // Requests about to end, or that want no drafts, say nothing about what pays.
  int max_nodes = 1;
  for (const SpeculationRequest& request : requests) max_nodes = std::max(max_nodes, request.max_nodes);
  most_nodes_ = std::max(most_nodes_, max_nodes);
  price_ = plain;
  drafting_ = false;
  if (max_nodes == 1) return choices;

  const bool other = num_requests > run_requests_ * kOtherCount || run_requests_ > num_requests * kOtherCount ||
                     std::ssize(verify_) != most_nodes_;
  const bool evaluate = --run_left_ < 0 || other;
  if (evaluate) {
    Evaluate(num_requests, other);
    run_left_ = kRunSteps - 1;
    run_requests_ = num_requests;
  }
  int rows_left = max_draft_rows;
  for (int r = 0; r < num_requests; ++r) {
    const int share = rows_left / (num_requests - r);
    const int drafter = share > 0 && requests[r].max_nodes > 1 ? BestFor(requests[r], num_requests) : kPlain;
    if (drafter == kPlain) continue;
    choices[r] = Use(drafter, requests[r], num_requests, share);
    price_ = std::max(price_, plain * drafters_[drafter].gain);
    rows_left -= choices[r].nodes - 1;
  }
  EarnCredit(num_requests);
  if (evaluate && trial_.steps_left == 0 && !std::exchange(after_trial_, false)) StartTrial(requests, choices);
  if (trial_.steps_left > 0) ApplyTrial(requests, rows_left, &choices);
  drafting_ = std::any_of(choices.begin(), choices.end(), [](const auto& choice) { return choice.nodes > 1; });
  return choices;
}

void SpeculationController::EarnCredit(int num_requests) {
  const auto ways = 1 + std::count(costs_nothing_.begin(), costs_nothing_.end(), false);  // plain decoding is one
  const double share = num_requests == 1 ? kTrialShareOfOne : kTrialShare;
  const double earned = share * plain_seconds_ / static_cast<double>(ways);
  for (DrafterState& drafter : drafters_) drafter.credit = std::min(drafter.credit + earned, kMaxCredit);
  plain_credit_ = std::min(plain_credit_ + earned, kMaxCredit);
}

// Seconds by which a step of the trial is expected to be worse than one of what is in use.
double SpeculationController::TrialLoss(int drafter, int num_tried, int num_requests) const {
  const double forgone = plain_seconds_ - num_requests / price_;  // all requests' gain with what is in use
  if (drafter == kPlain) return std::max(forgone, kLeastLoss * plain_seconds_);
  const DrafterState& state = drafters_[drafter];
  const double tried = num_tried;
  const double extra = state.costs.Seconds(num_tried, static_cast<int>(std::lround(state.estimate.levels))) +
                       step_costs_.Estimate(num_requests + tried * std::max(state.estimate.nodes, 1.0), num_requests) -
                       plain_seconds_;
  const double loss =
      extra - tried * (state.estimate.tokens / run_requests_ - 1) / price_ + forgone * tried / num_requests;
  return std::max(loss, kLeastLoss * extra);
}

void SpeculationController::StartTrial(std::span<const SpeculationRequest> requests,
                                       std::span<const SpeculationChoice> choices) {
  const int num_requests = static_cast<int>(requests.size());
  const bool drafting = std::any_of(choices.begin(), choices.end(), [](const auto& c) { return c.nodes > 1; });
  const double loss = kRunSteps * TrialLoss(kPlain, 0, num_requests);
  if (drafting && (plain_credit_ >= loss || checks_due_ > 0)) {
    if (--checks_due_ < 0) plain_credit_ -= loss;
    checks_due_ = std::max(checks_due_, 0);
    trial_ = {kPlain, kRunSteps, {}};
    after_trial_ = true;
    return;
  }
  const int wanted = std::max(num_requests / kTriedShare, 1);
  for (int i = 0; i < static_cast<int>(drafters_.size()); ++i) {
    const int d = (turn_ + i) % static_cast<int>(drafters_.size());
    if (costs_nothing_[d]) continue;
    std::vector<int> tried;
    double catch_up = 0;
    for (const bool late : {false, true}) {
      for (int n = 0; n < num_requests && std::ssize(tried) < wanted; ++n) {
        const int r = (turn_ + n) % num_requests;
        const SpeculationRequest& request = requests[r];
        const bool may = request.drafter == kAnyDrafter || request.drafter == d;
        const bool uses = choices[r].nodes > 1 && choices[r].drafter == d;
        const double cost = CatchUpCost(request, d);
        if (!may || uses || request.max_nodes < 2 || (cost > 0) != late) continue;
        tried.push_back(r);
        catch_up += cost;
      }
    }
    if (tried.empty()) continue;
    const double loss = catch_up + kRunSteps * TrialLoss(d, static_cast<int>(tried.size()), num_requests);
    if (drafters_[d].trials_due > 0 && loss < (num_requests == 1 ? 1 : kCheapTrial) * kRunSteps * plain_seconds_) {
      --drafters_[d].trials_due;
    } else if (drafters_[d].credit >= loss) {
      drafters_[d].credit -= loss;
    } else {
      continue;
    }
    trial_ = {d, kRunSteps, {}};
    after_trial_ = true;
    for (const int r : tried) trial_.sequences.push_back(requests[r].sequence_id);
    turn_ += 1 + static_cast<int>(tried.size());
    return;
  }
}

void SpeculationController::ApplyTrial(std::span<const SpeculationRequest> requests, int rows,
                                       std::vector<SpeculationChoice>* choices) {
  const int num_requests = static_cast<int>(requests.size());
  --trial_.steps_left;
  if (trial_.drafter == kPlain) {
    choices->assign(requests.size(), {.trial = true});
    return;
  }
  bool tried = false;
  for (int r = 0; r < num_requests; ++r) {
    const uint64_t id = requests[r].sequence_id;
    if (std::find(trial_.sequences.begin(), trial_.sequences.end(), id) == trial_.sequences.end()) continue;
    SpeculationChoice& choice = (*choices)[r];
    const int room = rows + choice.nodes - 1;
    if (requests[r].max_nodes < 2 || room < 1) continue;
    choice = Use(trial_.drafter, requests[r], num_requests, room);
    choice.trial = tried = true;
    rows = room - (choice.nodes - 1);
  }
  if (!tried) trial_.steps_left = 0;  // they ended
}

}  // namespace linspec
