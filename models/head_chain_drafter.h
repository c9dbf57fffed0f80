// Drafts with heads that follow their own best guess from token to token and guess all levels in one go: the tree is
// that chain, and beside each of its nodes the other tokens that the heads thought possible there.
//
// Levels are computed before anybody sees how sure the first ones are, so it asks for as many as the deepest tree of
// the last call had, and one more. Keeps nothing per sequence; sequences whose hidden state is not known yet (before
// their first step) are not drafted for.
//
// Ownership: owns what guesses. Threads: engine thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "models/draft_guesser.h"
#include "models/drafter.h"

namespace linspec {

struct HeadChainOptions {
  int max_depth = 6;  // drafted tokens on a path
  int top_k = 4;      // guesses per level, one of which the chain follows
};

class HeadChainDrafter final : public Drafter {
 public:
  // name: as users ask for it. INVALID_ARGUMENT: options out of range.
  static absl::StatusOr<std::unique_ptr<HeadChainDrafter>> Create(std::string name, std::unique_ptr<DraftGuesser> heads,
                                                                  HeadChainOptions options);

  std::string_view name() const override { return name_; }
  absl::StatusOr<std::vector<DraftTree>> Propose(std::span<const DraftContext> contexts) override;
  void Forget(uint64_t) override {}
  bool reads_hidden() const override { return heads_->reads_hidden(); }
  int levels_computed() const override { return levels_computed_; }
  void NoteDepth(int depth) override;
  DraftHeads heads() const override { return {heads_.get(), levels_, options_.top_k}; }

 private:
  HeadChainDrafter(std::string name, std::unique_ptr<DraftGuesser> heads, HeadChainOptions options)
      : name_(std::move(name)), heads_(std::move(heads)), options_(options), levels_(options.max_depth) {}

  const std::string name_;
  const std::unique_ptr<DraftGuesser> heads_;
  const HeadChainOptions options_;
  int levels_;  // to ask for
  int levels_computed_ = 0;
};

}  // namespace linspec
