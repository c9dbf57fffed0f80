// Drafts with Medusa heads: a tree of the likeliest combinations of what the heads guess. Head n's guesses do not
// depend on the tokens between, so every node of a level has the same children to offer, and a path is as likely as the
// product of its guesses.
//
// Costs one small forward of the heads a step, whatever the tree; keeps nothing per sequence. Sequences whose hidden
// state is not known yet (before their first step) are not drafted for.
//
// Ownership: owns what guesses. Threads: engine thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "models/draft_guesser.h"
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

// Heads on the CPU. target lends its unembedding and must outlive the guesser.
std::unique_ptr<DraftGuesser> MakeMedusaGuesser(std::unique_ptr<MedusaHeads> heads, Model* target);

class MedusaDrafter final : public Drafter {
 public:
  // INVALID_ARGUMENT: options out of range.
  static absl::StatusOr<std::unique_ptr<MedusaDrafter>> Create(std::unique_ptr<DraftGuesser> heads,
                                                               MedusaOptions options);

  std::string_view name() const override { return "medusa"; }
  absl::StatusOr<std::vector<DraftTree>> Propose(std::span<const DraftContext> contexts) override;
  void Forget(uint64_t) override {}
  bool reads_hidden() const override { return heads_->reads_hidden(); }
  DraftHeads heads() const override {
    if (options_.tree != MedusaTree::kDynamic) return {};
    return {heads_.get(), heads_->max_levels(), options_.top_k};
  }

 private:
  MedusaDrafter(std::unique_ptr<DraftGuesser> heads, MedusaOptions options)
      : heads_(std::move(heads)), options_(options) {}
  // From the guesses for context `index` of the first `depth` heads.
  DraftTree Grow(const DraftContext& context, const DraftGuesses& guesses, size_t index, int depth) const;
  int MaxChildren(int place) const;  // of the node at `place` of the static tree; top_k in a dynamic tree

  std::unique_ptr<DraftGuesser> heads_;
  const MedusaOptions options_;
};

}  // namespace linspec
