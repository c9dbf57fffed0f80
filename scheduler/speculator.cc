#include "scheduler/speculator.h"

#include <algorithm>
#include <chrono>
#include <string_view>

#include "fmt/format.h"

namespace linspec {
namespace {

// Modes that name a drafter have its name; the others have none.
std::string_view DrafterName(SpeculationMode mode) {
  return mode == SpeculationMode::kOff || mode == SpeculationMode::kAuto ? "" : SpeculationModeName(mode);
}

DraftDraw DrawFor(AcceptanceMode mode) {
  switch (mode) {
    case AcceptanceMode::kRejection:
      return DraftDraw::kIndependent;
    case AcceptanceMode::kTypical:
      return DraftDraw::kLikeliest;
    default:
      return DraftDraw::kCoupled;
  }
}

constexpr double kNegligible = 0.01;  // of a step's time
constexpr int kLongestPause = 16;     // steps
constexpr double kGainSmoothing = 0.2;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

bool Usable(const DraftTree& tree, const Sequence& sequence, int max_nodes, int64_t vocab_size) {
  return tree.Validate(vocab_size).ok() && tree.num_nodes() <= max_nodes &&
         tree.tokens.front() == sequence.pending_token();
}

std::vector<bool> CostNothing(const std::vector<std::unique_ptr<Drafter>>& drafters) {
  std::vector<bool> free;
  for (const auto& drafter : drafters) free.push_back(drafter->costs_nothing());
  return free;
}

}  // namespace

Speculator::Speculator(std::vector<std::unique_ptr<Drafter>> drafters, const EngineOptions& options, int64_t vocab_size)
    : drafters_(std::move(drafters)),
      options_(options),
      vocab_size_(vocab_size),
      controller_(CostNothing(drafters_)),
      asked_(drafters_.size(), 0) {}

int Speculator::FindDrafter(SpeculationMode mode) const {
  for (size_t d = 0; d < drafters_.size(); ++d) {
    if (drafters_[d]->name() == DrafterName(mode)) return static_cast<int>(d);
  }
  return -1;
}

absl::Status Speculator::CheckMode(SpeculationMode mode) const {
  if (DrafterName(mode).empty() || FindDrafter(mode) >= 0) return absl::OkStatus();
  std::string available = "off, auto";
  for (const auto& drafter : drafters_) available += fmt::format(", {}", drafter->name());
  return absl::InvalidArgumentError(
      fmt::format("speculation = {} is not available; available: {}", DrafterName(mode), available));
}

bool Speculator::reads_hidden() const {
  return std::any_of(drafters_.begin(), drafters_.end(), [](const auto& drafter) { return drafter->reads_hidden(); });
}

std::vector<DraftTree> Speculator::Propose(std::span<Sequence* const> sequences, int max_draft_rows, StepStats* stats) {
  std::vector<DraftTree> trees;
  for (const Sequence* sequence : sequences) trees.push_back(DraftTree::Root(sequence->pending_token()));
  if (drafters_.empty() || sequences.empty()) return trees;
  ++step_;
  const std::vector<SpeculationRequest> requests = Describe(sequences);
  choices_ = Choose(requests, max_draft_rows);
  drafted_.assign(sequences.size(), false);
  if (!options_.calibrate) {
    AskChosenDrafters(sequences, requests, &trees, stats);
    return trees;
  }
  int rows = max_draft_rows;
  for (const SpeculationChoice& choice : choices_) rows -= choice.nodes - 1;
  if (--pause_left_ < 0) AskFreeDrafters(sequences, requests, rows, &trees, stats);
  AskChosenDrafters(sequences, requests, &trees, stats);
  std::vector<SpeculationProposal> proposals;
  for (size_t i = 0; i < trees.size(); ++i) {
    if (trees[i].num_nodes() > 1) {
      proposals.push_back({sequences[i]->id(), choices_[i].drafter, choices_[i].trial, &trees[i]});
    }
  }
  controller_.Prune(proposals, static_cast<int>(trees.size()));
  return trees;
}

void Speculator::PauseFreeDrafters(double gains, int num_requests, double seconds) {
  const double cost = controller_.price() * seconds;
  free_gain_ += kGainSmoothing * (gains - cost - free_gain_);
  pause_ = free_gain_ < 0 && cost > kNegligible * num_requests ? std::min(2 * pause_ + 1, kLongestPause) : 0;
  pause_left_ = pause_;
}

std::vector<SpeculationRequest> Speculator::Describe(std::span<Sequence* const> sequences) const {
  const bool crowded = options_.spec_max_batch > 0 && std::ssize(sequences) > options_.spec_max_batch;
  std::vector<SpeculationRequest> requests;
  for (const Sequence* sequence : sequences) {
    SpeculationMode mode = sequence->request().speculation;
    if (mode == SpeculationMode::kDefault) mode = options_.speculation;
    SpeculationRequest request;
    request.sequence_id = sequence->id();
    request.drafter = FindDrafter(mode);  // of a mode that names none: kAnyDrafter
    request.tokens_left = sequence->num_tokens_left();
    const bool off = mode == SpeculationMode::kOff || crowded;
    // A node beyond the tokens that may still come would be verified for nothing.
    request.max_nodes = off ? 1 : static_cast<int>(std::min<int64_t>(options_.max_draft_nodes, request.tokens_left));
    const auto seen = seen_.find(sequence->id());
    for (size_t d = 0; d < drafters_.size(); ++d) {
      const int64_t shown = seen == seen_.end() ? 0 : seen->second[d];
      request.catch_up_tokens.push_back(drafters_[d]->catches_up() ? std::ssize(sequence->tokens()) - shown : 0);
    }
    requests.push_back(std::move(request));
  }
  return requests;
}

std::vector<SpeculationChoice> Speculator::Choose(std::span<const SpeculationRequest> requests, int max_draft_rows) {
  if (options_.calibrate) return controller_.Choose(requests, max_draft_rows);
  std::vector<SpeculationChoice> choices;
  for (const SpeculationRequest& request : requests) {
    const int nodes = std::min(request.max_nodes, max_draft_rows + 1);
    choices.push_back({.drafter = std::max(request.drafter, 0), .nodes = nodes});
    max_draft_rows -= nodes - 1;
  }
  return choices;
}

std::vector<DraftTree> Speculator::Ask(int drafter, std::span<Sequence* const> sequences,
                                       std::span<const SpeculationRequest> requests, std::span<const size_t> indices,
                                       std::span<const int> nodes, StepStats* stats) {
  std::vector<DraftContext> contexts;
  std::vector<DraftTree> trees;
  int64_t catch_up = 0;
  for (size_t i = 0; i < indices.size(); ++i) {
    const Sequence& sequence = *sequences[indices[i]];
    contexts.push_back({.sequence_id = sequence.id(),
                        .tokens = sequence.tokens(),
                        .num_prompt_tokens = sequence.num_prompt_tokens(),
                        .sampling = &sequence.sampling(),
                        .hidden = sequence.hidden,
                        .hidden_row = sequence.hidden_row,
                        .max_nodes = nodes[i],
                        .max_levels = choices_[indices[i]].max_levels,
                        .min_probability = choices_[indices[i]].min_probability,
                        .min_level_probability = choices_[indices[i]].min_level_probability,
                        .draw = DrawFor(sequence.acceptance())});
    trees.push_back(DraftTree::Root(sequence.pending_token()));
    catch_up += requests[indices[i]].catch_up_tokens[drafter];
    std::vector<int64_t>& seen = seen_[sequence.id()];
    seen.resize(drafters_.size(), 0);
    seen[drafter] = std::ssize(sequence.tokens());
  }
  const Clock::time_point start = Clock::now();
  absl::StatusOr<std::vector<DraftTree>> proposed = drafters_[drafter]->Propose(contexts);
  const double seconds = SecondsSince(start);
  if (!proposed.ok() || proposed->size() != contexts.size()) {
    ++stats->num_drafter_errors;
    return trees;
  }
  int levels = drafters_[drafter]->levels_computed();
  for (size_t i = 0; i < contexts.size(); ++i) {
    DraftTree& tree = (*proposed)[i];
    if (!Usable(tree, *sequences[indices[i]], contexts[i].max_nodes, vocab_size_)) {
      ++stats->num_drafter_errors;
      continue;
    }
    levels = std::max(levels, tree.Depth());
    const bool cut_short = tree.Depth() >= contexts[i].max_levels;
    controller_.Learn({contexts[i].sequence_id, drafter, choices_[indices[i]].trial, &tree, cut_short});
    trees[i] = std::move(tree);
  }
  // A drafter that was not asked in the step before finds cold caches, which says nothing about using it.
  const bool warm = step_ - std::exchange(asked_[drafter], step_) <= 1;
  DraftCosts& costs = controller_.draft_costs(drafter);
  if (warm || catch_up > DraftCosts::kLongCatchUp * std::ssize(contexts) ||
      !costs.Knows(static_cast<int>(contexts.size()))) {
    costs.Observe(static_cast<int>(contexts.size()), levels, catch_up, seconds);
  }
  return trees;
}

void Speculator::AskFreeDrafters(std::span<Sequence* const> sequences, std::span<const SpeculationRequest> requests,
                                 int rows, std::vector<DraftTree>* trees, StepStats* stats) {
  const Clock::time_point start = Clock::now();
  const int num_requests = static_cast<int>(requests.size());
  double gains = 0;
  bool asked = false;
  for (int d = 0; d < static_cast<int>(drafters_.size()); ++d) {
    if (!drafters_[d]->costs_nothing()) continue;
    std::vector<size_t> indices;
    std::vector<int> nodes;
    for (size_t i = 0; i < requests.size(); ++i) {
      const bool allowed = requests[i].drafter == kAnyDrafter || requests[i].drafter == d;
      if (!allowed || requests[i].max_nodes <= 1 || choices_[i].trial) continue;
      indices.push_back(i);
      nodes.push_back(requests[i].max_nodes);
    }
    if (indices.empty()) continue;
    asked = true;
    std::vector<DraftTree> proposed = Ask(d, sequences, requests, indices, nodes, stats);
    for (size_t i = 0; i < indices.size(); ++i) {
      SpeculationChoice& choice = choices_[indices[i]];
      // What the chosen drafter would have had is free again; it covers this draft, or the rest of the step does.
      const int extra = proposed[i].num_nodes() - choice.nodes;
      if (proposed[i].num_nodes() <= 1 || extra > rows) continue;
      const double gain =
          controller_.Gain({sequences[indices[i]]->id(), d, false, &proposed[i]}, num_requests) - choice.gain;
      if (gain <= 0) continue;
      gains += gain;
      rows -= extra;
      choice = {.drafter = d, .nodes = proposed[i].num_nodes(), .gain = choice.gain + gain};
      (*trees)[indices[i]] = std::move(proposed[i]);
      drafted_[indices[i]] = true;
    }
  }
  if (asked) PauseFreeDrafters(gains, num_requests, SecondsSince(start));
}

void Speculator::AskChosenDrafters(std::span<Sequence* const> sequences, std::span<const SpeculationRequest> requests,
                                   std::vector<DraftTree>* trees, StepStats* stats) {
  for (int d = 0; d < static_cast<int>(drafters_.size()); ++d) {
    std::vector<size_t> indices;
    std::vector<int> nodes;
    for (size_t i = 0; i < requests.size(); ++i) {
      if (choices_[i].drafter != d || choices_[i].nodes <= 1 || drafted_[i]) continue;
      indices.push_back(i);
      nodes.push_back(choices_[i].nodes);
    }
    if (indices.empty()) continue;
    std::vector<DraftTree> proposed = Ask(d, sequences, requests, indices, nodes, stats);
    for (size_t i = 0; i < indices.size(); ++i) (*trees)[indices[i]] = std::move(proposed[i]);
  }
}

void Speculator::ObserveWalk(int index, const Sequence& sequence, const DraftTree& tree, const Walk& walk,
                             StepStats* stats) {
  if (drafters_.empty() || choices_[index].nodes <= 1) return;
  const SpeculationChoice& choice = choices_[index];
  const int accepted = static_cast<int>(walk.path.size()) - 1;
  if (tree.num_nodes() <= 1) return;
  const int depth = tree.Depth();
  controller_.acceptance().Observe({.sequence_id = sequence.id(),
                                    .drafter = choice.drafter,
                                    .tree = &tree,
                                    .path = walk.path,
                                    .rejected = walk.finish_reason == FinishReason::kNone});
  const std::string_view name = drafters_[choice.drafter]->name();
  stats->drafter = stats->drafter.empty() || stats->drafter == name ? name : "mixed";
  stats->num_drafts += 1;
  stats->num_draft_tokens += tree.num_nodes() - 1;
  stats->num_accepted_tokens += accepted;
  const int tracked = static_cast<int>(stats->drafted_per_depth.size());
  for (int d = 0; d < std::min(depth, tracked); ++d) ++stats->drafted_per_depth[d];
  for (int d = 0; d < std::min(accepted, tracked); ++d) ++stats->accepted_per_depth[d];
}

void Speculator::ObserveVerify(int rows, int requests, double seconds) {
  if (!drafters_.empty()) controller_.ObserveStep(rows, requests, seconds);
}

void Speculator::Forget(uint64_t sequence_id) {
  for (const auto& drafter : drafters_) drafter->Forget(sequence_id);
  controller_.acceptance().Forget(sequence_id);
  seen_.erase(sequence_id);
}

}  // namespace linspec
