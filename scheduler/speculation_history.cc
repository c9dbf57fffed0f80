#include "scheduler/speculation_history.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace linspec {
namespace {

constexpr size_t kProposals = 96;     // remembered: their mean must tell a gain of a few percent
constexpr size_t kRecent = 24;        // of them, that are compared with the rest
constexpr double kChanged = 2.5;      // standard deviations between the two that say that the text changed
constexpr size_t kEnough = 16;        // fewer are filled up
constexpr float kUsualChild = 0.65f;  // of the likeliest child of a node, before it is known; drafters take the same
constexpr double kOutcomeVariance = 0.25;  // of the tokens that a draft of one token brings, given its probability
constexpr double kSmoothing = 0.02;
constexpr size_t kFewRows = 3;

void Smooth(auto* average, double value) { *average += kSmoothing * (value - *average); }

}  // namespace

double SpeculationStep::RowSeconds() const {
  const size_t last = std::min(verify.size() - 1, kFewRows);
  return last < 2 ? 0 : (verify[last] - verify[1]) / static_cast<double>(last - 1) / num_requests;
}

double SpeculationStep::LevelWorth(const DraftCosts& costs) const {
  return price * (RowSeconds() + costs.PerLevel(num_requests) / num_requests);
}

void ProposalHistory::Add(const DraftTree& tree, std::span<const double> paths, bool cut_short) {
  ++num_added_;
  const std::vector<int> depths = tree.Depths();
  Proposal proposal{.cut_short = cut_short};
  double stated = 0;
  for (int node = 1; node < tree.num_nodes(); ++node) {
    const auto path = static_cast<float>(paths[node]);
    const size_t depth = depths[node];
    proposal.paths.push_back({path, depths[node]});
    proposal.deepest.resize(std::max(proposal.deepest.size(), depth), 0);
    proposal.deepest[depth - 1] = std::max(proposal.deepest[depth - 1], path);
    proposal.tokens += path;
    stated += tree.probabilities.empty() ? path : tree.probabilities[node];
  }
  if (proposal.tokens > 0) Smooth(&overstated_, std::clamp(stated / proposal.tokens, 0.5, 2.0));
  for (size_t level = 1; level < std::min<size_t>(proposal.deepest.size(), kMostLevels); ++level) {
    const float above = proposal.deepest[level - 1];
    if (above > 0) Smooth(&onward_[level - 1], proposal.deepest[level] / above);
  }
  std::sort(proposal.paths.begin(), proposal.paths.end(),
            [](const Path& a, const Path& b) { return a.probability > b.probability; });
  proposals_.push_back(std::move(proposal));
  if (proposals_.size() > kProposals) proposals_.pop_front();
}

void ProposalHistory::NoticeChange() {
  if (proposals_.size() < 2 * kRecent) return;
  const auto recent = proposals_.end() - kRecent;
  const auto moments = [](auto begin, auto end) {  // mean, and its variance
    double sum = 0, squares = 0;
    const auto count = static_cast<double>(end - begin);
    for (auto p = begin; p != end; ++p) {
      sum += p->tokens;
      squares += p->tokens * p->tokens;
    }
    const double mean = sum / count;
    return std::pair(mean, std::max(squares / count - mean * mean, 0.0) / count);
  };
  const auto [before, before_variance] = moments(proposals_.begin(), recent);
  const auto [now, now_variance] = moments(recent, proposals_.end());
  const double difference = now - before;
  if (difference * difference > kChanged * kChanged * (before_variance + now_variance)) {
    proposals_.erase(proposals_.begin(), recent);
  }
}

// How many the drafter would compute: as long as the path so far promises enough.
int ProposalHistory::Levels(const Proposal& proposal, double level_worth, int max_levels) const {
  int levels = 1;
  while (levels < max_levels && levels <= std::ssize(proposal.deepest) &&
         proposal.deepest[levels - 1] * kUsualChild >= level_worth) {
    ++levels;
  }
  return levels;
}

struct ProposalHistory::Sums {
  double count = 0, tokens = 0, verify_seconds = 0, levels = 0, nodes = 0, value = 0, squares = 0;
  std::array<double, kMostLevels + 1> counts{};  // [levels]
};

// The levels of a step are computed for all of its requests together, so it has as many as the deepest.
double ProposalHistory::DraftSeconds(const Sums& sums, int num_requests, const DraftCosts& costs) {
  double seconds = 0, at_most = 0, before = 0;  // shares: of requests, and of steps
  for (int levels = 1; levels <= kMostLevels; ++levels) {
    at_most += sums.counts[levels] / sums.count;
    const double steps = std::pow(std::min(at_most, 1.0), num_requests);
    seconds += (steps - before) * costs.Seconds(num_requests, levels);
    before = steps;
  }
  return seconds;
}

void ProposalHistory::AddTo(Sums* sums, const Proposal& proposal, int levels, const SpeculationStep& step,
                            const DraftCosts& costs, double weight) const {
  const double draft = costs.Seconds(step.num_requests, levels);
  double tokens = 0, best_value = 0, best_tokens = 0;
  size_t nodes = 0, best = 0;
  const auto consider = [&](float path) {
    if (nodes + 1 >= step.verify.size() || draft + step.verify[nodes + 1] > step.most_seconds) return;
    tokens += path;
    ++nodes;
    const double value = tokens - step.price * (step.verify[nodes] - step.verify[0]) / step.num_requests;
    if (value <= best_value) return;
    best_value = value;
    best_tokens = tokens;
    best = nodes;
  };
  float guessed = 0;  // of the level below the last known one
  if (levels > std::ssize(proposal.deepest) && proposal.cut_short && levels > 1) {
    guessed = proposal.deepest[levels - 2] * onward_[levels - 2];
  }
  for (const Path& path : proposal.paths) {
    if (guessed > path.probability) consider(std::exchange(guessed, 0.0f));
    if (path.depth <= levels) consider(path.probability);
  }
  if (guessed > 0) consider(guessed);
  const double value = best_value - step.price * draft / step.num_requests;
  sums->count += weight;
  sums->tokens += weight * step.num_requests * (1 + best_tokens);
  sums->verify_seconds += weight * step.verify[best];
  sums->counts[levels] += weight;
  sums->levels += weight * levels;
  sums->nodes += weight * static_cast<double>(best);
  sums->value += weight * value;
  sums->squares += weight * (value * value + kOutcomeVariance * std::min(best_tokens, 1.0));
}

ProposalHistory::Estimate ProposalHistory::Evaluate(const SpeculationStep& step, const DraftCosts& costs,
                                                    int max_levels) const {
  const double level_worth = step.LevelWorth(costs);
  Sums sums;
  for (const Proposal& proposal : proposals_) {
    AddTo(&sums, proposal, Levels(proposal, level_worth, max_levels), step, costs, 1);
  }
  if (proposals_.size() < kEnough) {
    const Proposal hoped{.paths = {{kUnknown, 1}}, .deepest = {kUnknown}, .cut_short = true, .tokens = kUnknown};
    AddTo(&sums, hoped, Levels(hoped, level_worth, max_levels), step, costs,
          static_cast<double>(kEnough - proposals_.size()));
  }
  const double mean = sums.value / sums.count;
  return {.tokens = sums.tokens / sums.count,
          .seconds = sums.verify_seconds / sums.count + DraftSeconds(sums, step.num_requests, costs),
          .levels = sums.levels / sums.count,
          .nodes = sums.nodes / sums.count,
          .doubt = std::sqrt(std::max(sums.squares / sums.count - mean * mean, 0.0) / sums.count)};
}

}  // namespace linspec
