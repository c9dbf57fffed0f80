// Steps of a run that are not chosen but continued: where a model drafts for itself.
#include <algorithm>
#include <numeric>

#include "scheduler/speculation_controller.h"

namespace linspec {
namespace {

constexpr double kNegligible = 0.01;  // tokens of a request and step

}  // namespace

bool SpeculationController::MayContinue(int drafter, bool trial) const {
  const double cost = price_ * std::max(drafters_[drafter].ahead.Saved(num_requests_), saved_ahead_);
  for (size_t d = 0; d < drafters_.size(); ++d) {
    const DrafterState& state = drafters_[d];
    if (costs_nothing_[d] && !trial && state.net > std::max(cost, kNegligible * num_requests_)) return false;
  }
  return drafting_ && !closed_ && run_left_ > 0 && trial == (trial_.steps_left > 0) &&
         ledger_.Open(num_requests_, StepStart::kWaited);
}

void SpeculationController::Continue(int num_requests) {
  ++step_;
  start_ = StepStart::kWaited;
  num_requests_ = num_requests;
  --run_left_;
  if (trial_.steps_left > 0) --trial_.steps_left;
  EarnCredit();
}

double SpeculationController::Expect(std::span<const SpeculationProposal> proposals) {
  acceptance_.StartStep(static_cast<int>(proposals.size()));
  double tokens = 0;
  for (const SpeculationProposal& proposal : proposals) {
    const std::vector<double> paths = acceptance_.Paths(proposal.sequence_id, proposal.drafter, *proposal.tree);
    tokens += std::accumulate(paths.begin() + 1, paths.end(), 0.0);
  }
  return tokens;
}

}  // namespace linspec
