// Trials of what is not in use.
#include <algorithm>
#include <cmath>

#include "scheduler/speculation_controller.h"

namespace linspec {
namespace {

// Of the time, that trials of drafters may be expected to lose, and those of plain steps beside what is in use.
constexpr double kTrialShare = 0.0075, kPlainShare = 0.01;
constexpr double kLeastLoss = 0.1, kLeastPlainLoss = 0.05;  // of what a trial takes: estimates are not that sure
constexpr double kCheapTrial = 0.3;  // of the time of a run, where more than one request pays for it
constexpr double kMaxCredit = 0.1;   // seconds
// One in so many requests tries what has to read its text first; what costs nothing.
constexpr int kReadingShare = 8, kFreeShare = 4;

}  // namespace

void SpeculationController::EarnCredit() {
  const double earned = kTrialShare * plain_seconds_ / static_cast<double>(drafters_.size());
  for (DrafterState& drafter : drafters_) {
    drafter.credit = std::min(drafter.credit + earned, kMaxCredit);
    ++drafter.idle_steps;
  }
  plain_credit_ = std::min(plain_credit_ + kPlainShare * plain_seconds_, kMaxCredit);
}

// Seconds by which a step of the trial is expected to be worse than one of what is in use.
double SpeculationController::TrialLoss(int drafter, int num_tried) const {
  // All requests' gain with what is in use, by estimates or, with drafts that cost nothing as well, by the ledger.
  const double forgone = std::max(plain_seconds_ - num_requests_ / price_,
                                  plain_seconds_ * (1 - recent_.cost / std::max(recent_.worth, recent_.cost)));
  if (drafter == kPlain) return std::max(forgone, kLeastPlainLoss * plain_seconds_);
  const DrafterState& state = drafters_[drafter];
  const double tried = num_tried;
  const double extra =
      state.costs.Seconds(num_tried, static_cast<int>(std::lround(state.estimate.levels))) +
      step_costs_.Estimate(num_requests_ + tried * std::max(state.estimate.nodes, 1.0), num_requests_) - plain_seconds_;
  const double brought = costs_nothing_[drafter] ? 0 : tried * (state.estimate.tokens / run_requests_ - 1) / price_;
  return std::max(extra - brought + forgone * tried / num_requests_, kLeastLoss * extra);
}

void SpeculationController::StartTrial(std::span<const SpeculationRequest> requests,
                                       std::span<const SpeculationChoice> choices) {
  const bool drafting = std::any_of(choices.begin(), choices.end(), [](const auto& c) { return c.nodes > 1; });
  const double loss = kRunSteps * TrialLoss(kPlain, 0);
  if (drafting && plain_credit_ >= loss) {
    plain_credit_ -= loss;
    trial_ = {kPlain, kRunSteps, {}};
    after_trial_ = true;
    return;
  }
  const int count = static_cast<int>(drafters_.size());
  for (int i = 0; i < count; ++i) {
    if (StartTrialOf((turn_ + i) % count, requests, choices)) return;
  }
}

bool SpeculationController::StartTrialOf(int drafter, std::span<const SpeculationRequest> requests,
                                         std::span<const SpeculationChoice> choices) {
  DrafterState& state = drafters_[drafter];
  const bool free = costs_nothing_[drafter];
  if (free && state.pays && state.idle_steps <= kRunSteps) return false;
  // All requests try a drafter, as they would use it: of what drafts and rows cost for one of them, a wrong estimate of
  // what they cost for all is never corrected, and a drafter that pays stays unused. Only reading texts is for a few.
  // One level of what costs nothing is soon computed, but a row more may make a step as long as many more do.
  const int steps = free && num_requests_ > 1 ? kRunSteps / 2 : kRunSteps;
  const int few = std::max(num_requests_ / (free ? kFreeShare : kReadingShare), 1);
  // A drafter that costs nothing keeps an index of a text: it is asked for the same few requests, as long as these run.
  const int first = free ? 0 : turn_;
  std::vector<int> tried;
  double reading = 0;
  for (const bool late : {false, true}) {
    const int wanted = free || late ? few : num_requests_;
    for (int n = 0; n < num_requests_ && std::ssize(tried) < wanted; ++n) {
      const int r = (first + n) % num_requests_;
      const SpeculationRequest& request = requests[r];
      const bool may = request.drafter == kAnyDrafter || request.drafter == drafter;
      const bool uses = choices[r].nodes > 1 && choices[r].drafter == drafter;
      const double cost = CatchUpCost(request.catch_up_tokens[drafter], drafter);
      if (!may || uses || request.max_nodes < 2 || (cost > 0) != late) continue;
      tried.push_back(r);
      reading += cost;
    }
  }
  if (tried.empty()) return false;
  const double loss = reading + steps * TrialLoss(drafter, static_cast<int>(tried.size()));
  const bool due = state.trials_due > 0 && loss < (num_requests_ == 1 ? 1 : kCheapTrial) * kRunSteps * plain_seconds_;
  if (!ledger_.CanLose(loss) || (!due && state.credit < loss)) return false;
  if (due) {
    --state.trials_due;
  } else {
    state.credit -= loss;
  }
  state.net = 0;
  trial_ = {drafter, steps, {}};
  after_trial_ = true;
  for (const int r : tried) trial_.sequences.push_back(requests[r].sequence_id);
  turn_ += 1 + static_cast<int>(tried.size());
  return true;
}

void SpeculationController::ApplyTrial(std::span<const SpeculationRequest> requests, int rows,
                                       std::vector<SpeculationChoice>* choices) {
  --trial_.steps_left;
  if (trial_.drafter == kPlain) {
    choices->assign(requests.size(), {.trial = true});
    return;
  }
  bool tried = false;
  for (size_t r = 0; r < requests.size(); ++r) {
    const uint64_t id = requests[r].sequence_id;
    if (std::find(trial_.sequences.begin(), trial_.sequences.end(), id) == trial_.sequences.end()) continue;
    SpeculationChoice& choice = (*choices)[r];
    const int room = rows + choice.nodes - 1;
    if (requests[r].max_nodes < 2 || room < 1) continue;
    tried = true;
    if (costs_nothing_[trial_.drafter]) {
      choice.free_trial = trial_.drafter;
      continue;
    }
    choice = Use(trial_.drafter, requests[r], room);
    choice.trial = true;
    choice.max_levels = std::min(choice.max_levels + 1, requests[r].max_levels);  // may be better by now
    rows = room - (choice.nodes - 1);
  }
  if (!tried) trial_.steps_left = 0;  // they ended
}

}  // namespace linspec
