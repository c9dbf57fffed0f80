#include "models/draft_model_drafter.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "models/draft_candidates.h"

namespace linspec {
namespace {

// Up to this many tokens behind, they ride along as a chain above the pending token: a few rows more in a forward that
// is needed anyway, instead of a prefill of their own.
constexpr int64_t kMaxRideAlong = 4;

}  // namespace

absl::StatusOr<std::unique_ptr<DraftModelDrafter>> DraftModelDrafter::Create(std::unique_ptr<Model> model,
                                                                             int64_t target_vocab_size,
                                                                             DraftModelOptions options) {
  if (model->config().vocab_size != target_vocab_size) {
    return absl::InvalidArgumentError(fmt::format("draft model has a vocabulary of {}, the target of {}",
                                                  model->config().vocab_size, target_vocab_size));
  }
  if (options.max_depth < 1 || options.max_depth >= kMaxTreeNodes || options.top_k < 1 ||
      options.top_k >= kMaxTreeNodes || !(options.min_confidence >= 0 && options.min_confidence <= 1) ||
      options.max_catch_up_tokens < 1) {
    return absl::InvalidArgumentError(fmt::format(
        "draft options out of range: max_depth {} and top_k {} (1 to {}), min_confidence {} (0 to 1), "
        "max_catch_up_tokens {} (1 or more)",
        options.max_depth, options.top_k, kMaxTreeNodes - 1, options.min_confidence, options.max_catch_up_tokens));
  }
  absl::StatusOr<std::unique_ptr<StatePool>> pool = model->CreatePool(options.max_sequences);
  if (!pool.ok()) return pool.status();
  return std::unique_ptr<DraftModelDrafter>(new DraftModelDrafter(std::move(model), *std::move(pool), options));
}

void DraftModelDrafter::Forget(uint64_t sequence_id) { slots_.erase(sequence_id); }

absl::StatusOr<std::vector<DraftTree>> DraftModelDrafter::Propose(std::span<const DraftContext> contexts) {
  std::vector<DraftTree> proposals;
  for (const DraftContext& context : contexts) proposals.push_back(DraftTree::Root(context.tokens.back()));
  if (absl::Status committed = CommitAccepted(contexts); !committed.ok()) return committed;
  absl::StatusOr<std::vector<Draft>> drafts = StartDrafts(contexts);
  if (!drafts.ok()) return drafts.status();
  if (drafts->empty()) return proposals;
  if (absl::Status grown = Grow(*drafts); !grown.ok()) return grown;

  for (Draft& draft : *drafts) {
    // A path is never likelier than its beginning, so the best candidates contain their parents, and come after them.
    std::vector<int> order(draft.candidates.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return draft.candidates[a].probability > draft.candidates[b].probability; });
    order.resize(std::min<size_t>(order.size(), draft.budget));
    DraftTree& proposal = proposals[draft.index];
    proposal.probabilities = {1.0f};
    const bool independent = draft.context->draw == DraftDraw::kIndependent;
    if (independent) proposal.distributions.resize(1);
    std::vector<int> node_of(draft.candidates.size(), 0);
    for (const int candidate : order) {
      const int parent = draft.candidates[candidate].parent;
      node_of[candidate] = proposal.Add(draft.candidates[candidate].token, parent < 0 ? 0 : node_of[parent]);
      proposal.probabilities.push_back(draft.candidates[candidate].probability);
      if (independent) proposal.distributions.push_back(std::move(draft.candidates[candidate].distribution));
    }
  }
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
  return model_->Commit(batch, paths, pool_.get());
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

    Draft draft{.context = &context,
                .index = i,
                .slot = slot->second.id(),
                .budget = std::min(context.max_nodes, kMaxTreeNodes) - 1,
                .tree = {},
                .pending = 0,
                .candidates = {},
                .frontier = {-1}};
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
    const VerifyBatch batch = Pack(drafts);
    const absl::StatusOr<VerifyResult> result =
        depth == 0 ? model_->Verify(batch, *pool_) : model_->Extend(batch, *pool_);
    if (!result.ok()) return result.status();
    last_batch_ = batch;
    last_sequences_.clear();
    for (const Draft& draft : drafts) last_sequences_.push_back(draft.context->sequence_id);

    const size_t vocab = model_->config().vocab_size;
    size_t row = 0;
    bool more = false;
    for (Draft& draft : drafts) {
      if (depth == 0) row += draft.tree.num_nodes() - 1;  // tokens that ride along: their logits are known text
      for (const int candidate : std::exchange(draft.frontier, {})) {
        AddCandidates(draft, candidate, result->logits.subspan(row++ * vocab, vocab));
      }
      more |= ExpandLevel(draft, depth + 1);
    }
    if (!more) break;
  }
  return absl::OkStatus();
}

void DraftModelDrafter::AddCandidates(Draft& draft, int parent, std::span<const float> logits) const {
  const int depth = parent < 0 ? 0 : draft.candidates[parent].depth;
  const float path = parent < 0 ? 1.0f : draft.candidates[parent].probability;
  const int64_t position = static_cast<int64_t>(draft.context->tokens.size()) + depth;
  const SamplingParams& sampling = *draft.context->sampling;
  if (draft.context->draw == DraftDraw::kIndependent) {
    std::optional<IndependentDraw> drawn = DrawIndependently(logits, sampling, position);
    if (!drawn || drawn->candidate.probability < options_.min_confidence ||
        path * drawn->candidate.probability < draft.context->min_probability) {
      return;
    }
    draft.candidates.push_back({.token = drawn->candidate.token,
                                .parent = parent,
                                .depth = depth + 1,
                                .probability = path * drawn->candidate.probability,
                                .distribution = std::move(drawn->distribution)});
    return;
  }
  const std::vector<DraftCandidate> choices =
      LikelyChoices(logits, sampling, position, options_.top_k, draft.context->draw == DraftDraw::kCoupled);
  if (choices.empty() || choices[0].probability < options_.min_confidence) return;
  for (const DraftCandidate& choice : choices) {
    if (path * choice.probability < draft.context->min_probability) break;
    draft.candidates.push_back(
        {.token = choice.token, .parent = parent, .depth = depth + 1, .probability = path * choice.probability});
  }
}

// Puts the likeliest candidates of this depth into the tree for the next look. False: nothing more to look at.
bool DraftModelDrafter::ExpandLevel(Draft& draft, int depth) const {
  if (depth >= options_.max_depth || depth >= draft.budget) return false;
  std::vector<int> level;
  for (size_t i = 0; i < draft.candidates.size(); ++i) {
    if (draft.candidates[i].depth == depth) level.push_back(static_cast<int>(i));
  }
  std::stable_sort(level.begin(), level.end(),
                   [&](int a, int b) { return draft.candidates[a].probability > draft.candidates[b].probability; });
  const int room = std::min(options_.top_k, kMaxTreeNodes - draft.tree.num_nodes());
  level.resize(std::clamp<int>(static_cast<int>(level.size()), 0, room));
  for (const int index : level) {
    Candidate& candidate = draft.candidates[index];
    const int parent = candidate.parent < 0 ? draft.pending : draft.candidates[candidate.parent].node;
    candidate.node = draft.tree.Add(candidate.token, parent);
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
