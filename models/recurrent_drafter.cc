#include "models/recurrent_drafter.h"

#include <algorithm>
#include <utility>

namespace linspec {

absl::StatusOr<std::unique_ptr<RecurrentDrafter>> RecurrentDrafter::Create(std::unique_ptr<RecurrentHead> head,
                                                                           Model* target, GrowthOptions options) {
  if (absl::Status valid = options.Validate(); !valid.ok()) return valid;
  return std::unique_ptr<RecurrentDrafter>(new RecurrentDrafter(std::move(head), target, options));
}

absl::StatusOr<std::vector<DraftTree>> RecurrentDrafter::Propose(std::span<const DraftContext> contexts) {
  const size_t dim = target_->config().hidden_size;
  std::vector<DraftTree> trees;
  std::vector<Draft> drafts;
  for (size_t i = 0; i < contexts.size(); ++i) {
    trees.push_back(DraftTree::Root(contexts[i].tokens.back()));
    if (contexts[i].max_nodes <= 1 || contexts[i].hidden.size() != dim) continue;
    drafts.push_back({.growth = DraftGrowth(&contexts[i], options_), .index = i, .frontier = {DraftGrowth::kPending}});
  }
  if (absl::Status grown = Grow(drafts); !grown.ok()) return grown;
  for (Draft& draft : drafts) trees[draft.index] = draft.growth.TakeTree();
  return trees;
}

// Level by level, all drafts in one step of the head each.
absl::Status RecurrentDrafter::Grow(std::vector<Draft>& drafts) {
  const size_t dim = target_->config().hidden_size, vocab = target_->config().vocab_size;
  std::vector<float> states;    // [frontier rows of all drafts, D]
  std::vector<int32_t> tokens;  // [frontier rows of all drafts]
  for (const Draft& draft : drafts) {
    const DraftContext& context = draft.growth.context();
    states.insert(states.end(), context.hidden.begin(), context.hidden.end());
    tokens.push_back(context.tokens.back());
  }
  levels_computed_ = 0;
  for (int depth = 1; !tokens.empty(); ++depth) {
    ++levels_computed_;
    const absl::StatusOr<std::span<const float>> logits = head_->Step(states, tokens, target_);
    if (!logits.ok()) return logits.status();
    const std::vector<float> parents = std::exchange(states, {});
    tokens.clear();
    size_t begin = 0;  // the draft's first row
    for (Draft& draft : drafts) {
      const std::vector<int> read = std::exchange(draft.frontier, {});
      for (size_t i = 0; i < read.size(); ++i) {
        draft.growth.AddChildren(read[i], logits->subspan((begin + i) * vocab, vocab));
      }
      draft.frontier = draft.growth.NextLevel(depth, kMaxTreeNodes);
      for (const int index : draft.frontier) {
        const DraftGrowth::Candidate& candidate = draft.growth.candidate(index);
        const auto parent = std::find(read.begin(), read.end(), candidate.parent) - read.begin();
        const auto state = parents.begin() + static_cast<std::ptrdiff_t>((begin + parent) * dim);
        states.insert(states.end(), state, state + static_cast<std::ptrdiff_t>(dim));
        tokens.push_back(candidate.token);
      }
      begin += read.size();
    }
  }
  return absl::OkStatus();
}

}  // namespace linspec
