// Drafters that help, that do not, and that misbehave. None may change what a request receives.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "models/draft_guesser.h"
#include "models/drafter.h"

namespace linspec {

// Knows the whole text in advance: prompt + output of plain decoding.
using Oracle = std::vector<std::vector<int32_t>>;

class FakeDrafter : public Drafter {
 public:
  FakeDrafter(std::string kind, int64_t vocab_size, Oracle oracle = {})
      : kind_(std::move(kind)), vocab_size_(vocab_size), oracle_(std::move(oracle)) {}

  std::string_view name() const override { return "draft"; }
  void Forget(uint64_t) override { ++num_forgotten; }

  absl::StatusOr<std::vector<DraftTree>> Propose(std::span<const DraftContext> contexts) override {
    ++num_calls;
    if (kind_ == "error") return absl::InternalError("the drafter broke");
    std::vector<DraftTree> trees;
    for (const DraftContext& context : contexts) trees.push_back(Tree(context));
    if (kind_ == "missing") trees.pop_back();
    return trees;
  }

  int num_calls = 0, num_forgotten = 0;

 private:
  int32_t Random() { return static_cast<int32_t>(random_() % vocab_size_); }

  // The token of plain decoding at `position`; -1 past the end.
  int32_t Truth(const DraftContext& context, size_t position) const {
    for (const std::vector<int32_t>& text : oracle_) {
      if (position < text.size() && std::equal(context.tokens.begin(), context.tokens.end(), text.begin())) {
        return text[position];
      }
    }
    return -1;
  }

  DraftTree Tree(const DraftContext& context) {
    DraftTree tree = DraftTree::Root(context.tokens.back());
    const size_t next = context.tokens.size();
    if (kind_ == "empty" || kind_ == "missing") return tree;
    if (kind_ == "no_root") return {};
    if (kind_ == "wrong_root") return DraftTree::Root((context.tokens.back() + 1) % vocab_size_);
    if (kind_ == "cycle") return {{context.tokens.back(), 1, 2}, {-1, 2, 1}};
    if (kind_ == "ragged") return {{context.tokens.back(), 1}, {-1}};
    if (kind_ == "too_big") {
      while (tree.num_nodes() < 70) tree.Add(Random(), tree.num_nodes() - 1);
      return tree;
    }
    if (kind_ == "branching") return Branching(context);
    for (int node = 0; tree.num_nodes() < context.max_nodes; ++node) {
      const int32_t truth = Truth(context, next + node);
      if (kind_ == "right") {
        if (truth < 0) break;
        tree.Add(truth, node);
      } else if (kind_ == "wrong") {
        tree.Add(static_cast<int32_t>((truth + 1) % vocab_size_), node);
      } else if (kind_ == "random") {
        tree.Add(Random(), static_cast<int>(random_() % tree.num_nodes()));
      } else if (kind_ == "out_of_vocabulary") {
        tree.Add(static_cast<int32_t>(node % 2 ? -5 : vocab_size_), node);
      }
    }
    return tree;
  }

  // Decoys beside the truth on every level; every third truth is withheld.
  DraftTree Branching(const DraftContext& context) {
    DraftTree tree = DraftTree::Root(context.tokens.back());
    int parent = 0;
    for (size_t level = 0; tree.num_nodes() + 3 <= context.max_nodes; ++level) {
      const int32_t truth = Truth(context, context.tokens.size() + level);
      tree.Add(Random(), parent);
      tree.Add(Random(), 0);
      parent = tree.Add(truth < 0 || random_() % 3 == 0 ? Random() : truth, parent);
    }
    return tree;
  }

  std::string kind_;
  int64_t vocab_size_;
  Oracle oracle_;
  std::minstd_rand random_{7};
};

// Heads that only a model asks which drafts for itself.
class FakeHeads final : public DraftGuesser {
 public:
  int max_levels() const override { return 4; }
  int max_top_k() const override { return 4; }
  bool reads_hidden() const override { return false; }
  bool CanGuess(const DraftContext&) const override { return true; }
  absl::StatusOr<DraftGuesses> Guess(std::span<const DraftContext* const>, int, int) override {
    return absl::UnimplementedError("not asked");
  }
};

class FakeHeadDrafter final : public FakeDrafter {
 public:
  using FakeDrafter::FakeDrafter;
  DraftHeads heads() const override { return {&heads_, 4, 2}; }

 private:
  mutable FakeHeads heads_;
};

}  // namespace linspec
