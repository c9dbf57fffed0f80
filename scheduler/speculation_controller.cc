#include "scheduler/speculation_controller.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

namespace linspec {
namespace {

constexpr double kMinGain = 0.01, kDoubt = 0.5;  // to come into use: a gain above this, and so many doubts above 1
constexpr double kStay = 1.01;                   // how much better another drafter must be than the one in use
constexpr double kOtherCount = 1.25;  // how many times more or fewer requests make a new evaluation necessary
constexpr int kMostStale = 8;  // evaluations that a drafter is left out of which does not pay and proposed nothing
constexpr double kRecordDecay = 0.99, kRecordStrength = 50;  // per step of use; steps
constexpr double kRecordFade = 0.95;                         // per evaluation without
constexpr double kWorstRecord = 0.7, kBestRecord = 1.03;
constexpr double kPathSlack = 0.7;  // drafters look at paths somewhat less likely than what pays: they may be corrected
constexpr double kReplySmoothing = 0.1;
constexpr double kNegligible = 0.01;  // of a step's time
constexpr double kNetSmoothing = 0.2;

}  // namespace

SpeculationController::SpeculationController(std::vector<bool> costs_nothing, double most_slowdown)
    : costs_nothing_(std::move(costs_nothing)),
      most_slowdown_(most_slowdown),
      acceptance_(costs_nothing_.size()),
      drafters_(costs_nothing_.size()) {
  for (size_t d = 0; d < drafters_.size(); ++d) drafters_[d].pays = costs_nothing_[d];
}

double SpeculationController::MostSeconds() const {
  const bool limited = most_slowdown_ > 0 && num_requests_ > 1;
  return limited ? most_slowdown_ * plain_seconds_ : std::numeric_limits<double>::infinity();
}

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

double SpeculationController::Prune(std::span<const SpeculationProposal> proposals, int num_requests,
                                    double draft_seconds) {
  acceptance_.StartStep(static_cast<int>(proposals.size()));
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
    const double seconds = step_costs_.Estimate(rows, num_requests);
    if (draft_seconds + seconds > MostSeconds()) break;
    const double value = tokens - price_ * seconds;
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

void SpeculationController::Record::Fade(double share) {
  for (double* sum : {&steps, &worth, &expected_worth}) *sum *= share;
}

double SpeculationController::Record::Factor() const {
  if (steps < 1) return 1;
  const double ratio = std::max(worth / expected_worth, 0.01);
  return std::clamp(std::pow(ratio, steps / (steps + kRecordStrength)), kWorstRecord, kBestRecord);
}

void SpeculationController::ObserveReply(int64_t tokens) {
  const double counted = static_cast<double>(std::min<int64_t>(tokens, kCatchUpHorizon));
  reply_tokens_ += kReplySmoothing * (counted - reply_tokens_);
}

// A drafter displaces the target's weights from caches. So the first step without one is slower than those that follow,
// and the first with one faster; and a step whose drafts came to nothing is no plain step.
void SpeculationController::ObserveStep(const SpeculationOutcome& outcome) {
  if (num_requests_ == 0) return;
  if (outcome.requests == num_requests_) {
    const SpeculationLedger::Booking booking = ledger_.Book({.requests = num_requests_,
                                                             .start = start_,
                                                             .tokens = outcome.tokens,
                                                             .prompt_tokens = outcome.prompt_tokens,
                                                             .drafted = drafting_ || outcome.rows > outcome.requests,
                                                             .seconds = outcome.seconds,
                                                             .draft_seconds = outcome.draft_seconds,
                                                             .expected_seconds = outcome.expected_seconds,
                                                             .usual_seconds = step_costs_.Usual(num_requests_)});
    if (drafting_ || outcome.rows > outcome.requests) {
      recent_.worth = kRecordDecay * recent_.worth + booking.worth;
      recent_.cost = kRecordDecay * recent_.cost + booking.cost;
    }
    if (outcome.drafter != kAnyDrafter && booking.worth > 0) {
      DrafterState& state = drafters_[outcome.drafter];
      const double reading = CatchUpCost(outcome.catch_up, outcome.drafter);
      state.record.Fade(kRecordDecay);
      state.record.steps += 1;
      state.record.worth += booking.worth;
      state.record.expected_worth += state.stated_gain * std::max(booking.cost - reading, booking.cost / 2);
    }
    if (outcome.drafter_of_all != kAnyDrafter && outcome.prompt_tokens == 0) {
      drafters_[outcome.drafter_of_all].ahead.Observe(num_requests_, outcome.ahead, outcome.seconds,
                                                      outcome.expected_seconds);
    }
  }
  const bool changed = std::exchange(drafted_before_, drafting_) != drafting_;
  if (outcome.ahead) return;
  if (changed || (drafting_ && outcome.rows <= outcome.requests)) return;
  const double waited = start_ == StepStart::kAhead ? 1 + saved_ahead_ / plain_seconds_ : 1;
  const double factor = step_costs_.Observe(outcome.rows, outcome.requests, outcome.verify_seconds * waited);
  for (DrafterState& drafter : drafters_) drafter.costs.Scale(factor);
}

// Whoever was not asked in the step before has to take in what was written since: that says nothing about the usual.
void SpeculationController::ObserveFree(int drafter, int num_asked, double gains, bool used, double seconds) {
  DrafterState& state = drafters_[drafter];
  if (used) state.idle_steps = 0;
  const bool warm = step_ - std::exchange(state.asked_step, step_) <= 1 && num_asked <= 2 * state.num_asked;
  state.num_asked = num_asked;
  if (!warm) return;
  state.costs.Observe(num_asked, 1, 0, seconds);
  const double all = static_cast<double>(num_requests_) / num_asked;
  const double cost = price_ * seconds * all;
  state.net += kNetSmoothing * (gains * all - cost - state.net);
  state.pays = state.net >= 0 || cost <= kNegligible * num_requests_;
}

// Looks one level up and down from what paid best.
void SpeculationController::EvaluateDrafter(DrafterState* drafter) const {
  const double plain = num_requests_ / plain_seconds_, ahead = drafter->ahead.Factor(num_requests_);
  DraftCosts costs = drafter->costs;
  costs.Scale(ahead);
  std::vector<double> verify = verify_;
  for (double& seconds : verify) seconds *= ahead;
  const SpeculationStep step{num_requests_, plain * std::max(drafter->gain, 1.0), verify, MostSeconds()};
  const int levels = drafter->max_levels;
  drafter->history.NoticeChange();
  drafter->estimate = {};
  for (int n = std::max(levels - 1, 1); n <= std::min(levels + 1, ProposalHistory::kMostLevels); ++n) {
    const ProposalHistory::Estimate estimate = drafter->history.Evaluate(step, costs, n);
    if (estimate.rate() <= drafter->estimate.rate()) continue;
    drafter->estimate = estimate;
    drafter->max_levels = n;
  }
  drafter->stated_gain = drafter->estimate.rate() / plain;
  drafter->gain = drafter->stated_gain * drafter->record.Factor();
  drafter->evaluated = drafter->history.num_added();
  drafter->stale = 0;
}

// anew: for another number of requests than before.
void SpeculationController::Evaluate(bool anew) {
  verify_.clear();
  for (int n = 0; n < most_nodes_; ++n) {
    verify_.push_back(step_costs_.Estimate(num_requests_ * (1.0 + n), num_requests_));
  }
  const int before = std::exchange(best_, kPlain);
  double highest = 0;
  for (int d = 0; d < static_cast<int>(drafters_.size()); ++d) {
    DrafterState& drafter = drafters_[d];
    if (costs_nothing_[d]) continue;
    if (!drafter.pays) drafter.record.Fade(kRecordFade);
    const bool known = !anew && !drafter.pays && drafter.evaluated == drafter.history.num_added();
    if (!known || ++drafter.stale > kMostStale) EvaluateDrafter(&drafter);
    const double needed =
        drafter.pays ? 1 : 1 + std::max(kMinGain, kDoubt * drafter.estimate.doubt) * (1 - 2 * ledger_.fill());
    drafter.pays = drafter.gain > needed;
    const double rating = drafter.gain * (d == before ? kStay : 1);
    if (!drafter.pays || rating <= highest) continue;
    highest = rating;
    best_ = d;
  }
  run_left_ = kRunSteps - 1;
  run_requests_ = num_requests_;
  if (before == kPlain && best_ != kPlain) after_trial_ = true;  // use it first
}

double SpeculationController::CatchUpCost(int64_t tokens, int drafter) const {
  return tokens > DraftCosts::kLongCatchUp ? drafters_[drafter].costs.PerCatchUpToken() * static_cast<double>(tokens)
                                           : 0;
}

// Tokens that the drafter brings the request until it ends, catching up first; 0: better without.
double SpeculationController::Value(const SpeculationRequest& request, int drafter) const {
  const DrafterState& state = drafters_[drafter];
  const bool may = request.drafter == kAnyDrafter || request.drafter == drafter;
  if (!may || costs_nothing_[drafter] || !state.pays || request.max_nodes < 2) return 0;
  const double tokens_per_step = state.estimate.tokens / run_requests_;
  const double steps = std::min(static_cast<double>(request.tokens_left), reply_tokens_) / tokens_per_step;
  const double reading = CatchUpCost(request.catch_up_tokens[drafter], drafter);
  return std::max((state.gain - 1) * steps - reading * num_requests_ / plain_seconds_, 0.0);
}

bool SpeculationController::WorthWaiting(int drafter, double wait_seconds) const {
  const DrafterState& state = drafters_[drafter];
  const double cost = drafting_ ? 0 : price_ * wait_seconds;
  return state.pays && (cost <= kNegligible * num_requests_ || state.net >= cost);
}

bool SpeculationController::StaysPlain() const {
  if (closed_ || (trial_.steps_left > 0 && trial_.drafter == kPlain)) return true;
  if (trial_.steps_left > 0 || num_requests_ == 0) return false;
  for (int d = 0; d < static_cast<int>(drafters_.size()); ++d) {
    if (costs_nothing_[d] ? WorthWaiting(d, saved_ahead_) : drafters_[d].pays) return false;
  }
  return true;
}

bool SpeculationController::StillPays(int drafter, int num_asked) const {
  const DrafterState& state = drafters_[drafter];
  const int levels = static_cast<int>(std::lround(state.estimate.levels));
  const double plain = num_requests_ / plain_seconds_;
  const double before_drafting =
      state.gain - 1 + Wait() + plain * state.costs.Seconds(num_requests_, levels) / num_requests_;
  return num_asked * before_drafting > plain * state.costs.Seconds(num_asked, levels);
}

// rows: that the step has room for.
SpeculationChoice SpeculationController::Use(int drafter, const SpeculationRequest& request, int rows) const {
  const DrafterState& state = drafters_[drafter];
  const double price = std::max(price_, state.gain * num_requests_ / plain_seconds_);
  const SpeculationStep step{run_requests_, price, verify_, MostSeconds()};
  const auto stated = [&](double worth) {
    return static_cast<float>(std::clamp(worth * state.history.overstated(), 0.0, 1.0));
  };
  return {.drafter = drafter,
          .nodes = 1 + std::min(rows, request.max_nodes - 1),
          .max_levels = std::min(state.max_levels, request.max_levels),
          .min_probability = stated(kPathSlack * price * step.RowSeconds()),
          .min_level_probability = stated(step.LevelWorth(state.costs)),
          .trial = false,
          .gain = state.gain - 1 + Wait()};
}

int SpeculationController::UseBest(std::span<const SpeculationRequest> requests, int rows,
                                   std::vector<SpeculationChoice>* choices) {
  int best = kPlain;
  double highest = 0;
  for (int d = 0; d < static_cast<int>(drafters_.size()); ++d) {
    double value = 0;
    for (const SpeculationRequest& request : requests) value += request.drafter == kAnyDrafter ? Value(request, d) : 0;
    if (d == best_) value *= kStay;
    if (value <= highest) continue;
    highest = value;
    best = d;
  }
  std::vector<int> uses(requests.size(), kPlain), users(drafters_.size(), 0);
  for (size_t r = 0; r < requests.size(); ++r) {
    const int drafter = requests[r].drafter == kAnyDrafter ? best : requests[r].drafter;
    if (drafter == kPlain || Value(requests[r], drafter) <= 0) continue;
    uses[r] = drafter;
    ++users[drafter];
  }
  for (size_t r = 0; r < requests.size(); ++r) {
    const int share = rows / (num_requests_ - static_cast<int>(r));
    if (uses[r] == kPlain || share < 1 || !StillPays(uses[r], users[uses[r]])) continue;
    (*choices)[r] = Use(uses[r], requests[r], share);
    price_ = std::max(price_, drafters_[uses[r]].gain * num_requests_ / plain_seconds_);
    rows -= (*choices)[r].nodes - 1;
  }
  return rows;
}

std::vector<SpeculationChoice> SpeculationController::Choose(std::span<const SpeculationRequest> requests,
                                                             int max_draft_rows, StepStart start) {
  ++step_;
  start_ = start;
  num_requests_ = static_cast<int>(requests.size());
  std::vector<SpeculationChoice> choices(requests.size());
  plain_seconds_ = step_costs_.Estimate(num_requests_, num_requests_);
  const double usual = step_costs_.Usual(num_requests_), ahead = ledger_.AheadSeconds(num_requests_, usual);
  saved_ahead_ = ledger_.SavedAhead(num_requests_, usual);
  if (start != StepStart::kAlone && ahead > 0) plain_seconds_ = std::min(plain_seconds_, ahead);
  const double plain = num_requests_ / plain_seconds_;
  price_ = 0;
  drafting_ = false;
  if (!step_costs_.known() || !(plain > 0) || !std::isfinite(plain)) return choices;
  price_ = plain;

  // Requests about to end, or that want no drafts, say nothing about what pays.
  int max_nodes = 1;
  for (const SpeculationRequest& request : requests) max_nodes = std::max(max_nodes, request.max_nodes);
  most_nodes_ = std::max(most_nodes_, max_nodes);
  if (max_nodes == 1) return choices;

  const bool other = num_requests_ > run_requests_ * kOtherCount || run_requests_ > num_requests_ * kOtherCount ||
                     std::ssize(verify_) != most_nodes_;
  const bool evaluate = --run_left_ < 0 || other;
  if (evaluate) Evaluate(other);
  closed_ = !ledger_.Open(num_requests_, start) || (closed_ && !evaluate);
  EarnCredit();
  if (closed_) {
    trial_.steps_left = 0;
    choices.assign(requests.size(), {.trial = true});
    return choices;
  }
  const int rows_left = UseBest(requests, max_draft_rows, &choices);
  if (evaluate && trial_.steps_left == 0 && !std::exchange(after_trial_, false)) StartTrial(requests, choices);
  if (start == StepStart::kAhead) {
    choices.assign(requests.size(), {});
    price_ = plain;
    if (trial_.drafter == kPlain && trial_.steps_left > 0) --trial_.steps_left;
    return choices;
  }
  if (trial_.steps_left > 0) ApplyTrial(requests, rows_left, &choices);
  drafting_ = std::any_of(choices.begin(), choices.end(), [](const auto& choice) { return choice.nodes > 1; });
  return choices;
}

}  // namespace linspec
