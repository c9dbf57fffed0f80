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

constexpr double kMostUse = 0.5;  // of the requests of a step that tells what the use of a drafter comes to

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
      controller_(CostNothing(drafters_), options.max_draft_slowdown),
      asked_(drafters_.size(), 0),
      nodes_(drafters_.size(), 0) {}

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

SpeculationMode Speculator::ModeOf(const Sequence& sequence) const {
  const SpeculationMode mode = sequence.request().speculation;
  return mode == SpeculationMode::kDefault ? options_.speculation : mode;
}

bool Speculator::Crowded(int64_t num_sequences) const {
  return options_.spec_max_batch > 0 && num_sequences > options_.spec_max_batch;
}

bool Speculator::StaysPlain(std::span<Sequence* const> sequences) const {
  if (drafters_.empty() || options_.max_draft_nodes == 1 || Crowded(std::ssize(sequences))) return true;
  const bool all_off = std::all_of(sequences.begin(), sequences.end(), [&](const Sequence* sequence) {
    return ModeOf(*sequence) == SpeculationMode::kOff;
  });
  return all_off || (options_.calibrate && controller_.StaysPlain());
}

std::vector<DraftTree> Speculator::Propose(std::span<Sequence* const> sequences, std::span<const int> deepest,
                                           int max_draft_rows, StepStart start, StepStats* stats) {
  std::vector<DraftTree> trees;
  for (const Sequence* sequence : sequences) trees.push_back(DraftTree::Root(sequence->pending_token()));
  StartStep();
  if (drafters_.empty() || sequences.empty()) return trees;
  const std::vector<SpeculationRequest> requests = Describe(sequences, deepest);
  choices_ = Choose(requests, max_draft_rows, start);
  drafted_.assign(sequences.size(), false);
  if (!options_.calibrate) {
    AskChosenDrafters(sequences, requests, &trees, stats);
    NoteDrafterOfAll(trees);
    return trees;
  }
  if (start == StepStart::kAhead) {
    WatchFreeDrafters(sequences, requests, stats);
    stats->expected_tokens = static_cast<double>(sequences.size());
    stats->expected_verify_s = controller_.plain_seconds();
    return trees;
  }
  const Clock::time_point begin = Clock::now();
  int rows = max_draft_rows;
  for (const SpeculationChoice& choice : choices_) rows -= choice.nodes - 1;
  AskFreeDrafters(sequences, requests, rows, &trees, stats);
  AskChosenDrafters(sequences, requests, &trees, stats);
  const Clock::time_point drafted = Clock::now();
  std::vector<SpeculationProposal> proposals;
  for (size_t i = 0; i < trees.size(); ++i) {
    if (trees[i].num_nodes() > 1) {
      proposals.push_back({sequences[i]->id(), choices_[i].drafter, choices_[i].trial, &trees[i]});
    }
  }
  const int num_requests = static_cast<int>(trees.size());
  stats->expected_tokens = num_requests + controller_.Prune(proposals, num_requests, stats->expected_draft_s);
  stats->expected_draft_s += reading_seconds_;
  int num_rows = 0;
  for (const DraftTree& tree : trees) num_rows += tree.num_nodes();
  stats->expected_verify_s = controller_.step_costs().Estimate(num_rows, num_requests);
  NoteDrafterOfAll(trees);
  ObserveDrafts(SecondsSince(drafted));
  if (asked_any_) draft_seconds_ = SecondsSince(begin);
  return trees;
}

void Speculator::StartStep() {
  ++step_;
  choices_.clear();
  drafts_.clear();
  asked_any_ = continued_ = false;
  draft_seconds_ = reading_seconds_ = progress_ = 0;
  catch_up_ = 0;
  proposed_nodes_ = 0;
  drafter_of_all_ = kAnyDrafter;
}

void Speculator::ObserveDrafts(double seconds) {
  double contexts = 0;
  for (const Asked& asked : drafts_) contexts += asked.contexts;
  for (const Asked& asked : drafts_) {
    controller_.draft_costs(asked.drafter)
        .Observe(asked.contexts, asked.levels, asked.catch_up, asked.seconds + seconds * asked.contexts / contexts);
  }
}

int Speculator::DrafterOfMost() const {
  int drafter = kAnyDrafter;
  double used = 0;
  for (const SpeculationChoice& choice : choices_) {
    if (choice.trial) return kAnyDrafter;
    if (choice.nodes <= 1 || drafters_[choice.drafter]->costs_nothing()) continue;
    if (drafter != kAnyDrafter && drafter != choice.drafter) return kAnyDrafter;
    drafter = choice.drafter;
    used += 1;
  }
  return used >= kMostUse * static_cast<double>(choices_.size()) ? drafter : kAnyDrafter;
}

std::vector<SpeculationRequest> Speculator::Describe(std::span<Sequence* const> sequences,
                                                     std::span<const int> deepest) const {
  const bool crowded = Crowded(std::ssize(sequences));
  std::vector<SpeculationRequest> requests;
  for (const Sequence* sequence : sequences) {
    const SpeculationMode mode = ModeOf(*sequence);
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

std::vector<SpeculationChoice> Speculator::Choose(std::span<const SpeculationRequest> requests, int max_draft_rows,
                                                  StepStart start) {
  if (options_.calibrate) return controller_.Choose(requests, max_draft_rows, start);
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
  asked_any_ = true;
  catch_up_ += catch_up;
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
    proposed_nodes_ += trees[i].num_nodes() - 1;
    const bool cut_short = depth >= std::min(contexts[i].max_levels, deepest);
    controller_.Learn({contexts[i].sequence_id, drafter, choices_[indices[i]].trial, &trees[i], cut_short});
  }
  if (free) return trees;
  const int count = static_cast<int>(contexts.size());
  const DraftCosts& costs = controller_.draft_costs(drafter);
  stats->expected_draft_s += costs.Seconds(count, levels);
  if (catch_up > DraftCosts::kLongCatchUp * count) {
    reading_seconds_ += costs.PerCatchUpToken() * static_cast<double>(catch_up);
  }
  // A drafter that was not asked in the step before finds cold caches, which says nothing about using it.
  const bool warm = step_ - std::exchange(asked_[drafter], step_) <= 1;
  if (warm || catch_up > DraftCosts::kLongCatchUp * count || !costs.Knows(count)) {
    drafts_.push_back({drafter, count, levels, catch_up, SecondsSince(start)});
  }
  return trees;
}

void Speculator::AskChosenDrafters(std::span<Sequence* const> sequences, std::span<const SpeculationRequest> requests,
                                   std::vector<DraftTree>* trees, StepStats* stats) {
  for (int d = 0; d < static_cast<int>(drafters_.size()); ++d) {
    std::vector<size_t> indices;
    std::vector<int> nodes;
    bool pays = !options_.calibrate;
    for (size_t i = 0; i < requests.size(); ++i) {
      if (choices_[i].drafter != d || choices_[i].nodes <= 1 || drafted_[i]) continue;
      indices.push_back(i);
      nodes.push_back(choices_[i].nodes);
      pays |= choices_[i].trial;
    }
    if (indices.empty()) continue;
    if (!pays && !controller_.StillPays(d, static_cast<int>(indices.size()))) {
      for (const size_t i : indices) choices_[i].nodes = 1;
      continue;
    }
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
  progress_ += static_cast<double>(walk.path.size());
  if (choices_.empty() || choices_[index].nodes <= 1) return;
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

void Speculator::ObserveStep(const Spent& spent, StepStats* stats) {
  if (choices_.empty() || !options_.calibrate) return;
  const double saved = controller_.ledger().saved();
  controller_.ObserveStep(
      {.rows = spent.rows,
       .requests = spent.requests,
       .tokens = progress_,
       .prompt_tokens = spent.prompt_tokens,
       .catch_up = catch_up_,
       .drafter = DrafterOfMost(),
       .verify_seconds = spent.verify_seconds,
       .draft_seconds = draft_seconds_,
       .seconds = spent.seconds,
       .expected_seconds = continued_ ? continued_seconds_ : stats->expected_draft_s + stats->expected_verify_s,
       .drafter_of_all = drafter_of_all_,
       .ahead = continued_});
  stats->speculation_saved_s = controller_.ledger().saved() - saved;
}

void Speculator::Forget(uint64_t sequence_id) {
  for (const auto& drafter : drafters_) drafter->Forget(sequence_id);
  controller_.acceptance().Forget(sequence_id);
  seen_.erase(sequence_id);
}

}  // namespace linspec
