// Drafts with Medusa heads: a tree of the likeliest combinations of what the heads guess. Head n's guesses do not
// depend on the tokens between, so every node of a level has the same children to offer, and a path is as likely as the
// product of its guesses.
//
// Costs one small forward of the heads a step, whatever the tree; keeps nothing per sequence. Sequences whose hidden
// state is not known yet (before their first step) are not drafted for.
//
// Ownership: owns the heads, borrows the target for its unembedding. Threads: engine thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "models/draft_candidates.h"
#include "models/drafter.h"
#include "models/medusa_heads.h"
#include "models/model.h"

namespace linspec {

enum class MedusaTree : uint8_t {
  kDynamic,    // best-first over the heads' guesses of this step
  kMcSim7b63,  // only the nodes of Medusa's published tree of 63 choices, the best of them if the budget is smaller
};

struct MedusaOptions {
  MedusaTree tree = MedusaTree::kDynamic;
  int top_k = 10;  // guesses per head
};

class MedusaDrafter final : public Drafter {
 public:
  // target must outlive the drafter. INVALID_ARGUMENT: options out of range.
  static absl::StatusOr<std::unique_ptr<MedusaDrafter>> Create(std::unique_ptr<MedusaHeads> heads, Model* target,
                                                               MedusaOptions options);

  std::string_view name() const override { return "medusa"; }
  absl::StatusOr<std::vector<DraftTree>> Propose(std::span<const DraftContext> contexts) override;
  void Forget(uint64_t) override {}

 private:
  using Guesses = std::vector<std::vector<DraftCandidate>>;  // [depth - 1]

  MedusaDrafter(std::unique_ptr<MedusaHeads> heads, Model* target, MedusaOptions options)
      : heads_(std::move(heads)), target_(target), options_(options) {}
  DraftTree Grow(const DraftContext& context, const Guesses& guesses) const;
  int MaxChildren(int place) const;  // of the node at `place` of the static tree; top_k in a dynamic tree

  std::unique_ptr<MedusaHeads> heads_;
  Model* target_;
  const MedusaOptions options_;
};

}  // namespace linspec
