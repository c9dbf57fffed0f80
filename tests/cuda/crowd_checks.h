// Trees of many requests at once: every row has the logits that its request has alone, step after step, over the ends
// of groups. For models whose products and attention take forms that few rows do not have.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "models/model.h"
#include "tests/cuda/model_checks.h"

namespace linspec {

class CrowdOfTrees {
 public:
  CrowdOfTrees(Model* model, int requests)
      : model_(model), pool_(Must(model->CreatePool(requests), "pool")), random_(requests) {
    for (int r = 0; r < requests; ++r) {
      slots_.push_back(pool_->Acquire());
      const std::vector<int32_t> prompt = Tokens(128 - r * 7 % 64, model->config().vocab_size, r);
      const PrefillChunk chunks[] = {{slots_.back().id(), prompt}};
      Must(model->Prefill(chunks, pool_.get()), "prefill");
    }
  }

  // Verifies trees of `nodes` nodes for all, then for each alone, and commits a path of each. Returns rows that differ,
  // or are not finite.
  int Step(int nodes) {
    const int64_t vocab = model_->config().vocab_size, group = model_->config().linear_attention.group_size;
    std::vector<DraftTree> trees;
    for (const StateSlot& slot : slots_) {
      // No further than the group's end, where a row's bits may be others.
      const auto depth = static_cast<int>(group - 1 - pool_->length(slot.id()) % group);
      trees.push_back(RandomTree(nodes, vocab, &random_).CutBelow(depth));
    }
    int wrong = 0;
    std::vector<std::vector<float>> alone;
    for (size_t r = 0; r < slots_.size(); ++r) alone.push_back(Verify({&trees[r], 1}, r));
    const std::vector<float> all = Verify(trees, 0);
    auto row = all.begin();
    for (const std::vector<float>& own : alone) {
      for (auto at = own.begin(); at != own.end(); at += vocab, row += vocab) {
        wrong += !std::equal(at, at + vocab, row) ||
                 !std::all_of(row, row + vocab, [](float x) { return std::isfinite(x); });
      }
    }
    std::vector<std::vector<int32_t>> paths;
    for (const DraftTree& tree : trees) paths.push_back(LongestPath(tree));
    Must(model_->Commit(batch_, paths, pool_.get()), "commit");
    return wrong;
  }

 private:
  std::vector<float> Verify(std::span<const DraftTree> trees, size_t first) {
    batch_ = {};
    for (size_t i = 0; i < trees.size(); ++i) batch_.Add(slots_[first + i].id(), trees[i]);
    const VerifyResult result = Must(model_->Verify(batch_, *pool_), "verify");
    return {result.logits.begin(), result.logits.end()};
  }

  static std::vector<int32_t> LongestPath(const DraftTree& tree) {
    const std::vector<int> depths = tree.Depths();
    std::vector<int32_t> path;
    for (auto node = std::ranges::max_element(depths) - depths.begin(); node >= 0; node = tree.parents[node]) {
      path.insert(path.begin(), static_cast<int32_t>(node));
    }
    return path;
  }

  Model* const model_;
  std::unique_ptr<StatePool> pool_;
  std::vector<StateSlot> slots_;
  VerifyBatch batch_;
  std::mt19937 random_;
};

inline void TreesDoNotMindNeighbours(const std::string& name, Model* model) {
  int wrong = 0, steps = 0;
  for (const int nodes : {1, 4, 8}) {
    CrowdOfTrees crowd(model, 16);
    for (int step = 0; step < 24; ++step, ++steps) wrong += crowd.Step(nodes);
  }
  Report(name + ": trees of 16 requests as of each alone", wrong == 0,
         fmt::format("{} rows of {} steps differ or are not finite", wrong, steps));
}

}  // namespace linspec
