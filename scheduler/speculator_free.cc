// Drafters that cost nothing: asked before the others, or watched beside a step that runs already.
#include <algorithm>
#include <chrono>
#include <utility>

#include "scheduler/speculator.h"

namespace linspec {
namespace {

// Of a step that runs already: requests whose free drafts are looked at, of more of them one in so many.
constexpr size_t kWatched = 8, kWatchedShare = 8;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

std::vector<size_t> Speculator::RequestsForFree(int drafter, std::span<const SpeculationRequest> requests) const {
  std::vector<size_t> indices;
  for (size_t i = 0; i < requests.size(); ++i) {
    const bool may = requests[i].drafter == kAnyDrafter || requests[i].drafter == drafter;
    const bool asked = controller_.AsksAll(drafter) || choices_[i].free_trial == drafter;
    if (may && asked && requests[i].max_nodes > 1 && !choices_[i].trial) indices.push_back(i);
  }
  return indices;
}

int Speculator::TakeFree(int drafter, size_t index, uint64_t sequence_id, DraftTree proposed, int rows, DraftTree* tree,
                         double* gains) {
  SpeculationChoice& choice = choices_[index];
  // What the chosen drafter would have had is free again; it covers this draft, or the rest of the step does.
  const int extra = proposed.num_nodes() - choice.nodes;
  if (proposed.num_nodes() <= 1 || extra > rows) return 0;
  const double gain = controller_.Gain({sequence_id, drafter, false, &proposed}) - choice.gain;
  const bool trial = gain <= 0 && choice.free_trial == drafter;
  if (gain <= 0 && !trial) return 0;
  *gains += std::max(gain, 0.0);
  choice = {
      .drafter = drafter, .nodes = proposed.num_nodes(), .trial = trial, .gain = choice.gain + std::max(gain, 0.0)};
  *tree = std::move(proposed);
  drafted_[index] = true;
  return extra;
}

void Speculator::WatchFreeDrafters(std::span<Sequence* const> sequences, std::span<const SpeculationRequest> requests,
                                   StepStats* stats) {
  const size_t most = std::max<size_t>(kWatched, requests.size() / kWatchedShare);
  for (int d = 0; d < static_cast<int>(drafters_.size()); ++d) {
    if (!drafters_[d]->costs_nothing()) continue;
    std::vector<size_t> indices;
    std::vector<int> nodes;
    for (size_t i = 0; i < requests.size() && indices.size() < most; ++i) {
      const bool may = requests[i].drafter == kAnyDrafter || requests[i].drafter == d;
      if (!may || requests[i].max_nodes < 2) continue;
      indices.push_back(i);
      nodes.push_back(requests[i].max_nodes);
    }
    if (indices.empty()) continue;
    const Clock::time_point start = Clock::now();
    std::vector<DraftTree> proposed = Ask(d, sequences, requests, indices, nodes, stats);
    double gains = 0;
    for (size_t i = 0; i < indices.size(); ++i) {
      if (proposed[i].num_nodes() <= 1) continue;
      const double gain = controller_.Gain({sequences[indices[i]]->id(), d, false, &proposed[i]});
      gains += std::max(gain - choices_[indices[i]].gain, 0.0);
    }
    controller_.ObserveFree(d, static_cast<int>(indices.size()), gains, false, SecondsSince(start));
  }
}

void Speculator::AskFreeDrafters(std::span<Sequence* const> sequences, std::span<const SpeculationRequest> requests,
                                 int rows, std::vector<DraftTree>* trees, StepStats* stats) {
  for (int d = 0; d < static_cast<int>(drafters_.size()); ++d) {
    if (!drafters_[d]->costs_nothing()) continue;
    const std::vector<size_t> indices = RequestsForFree(d, requests);
    if (indices.empty()) continue;
    const Clock::time_point start = Clock::now();
    std::vector<int> nodes;
    for (const size_t i : indices) nodes.push_back(requests[i].max_nodes);
    std::vector<DraftTree> proposed = Ask(d, sequences, requests, indices, nodes, stats);
    double gains = 0;
    bool used = false;
    for (size_t i = 0; i < indices.size(); ++i) {
      const size_t index = indices[i];
      rows -= TakeFree(d, index, sequences[index]->id(), std::move(proposed[i]), rows, &(*trees)[index], &gains);
      used |= drafted_[index];
    }
    const double seconds = SecondsSince(start);
    stats->expected_draft_s += seconds;
    controller_.ObserveFree(d, static_cast<int>(indices.size()), gains, used, seconds);
  }
}

}  // namespace linspec
