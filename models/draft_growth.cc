#include "models/draft_growth.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <utility>

namespace linspec {
namespace {

constexpr float kUsualChild = 0.65f;  // how likely the best child of a node is, before its logits are known

}  // namespace

absl::Status GrowthOptions::Validate() const {
  if (max_depth >= 1 && max_depth < kMaxTreeNodes && top_k >= 1 && top_k < kMaxTreeNodes && min_confidence >= 0 &&
      min_confidence <= 1) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      fmt::format("draft options out of range: max_depth {} and top_k {} (1 to {}), min_confidence {} (0 to 1)",
                  max_depth, top_k, kMaxTreeNodes - 1, min_confidence));
}

int DraftGrowth::budget() const { return std::min(context_->max_nodes, kMaxTreeNodes) - 1; }

void DraftGrowth::AddChildren(int parent, std::span<const float> logits) {
  const int depth = DepthOf(parent);
  const int64_t position = static_cast<int64_t>(context_->tokens.size()) + depth;
  const SamplingParams& sampling = *context_->sampling;
  if (context_->draw == DraftDraw::kIndependent) {
    const float path = ProbabilityOf(parent);
    std::optional<IndependentDraw> drawn = DrawIndependently(logits, sampling, position);
    if (!drawn || drawn->candidate.probability < options_.min_confidence ||
        path * drawn->candidate.probability < context_->min_probability) {
      return;
    }
    candidates_.push_back({.token = drawn->candidate.token,
                           .parent = parent,
                           .depth = depth + 1,
                           .probability = path * drawn->candidate.probability,
                           .distribution = std::move(drawn->distribution)});
    return;
  }
  AddChoices(parent, LikelyChoices(logits, sampling, position, options_.top_k, context_->draw == DraftDraw::kCoupled));
}

void DraftGrowth::AddChoices(int parent, std::span<const DraftCandidate> choices) {
  const int depth = DepthOf(parent);
  const float path = ProbabilityOf(parent);
  if (choices.empty() || choices[0].probability < options_.min_confidence) return;
  for (const DraftCandidate& choice : choices) {
    if (path * choice.probability < context_->min_probability) break;
    candidates_.push_back(
        {.token = choice.token, .parent = parent, .depth = depth + 1, .probability = path * choice.probability});
  }
}

std::vector<int> DraftGrowth::NextLevel(int depth, int room) const {
  std::vector<int> level;
  if (depth >= std::min({options_.max_depth, context_->max_levels, budget()})) return level;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    const float child = candidates_[i].probability * kUsualChild;
    if (candidates_[i].depth == depth && child >= context_->min_level_probability) level.push_back(static_cast<int>(i));
  }
  std::stable_sort(level.begin(), level.end(),
                   [&](int a, int b) { return candidates_[a].probability > candidates_[b].probability; });
  level.resize(std::clamp<int>(static_cast<int>(level.size()), 0, std::min(options_.top_k, room)));
  return level;
}

DraftTree DraftGrowth::TakeTree() {
  // A path is never likelier than its beginning, so the best candidates contain their parents, and come after them.
  std::vector<int> order(candidates_.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return candidates_[a].probability > candidates_[b].probability; });
  order.resize(std::min<size_t>(order.size(), std::max(budget(), 0)));
  DraftTree tree = DraftTree::Root(context_->tokens.back());
  tree.probabilities = {1.0f};
  const bool independent = context_->draw == DraftDraw::kIndependent;
  if (independent) tree.distributions.resize(1);
  std::vector<int> node_of(candidates_.size(), 0);
  for (const int index : order) {
    Candidate& candidate = candidates_[index];
    node_of[index] = tree.Add(candidate.token, candidate.parent == kPending ? 0 : node_of[candidate.parent]);
    tree.probabilities.push_back(candidate.probability);
    if (independent) tree.distributions.push_back(std::move(candidate.distribution));
  }
  return tree;
}

}  // namespace linspec
