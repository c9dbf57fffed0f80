#include "models/draft_model_drafter.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace linspec {
namespace {

// Up to this many tokens behind, they ride along as a chain above the pending token: a few rows more in a forward that
// is needed anyway, instead of a prefill of their own.
constexpr int64_t kMaxRideAlong = 4;

}  // namespace

absl::StatusOr<std::unique_ptr<DraftModelDrafter>> DraftModelDrafter::Create(std::unique_ptr<Model> model,
                                                                             int64_t target_vocab_size,
                                                                             DraftModelOptions options,
                                                                             std::unique_ptr<DraftChains> chains) {
  if (model->config().vocab_size != target_vocab_size) {
    return absl::InvalidArgumentError(fmt::format("draft model has a vocabulary of {}, the target of {}",
                                                  model->config().vocab_size, target_vocab_size));
  }
  const GrowthOptions growth{options.max_depth, options.top_k, options.min_confidence};
  if (absl::Status valid = growth.Validate(); !valid.ok()) return valid;
  if (options.max_catch_up_tokens < 1) {
    return absl::InvalidArgumentError(
        fmt::format("draft options out of range: max_catch_up_tokens {} (1 or more)", options.max_catch_up_tokens));
  }
  if (chains != nullptr && options.top_k > chains->max_top_k()) {
    return absl::InvalidArgumentError(
        fmt::format("draft options out of range: top_k {} (1 to {} here)", options.top_k, chains->max_top_k()));
  }
  absl::StatusOr<std::unique_ptr<StatePool>> pool = model->CreatePool(options.max_sequences);
  if (!pool.ok()) return pool.status();
  return std::unique_ptr<DraftModelDrafter>(
      new DraftModelDrafter(std::move(model), *std::move(pool), options, std::move(chains)));
}

void DraftModelDrafter::Forget(uint64_t sequence_id) { slots_.erase(sequence_id); }

absl::StatusOr<std::vector<DraftTree>> DraftModelDrafter::Propose(std::span<const DraftContext> contexts) {
  levels_computed_ = 0;
  std::vector<DraftTree> proposals;
  for (const DraftContext& context : contexts) proposals.push_back(DraftTree::Root(context.tokens.back()));
  if (absl::Status committed = CommitAccepted(contexts); !committed.ok()) return committed;
  absl::StatusOr<std::vector<Draft>> drafts = StartDrafts(contexts);
  if (!drafts.ok()) return drafts.status();
  if (drafts->empty()) return proposals;
  const bool chain = CanChain(*drafts);
  if (absl::Status grown = chain ? GrowChains(*drafts) : Grow(*drafts); !grown.ok()) return grown;

  int deepest = 0;
  for (Draft& draft : *drafts) {
    proposals[draft.index] = draft.growth.TakeTree();
    deepest = std::max(deepest, proposals[draft.index].Depth());
  }
  if (chain) levels_ = std::min(deepest + 1, options_.max_depth);
  return proposals;
}

// Commits, of the trees verified last, the paths that became the sequences' text.
absl::Status DraftModelDrafter::CommitAccepted(std::span<const DraftContext> contexts) {
  const VerifyBatch batch = std::exchange(last_batch_, {});
  const std::vector<uint64_t> sequences = std::exchange(last_sequences_, {});
  if (batch.num_requests() == 0) return absl::OkStatus();
  std::vector<std::vector<int32_t>> paths(batch.num_requests());
  for (int r = 0; r < batch.num_requests(); ++r) {
    const auto context = std::find_if(contexts.begin(), contexts.end(),
                                      [&](const DraftContext& c) { return c.sequence_id == sequences[r]; });
    const auto slot = slots_.find(sequences[r]);
    if (context == contexts.end() || slot == slots_.end() || slot->second.id() != batch.slots[r]) continue;
    const int32_t begin = batch.row_starts[r], num_nodes = batch.row_starts[r + 1] - begin;
    const int64_t length = pool_->length(batch.slots[r]);
    const std::span<const int32_t> committed = context->tokens.first(context->tokens.size() - 1);
    int32_t parent = -1;
    for (int32_t node = 0; node < num_nodes; ++node) {
      const size_t position = length + paths[r].size();
      if (position >= committed.size()) break;
      if (batch.parents[begin + node] != parent || batch.tokens[begin + node] != committed[position]) continue;
      paths[r].push_back(node);
      parent = node;
    }
  }
  return last_chained_ ? chains_->Commit(batch, paths, pool_.get()) : model_->Commit(batch, paths, pool_.get());
}

// Gives slots, prefills what sequences lag behind, and returns the contexts that can be drafted for.
absl::StatusOr<std::vector<DraftModelDrafter::Draft>> DraftModelDrafter::StartDrafts(
    std::span<const DraftContext> contexts) {
  std::vector<Draft> drafts;
  std::vector<PrefillChunk> chunks;
  int64_t prefill_left = options_.max_catch_up_tokens;
  for (size_t i = 0; i < contexts.size(); ++i) {
    const DraftContext& context = contexts[i];
    if (context.max_nodes <= 1) continue;
    auto slot = slots_.find(context.sequence_id);
    if (slot == slots_.end()) {
      StateSlot fresh = pool_->Acquire();
      if (!fresh.valid()) continue;
      slot = slots_.emplace(context.sequence_id, std::move(fresh)).first;
    }
    const int64_t length = pool_->length(slot->second.id());
    const int64_t behind = static_cast<int64_t>(context.tokens.size()) - 1 - length;
    if (behind < 0) return absl::InternalError(fmt::format("sequence {} became shorter", context.sequence_id));
    const int64_t prefill = behind <= kMaxRideAlong ? 0 : std::min(behind, prefill_left);
    if (prefill > 0) {
      chunks.push_back({.slot = slot->second.id(), .tokens = context.tokens.subspan(length, prefill)});
      prefill_left -= prefill;
    }
    if (behind - prefill > kMaxRideAlong) continue;

    Draft draft{.growth = DraftGrowth(&context, growth_options()),
                .index = i,
                .slot = slot->second.id(),
                .tree = {},
                .pending = 0,
                .nodes = {},
                .frontier = {DraftGrowth::kPending}};
    for (const int32_t token : context.tokens.subspan(length + prefill)) {
      draft.tree.Add(token, draft.tree.num_nodes() - 1);
    }
    draft.pending = draft.tree.num_nodes() - 1;
    drafts.push_back(std::move(draft));
  }
  if (chunks.empty()) return drafts;
  if (absl::Status prefilled = model_->Prefill(chunks, pool_.get()); !prefilled.ok()) return prefilled;
  return drafts;
}

// Looks at the drafts level by level, all of them in one forward each.
absl::Status DraftModelDrafter::Grow(std::vector<Draft>& drafts) {
  for (int depth = 0; depth < options_.max_depth; ++depth) {
    levels_computed_ = depth + 1;
    const VerifyBatch batch = Pack(drafts);
    const absl::StatusOr<VerifyResult> result =
        depth == 0 ? model_->Verify(batch, *pool_) : model_->Extend(batch, *pool_);
    if (!result.ok()) return result.status();
    Remember(batch, drafts, /*chained=*/false);
    const size_t vocab = model_->config().vocab_size;
    size_t row = 0;
    bool more = false;
    for (Draft& draft : drafts) {
      if (depth == 0) row += draft.tree.num_nodes() - 1;  // tokens that ride along: their logits are known text
      for (const int candidate : std::exchange(draft.frontier, {})) {
        draft.growth.AddChildren(candidate, result->logits.subspan(row++ * vocab, vocab));
      }
      more |= ExpandLevel(draft, depth + 1);
    }
    if (!more) break;
  }
  return absl::OkStatus();
}

void DraftModelDrafter::Remember(VerifyBatch looked_at, const std::vector<Draft>& drafts, bool chained) {
  last_batch_ = std::move(looked_at);
  last_chained_ = chained;
  last_sequences_.clear();
  for (const Draft& draft : drafts) last_sequences_.push_back(draft.growth.context().sequence_id);
}

bool DraftModelDrafter::CanChain(const std::vector<Draft>& drafts) const {
  return chains_ != nullptr && std::ranges::none_of(drafts, [](const Draft& draft) {
           return draft.growth.context().draw == DraftDraw::kIndependent;
         });
}

// All levels in one go, before anybody sees how sure the first ones are.
absl::Status DraftModelDrafter::GrowChains(std::vector<Draft>& drafts) {
  std::vector<const DraftContext*> contexts;
  int wanted = 1;
  for (const Draft& draft : drafts) {
    contexts.push_back(&draft.growth.context());
    wanted = std::max(wanted, std::min(draft.growth.budget(), draft.growth.context().max_levels));
  }
  levels_computed_ = std::min({wanted, levels_, chains_->max_levels()});
  const VerifyBatch known = Pack(drafts);
  const absl::StatusOr<DraftGuesses> guesses =
      chains_->Guess(known, *pool_, contexts, levels_computed_, options_.top_k);
  if (!guesses.ok()) return guesses.status();
  Remember(LookedAt(known, *guesses), drafts, /*chained=*/true);
  for (size_t r = 0; r < drafts.size(); ++r) {
    DraftGrowth& growth = drafts[r].growth;
    int parent = DraftGrowth::kPending;
    for (int level = 0; level < levels_computed_; ++level) {
      growth.AddChoices(parent, guesses->At(r, level));
      const std::vector<int> next = growth.NextLevel(level + 1, /*room=*/1);
      if (next.empty()) break;
      parent = next.front();
    }
  }
  return absl::OkStatus();
}

// Puts the likeliest candidates of this depth into the tree for the next look. False: nothing more to look at.
bool DraftModelDrafter::ExpandLevel(Draft& draft, int depth) const {
  const std::vector<int> level = draft.growth.NextLevel(depth, kMaxTreeNodes - draft.tree.num_nodes());
  for (const int index : level) {
    const int parent = draft.growth.candidate(index).parent;
    draft.nodes.resize(std::max<size_t>(draft.nodes.size(), index + 1));
    draft.nodes[index] = draft.tree.Add(draft.growth.candidate(index).token,
                                        parent == DraftGrowth::kPending ? draft.pending : draft.nodes[parent]);
    draft.frontier.push_back(index);
  }
  return !level.empty();
}

VerifyBatch DraftModelDrafter::Pack(const std::vector<Draft>& drafts) const {
  VerifyBatch batch;
  for (const Draft& draft : drafts) batch.Add(draft.slot, draft.tree);
  return batch;
}

}  // namespace linspec
