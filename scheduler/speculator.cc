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
constexpr int kProbedShare = 8;       // while free drafts do not pay, they are looked for in one of so many requests
constexpr int kFreeTrialSteps = 64;   // without a free draft; then some requests try one, since they may pay by now
constexpr double kGainSmoothing = 0.2;
constexpr double kMostUse = 0.75;  // of the requests of a step that tells what the use of a drafter comes to

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

std::vector<DraftTree> Speculator::Propose(std::span<Sequence* const> sequences, std::span<const int> deepest,
                                           int max_draft_rows, StepStats* stats) {
  std::vector<DraftTree> trees;
  for (const Sequence* sequence : sequences) trees.push_back(DraftTree::Root(sequence->pending_token()));
  if (drafters_.empty() || sequences.empty()) return trees;
  ++step_;
  const std::vector<SpeculationRequest> requests = Describe(sequences, deepest);
  choices_ = Choose(requests, max_draft_rows);
  drafted_.assign(sequences.size(), false);
  drafts_.clear();
  used_ = kAnyDrafter;
  if (!options_.calibrate) {
    AskChosenDrafters(sequences, requests, &trees, stats);
    return trees;
  }
  int rows = max_draft_rows;
  for (const SpeculationChoice& choice : choices_) rows -= choice.nodes - 1;
  if (--pause_left_ < 0) AskFreeDrafters(sequences, requests, rows, &trees, stats);
  AskChosenDrafters(sequences, requests, &trees, stats);
  const Clock::time_point drafted = Clock::now();
  std::vector<SpeculationProposal> proposals;
  for (size_t i = 0; i < trees.size(); ++i) {
    if (trees[i].num_nodes() > 1) {
      proposals.push_back({sequences[i]->id(), choices_[i].drafter, choices_[i].trial, &trees[i]});
    }
  }
  const int num_requests = static_cast<int>(trees.size());
  stats->expected_tokens = num_requests + controller_.Prune(proposals, num_requests);
  int num_rows = 0;
  for (const DraftTree& tree : trees) num_rows += tree.num_nodes();
  stats->expected_verify_s = controller_.step_costs().Estimate(num_rows, num_requests);
  ObserveDrafts(SecondsSince(drafted));
  return trees;
}

void Speculator::ObserveDrafts(double seconds) {
  double contexts = 0;
  for (const Asked& asked : drafts_) contexts += asked.contexts;
  draft_seconds_ = 0;
  for (const Asked& asked : drafts_) {
    const double all = asked.seconds + seconds * asked.contexts / contexts;
    draft_seconds_ += all;
    controller_.draft_costs(asked.drafter).Observe(asked.contexts, asked.levels, asked.catch_up, all);
  }
  if (drafts_.size() == 1) used_ = DrafterOfMost();
}

int Speculator::DrafterOfMost() const {
  const int drafter = drafts_[0].drafter;
  double used = 0;
  for (const SpeculationChoice& choice : choices_) {
    if (choice.trial) return kAnyDrafter;
    used += choice.nodes > 1 && choice.drafter == drafter;
  }
  return used >= kMostUse * static_cast<double>(choices_.size()) ? drafter : kAnyDrafter;
}

void Speculator::PauseFreeDrafters(double gains, size_t num_asked, size_t num_requests, double seconds) {
  // Whoever was not asked in the step before has to take in what was written since: that says nothing about the usual.
  const bool warm = step_ - std::exchange(free_step_, step_) <= 1 && num_asked <= 2 * free_asked_;
  free_asked_ = num_asked;
  pause_left_ = 0;
  if (!warm) return;
  const double all = static_cast<double>(num_requests) / static_cast<double>(num_asked);
  const double cost = controller_.price() * seconds * all;
  free_gain_ += kGainSmoothing * (gains * all - cost - free_gain_);
  const bool pause = free_gain_ < 0 && cost > kNegligible * static_cast<double>(num_requests);
  pause_ = pause ? std::min(2 * pause_ + 1, kLongestPause) : 0;
  pause_left_ = pause_;
}

std::vector<SpeculationRequest> Speculator::Describe(std::span<Sequence* const> sequences,
                                                     std::span<const int> deepest) const {
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
    if (!deepest.empty()) request.max_levels = deepest[requests.size()];
    request.max_nodes = off || request.max_levels < 1
                            ? 1
                            : static_cast<int>(std::min<int64_t>(options_.max_draft_nodes, request.tokens_left));
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
  const Clock::time_point start = Clock::now();
  const bool free = drafters_[drafter]->costs_nothing();
  std::vector<DraftContext> contexts;
  std::vector<DraftTree> trees;
  contexts.reserve(indices.size());
  trees.reserve(indices.size());
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
    if (!drafters_[drafter]->catches_up()) continue;
    std::vector<int64_t>& seen = seen_[sequence.id()];
    seen.resize(drafters_.size(), 0);
    seen[drafter] = std::ssize(sequence.tokens());
  }
  absl::StatusOr<std::vector<DraftTree>> proposed = drafters_[drafter]->Propose(contexts);
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
    const int depth = tree.Depth(), deepest = requests[indices[i]].max_levels;
    levels = std::max(levels, depth);
    if (depth > deepest) tree = tree.CutBelow(deepest);
    trees[i] = std::move(tree);
    if (free) continue;
    const bool cut_short = depth >= std::min(contexts[i].max_levels, deepest);
    controller_.Learn({contexts[i].sequence_id, drafter, choices_[indices[i]].trial, &trees[i], cut_short});
  }
  if (free) return trees;
  const int count = static_cast<int>(contexts.size());
  const DraftCosts& costs = controller_.draft_costs(drafter);
  stats->expected_draft_s += costs.Seconds(count, levels);
  // A drafter that was not asked in the step before finds cold caches, which says nothing about using it.
  const bool warm = step_ - std::exchange(asked_[drafter], step_) <= 1;
  if (warm || catch_up > DraftCosts::kLongCatchUp * count || !costs.Knows(count)) {
    drafts_.push_back({drafter, count, levels, catch_up, SecondsSince(start)});
  }
  return trees;
}

// While they do not pay, always the same few of many requests, by their ids: an index of a request's text is made and
// kept up only for those.
std::vector<size_t> Speculator::RequestsForFree(int drafter, std::span<const SpeculationRequest> requests) const {
  std::vector<size_t> indices;
  uint64_t probed = kProbedShare;
  for (size_t i = 0; i < requests.size(); ++i) {
    const bool allowed = requests[i].drafter == kAnyDrafter || requests[i].drafter == drafter;
    if (!allowed || requests[i].max_nodes <= 1 || choices_[i].trial) continue;
    indices.push_back(i);
    probed = std::min(probed, requests[i].sequence_id % kProbedShare);
  }
  if (pause_ > 0 && indices.size() >= kProbedShare) {
    std::erase_if(indices, [&](size_t i) { return requests[i].sequence_id % kProbedShare != probed; });
  }
  return indices;
}

void Speculator::AskFreeDrafters(std::span<Sequence* const> sequences, std::span<const SpeculationRequest> requests,
                                 int rows, std::vector<DraftTree>* trees, StepStats* stats) {
  const Clock::time_point start = Clock::now();
  const int num_requests = static_cast<int>(requests.size());
  double gains = 0;
  size_t num_asked = 0;
  if (step_ - free_used_ >= kFreeTrialSteps) {
    free_used_ = step_;
    free_trials_ = std::max(num_requests / kProbedShare, 1);
  }
  for (int d = 0; d < static_cast<int>(drafters_.size()); ++d) {
    if (!drafters_[d]->costs_nothing()) continue;
    const std::vector<size_t> indices = RequestsForFree(d, requests);
    if (indices.empty()) continue;
    std::vector<int> nodes;
    for (const size_t i : indices) nodes.push_back(requests[i].max_nodes);
    num_asked += indices.size();
    std::vector<DraftTree> proposed = Ask(d, sequences, requests, indices, nodes, stats);
    for (size_t i = 0; i < indices.size(); ++i) {
      SpeculationChoice& choice = choices_[indices[i]];
      // What the chosen drafter would have had is free again; it covers this draft, or the rest of the step does.
      const int extra = proposed[i].num_nodes() - choice.nodes;
      if (proposed[i].num_nodes() <= 1 || extra > rows) continue;
      const double gain = controller_.Gain({sequences[indices[i]]->id(), d, false, &proposed[i]}) - choice.gain;
      const bool trial = gain <= 0 && choice.nodes <= 1 && free_trials_ > 0;
      if (gain <= 0 && !trial) continue;
      free_trials_ -= trial;
      if (!trial) free_used_ = step_;
      gains += std::max(gain, 0.0);
      rows -= extra;
      choice = {
          .drafter = d, .nodes = proposed[i].num_nodes(), .trial = trial, .gain = choice.gain + std::max(gain, 0.0)};
      (*trees)[indices[i]] = std::move(proposed[i]);
      drafted_[indices[i]] = true;
    }
  }
  if (num_asked > 0) PauseFreeDrafters(gains, num_asked, requests.size(), SecondsSince(start));
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
  if (drafters_.empty()) return;
  if (walk.finish_reason != FinishReason::kNone) {
    controller_.ObserveReply(std::ssize(sequence.tokens()) - sequence.num_prompt_tokens() + std::ssize(walk.tokens));
  }
  if (choices_[index].nodes <= 1) return;
  const SpeculationChoice& choice = choices_[index];
  const int accepted = static_cast<int>(walk.path.size()) - 1;
  if (tree.num_nodes() <= 1) return;
  const int depth = tree.Depth();
  controller_.acceptance().Observe({.sequence_id = sequence.id(),
                                    .drafter = choice.drafter,
                                    .tree = &tree,
                                    .path = walk.path,
                                    .rejected = walk.finish_reason == FinishReason::kNone,
                                    .ended = walk.finish_reason == FinishReason::kStop});
  const std::string_view name = drafters_[choice.drafter]->name();
  stats->drafter = stats->drafter.empty() || stats->drafter == name ? name : "mixed";
  stats->num_drafts += 1;
  stats->num_draft_tokens += tree.num_nodes() - 1;
  stats->num_accepted_tokens += accepted;
  const int tracked = static_cast<int>(stats->drafted_per_depth.size());
  for (int d = 0; d < std::min(depth, tracked); ++d) ++stats->drafted_per_depth[d];
  for (int d = 0; d < std::min(accepted, tracked); ++d) ++stats->accepted_per_depth[d];
}

void Speculator::ObserveVerify(int rows, int requests, int tokens, double seconds) {
  if (drafters_.empty()) return;
  if (used_ != kAnyDrafter) controller_.ObserveUse(used_, requests, tokens, draft_seconds_ + seconds);
  controller_.ObserveStep(rows, requests, seconds);
}

void Speculator::Forget(uint64_t sequence_id) {
  for (const auto& drafter : drafters_) drafter->Forget(sequence_id);
  controller_.acceptance().Forget(sequence_id);
  seen_.erase(sequence_id);
}

}  // namespace linspec
