// Drafts with a small linear-attention model: a chain, or a tree grown level by level along the likeliest paths. Of a
// model that makes chains itself (DraftChains) it asks for all levels at once, as many as the deepest tree of the last
// call had and one more, and the tree is that chain with the other choices beside each of its nodes.
//
// The draft model's state only ever holds tokens that the target has committed. A drafted level is verified on top of
// the levels before it (Model::Extend), so a chain of n tokens costs n forwards of one row, and neither copies a state
// nor rolls one back. Nodes that the target accepts are committed by path at the next Propose, not computed again.
//
// Threads: engine thread only. Ownership: owns the draft model and its state pool; a sequence holds one slot from its
// first draft to Forget.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "models/draft_chains.h"
#include "models/draft_growth.h"
#include "models/drafter.h"
#include "models/model.h"
#include "models/state_pool.h"

namespace linspec {

struct DraftModelOptions {
  int max_sequences = 64;       // slots; further sequences are not drafted for
  int max_depth = 4;            // drafted tokens on a path
  int top_k = 1;                // children of a node, and nodes looked at per level; 1: a chain
  float min_confidence = 0.3f;  // no children for a node whose likeliest token is less probable than this
  int64_t max_catch_up_tokens =
      1024;  // prefilled per call, over all sequences; one that is still behind is not drafted
};

class DraftModelDrafter final : public Drafter {
 public:
  // INVALID_ARGUMENT: options out of range, or a draft vocabulary other than the target's. RESOURCE_EXHAUSTED:
  // no memory for the states. chains: of the model, or null; used but for independent draws, which need distributions.
  static absl::StatusOr<std::unique_ptr<DraftModelDrafter>> Create(std::unique_ptr<Model> model,
                                                                   int64_t target_vocab_size, DraftModelOptions options,
                                                                   std::unique_ptr<DraftChains> chains = nullptr);

  std::string_view name() const override { return "draft"; }
  absl::StatusOr<std::vector<DraftTree>> Propose(std::span<const DraftContext> contexts) override;
  void Forget(uint64_t sequence_id) override;
  int levels_computed() const override { return levels_computed_; }
  int64_t bytes_per_request() const override { return pool_->bytes_per_slot(); }
  bool catches_up() const override { return true; }
  const StatePool& pool() const { return *pool_; }

 private:
  // One context being drafted for.
  struct Draft {
    DraftGrowth growth;
    size_t index;  // of the context
    int32_t slot;
    DraftTree tree;             // what the model sees: tokens it lags behind, the pending one, candidates
    int pending;                // node of the pending token in tree
    std::vector<int> nodes;     // [candidate] its node in tree, where the draft model looks at it
    std::vector<int> frontier;  // candidates (or kPending) whose logits come next, in node order
  };

  DraftModelDrafter(std::unique_ptr<Model> model, std::unique_ptr<StatePool> pool, DraftModelOptions options,
                    std::unique_ptr<DraftChains> chains)
      : model_(std::move(model)),
        pool_(std::move(pool)),
        options_(options),
        chains_(std::move(chains)),
        levels_(options.max_depth) {}

  absl::Status CommitAccepted(std::span<const DraftContext> contexts);
  absl::StatusOr<std::vector<Draft>> StartDrafts(std::span<const DraftContext> contexts);
  absl::Status Grow(std::vector<Draft>& drafts);
  bool CanChain(const std::vector<Draft>& drafts) const;
  absl::Status GrowChains(std::vector<Draft>& drafts);
  void Remember(VerifyBatch looked_at, const std::vector<Draft>& drafts, bool chained);
  bool ExpandLevel(Draft& draft, int depth) const;
  GrowthOptions growth_options() const { return {options_.max_depth, options_.top_k, options_.min_confidence}; }
  VerifyBatch Pack(const std::vector<Draft>& drafts) const;

  std::unique_ptr<Model> model_;
  std::unique_ptr<StatePool> pool_;
  const DraftModelOptions options_;
  const std::unique_ptr<DraftChains> chains_;      // or null
  int levels_;                                     // to ask chains_ for
  std::unordered_map<uint64_t, StateSlot> slots_;  // by sequence

  int levels_computed_ = 0;

  // What the model looked at last, for CommitAccepted.
  VerifyBatch last_batch_;
  bool last_chained_ = false;
  std::vector<uint64_t> last_sequences_;  // [num_requests]
};

}  // namespace linspec
