// Steps that the model drafts itself, ahead of the host: when they may follow, and what is to be learned from them.
#include <algorithm>
#include <cmath>
#include <utility>

#include "scheduler/speculator.h"

namespace linspec {
namespace {

constexpr double kNodesSmoothing = 0.2;
constexpr double kLeastNodes = 0.5;  // of a request, beyond the root: with fewer the host had better decide each step

}  // namespace

void Speculator::NoteDrafterOfAll(std::span<const DraftTree> trees) {
  const auto uses = [&](const SpeculationChoice& choice) {
    return choice.nodes > 1 && choice.drafter == choices_.front().drafter && choice.free_trial == kAnyDrafter;
  };
  if (choices_.empty() || !std::ranges::all_of(choices_, uses)) return;
  drafter_of_all_ = choices_.front().drafter;
  if (proposed_nodes_ == 0) return;  // before a request's first step there is nothing to draft from
  double nodes = 0;
  for (const DraftTree& tree : trees) nodes += tree.num_nodes() - 1;
  double& average = nodes_[drafter_of_all_];
  nodes /= static_cast<double>(trees.size());
  average += (average == 0 ? 1 : kNodesSmoothing) * (nodes - average);
}

std::optional<SelfDraft> Speculator::DraftsOn(const Model& model, std::span<Sequence* const> sequences,
                                              int max_draft_rows) const {
  if (drafter_of_all_ == kAnyDrafter || choices_.size() != sequences.size()) return std::nullopt;
  const DraftHeads heads = drafters_[drafter_of_all_]->heads();
  if (heads.heads == nullptr || !model.CanDraftWith(*heads.heads, std::ssize(sequences))) return std::nullopt;
  if (options_.calibrate && !controller_.MayContinue(drafter_of_all_, choices_.front().trial)) return std::nullopt;
  const double nodes = nodes_[drafter_of_all_] * static_cast<double>(sequences.size());
  const int rows = std::min(static_cast<int>(std::lround(nodes)), max_draft_rows);
  if (nodes_[drafter_of_all_] < kLeastNodes || rows < 1 || options_.max_draft_nodes < 2) return std::nullopt;
  return SelfDraft{.heads = heads.heads,
                   .num_levels = LevelsOfAll(),
                   .top_k = heads.top_k,
                   .num_rows = static_cast<int>(sequences.size()) + rows,
                   .max_nodes = options_.max_draft_nodes};
}

int Speculator::LevelsOfAll() const {
  int levels = drafters_[drafter_of_all_]->heads().num_levels;
  for (const SpeculationChoice& choice : choices_) levels = std::min(levels, choice.max_levels);
  return std::max(levels, 1);
}

void Speculator::Continue(std::span<Sequence* const> sequences, std::span<const int> deepest, StepStats* stats) {
  const SpeculationChoice choice = choices_.front();
  const int drafter = drafter_of_all_;
  StartStep();
  choices_.assign(sequences.size(), choice);
  drafter_of_all_ = drafter;
  continued_ = true;
  asked_[drafter] = step_;  // its caches are warm
  if (!options_.calibrate || sequences.empty()) return;
  controller_.Continue(static_cast<int>(sequences.size()));
  WatchFreeDrafters(sequences, Describe(sequences, deepest), stats);
}

void Speculator::ObserveTrees(std::span<Sequence* const> sequences, std::span<DraftTree> trees,
                              std::span<DraftTree> drafts, StepStats* stats) {
  if (trees.empty()) return;
  const int levels = LevelsOfAll(), num_requests = static_cast<int>(trees.size());
  std::vector<SpeculationProposal> proposals;
  int rows = 0, deepest = 0;
  for (size_t i = 0; i < trees.size(); ++i) {
    proposals.push_back({sequences[i]->id(), drafter_of_all_, choices_[i].trial, &trees[i]});
    rows += trees[i].num_nodes();
    deepest = std::max(deepest, trees[i].Depth());
  }
  drafters_[drafter_of_all_]->NoteDepth(deepest);
  if (!options_.calibrate) return;
  for (size_t i = 0; i < drafts.size(); ++i) {
    SpeculationProposal drafted = proposals[i];
    drafted.tree = &drafts[i];
    drafted.cut_short = drafts[i].Depth() >= levels;
    controller_.Learn(drafted);
  }
  const double verify = controller_.step_costs().Estimate(rows, num_requests);
  const double draft = controller_.draft_costs(drafter_of_all_).Seconds(num_requests, levels);
  continued_seconds_ = verify + draft;
  const double ahead = controller_.ahead_costs(drafter_of_all_).Ratio(num_requests);
  stats->expected_tokens = num_requests + controller_.Expect(proposals);
  stats->expected_verify_s = ahead * verify;
  stats->expected_draft_s = ahead * draft;
}

}  // namespace linspec
