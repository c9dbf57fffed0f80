// Drafts with the recurrent head: a chain, or a tree grown level by level along the likeliest paths.
//
// Costs one small forward per level; keeps nothing per sequence, so a sequence never has to be caught up with.
// Sequences whose hidden state is not known yet (before their first step) are not drafted for.
//
// Ownership: owns the head, borrows the target for embedding and unembedding. Threads: engine thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "models/draft_growth.h"
#include "models/drafter.h"
#include "models/model.h"
#include "models/recurrent_head.h"

namespace linspec {

class RecurrentDrafter final : public Drafter {
 public:
  // target must outlive the drafter. INVALID_ARGUMENT: options out of range.
  static absl::StatusOr<std::unique_ptr<RecurrentDrafter>> Create(std::unique_ptr<RecurrentHead> head, Model* target,
                                                                  GrowthOptions options);

  std::string_view name() const override { return "recurrent"; }
  absl::StatusOr<std::vector<DraftTree>> Propose(std::span<const DraftContext> contexts) override;
  void Forget(uint64_t) override {}
  int levels_computed() const override { return levels_computed_; }
  bool reads_hidden() const override { return true; }

 private:
  struct Draft {
    DraftGrowth growth;
    size_t index;               // of the context
    std::vector<int> frontier;  // candidates (or kPending) that the head reads next
  };

  RecurrentDrafter(std::unique_ptr<RecurrentHead> head, Model* target, GrowthOptions options)
      : head_(std::move(head)), target_(target), options_(options) {}
  absl::Status Grow(std::vector<Draft>& drafts);

  std::unique_ptr<RecurrentHead> head_;
  Model* target_;
  const GrowthOptions options_;
  int levels_computed_ = 0;
};

}  // namespace linspec
