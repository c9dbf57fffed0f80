// Acceptance and trees on the device against their scalar twins: trees of any size, requests that pad a bucket, levels
// with fewer candidates than asked for, equal odds, and slots whose group is about to end.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/cuda/follow.h"
#include "tests/cuda/device_buffers.h"
#include "tests/cuda/report.h"

namespace linspec::cuda {

struct FollowTree {
  std::vector<int32_t> tokens, parents, depths;
  std::vector<float> odds;
  std::vector<uint64_t> ancestors;
  int size() const { return static_cast<int>(tokens.size()); }
  void Add(int32_t token, int parent, float probability) {
    const uint64_t above = parent < 0 ? 0 : ancestors[parent];
    ancestors.push_back(above | uint64_t{1} << size());
    depths.push_back(parent < 0 ? 0 : depths[parent] + 1);
    tokens.push_back(token);
    parents.push_back(parent);
    odds.push_back(probability);
  }
};

inline LinspecCudaSampling FollowSampling(std::mt19937& random) {
  LinspecCudaSampling sampling = {};
  sampling.seed = random();
  sampling.position = static_cast<int64_t>(random() % 1000);
  sampling.temperature = static_cast<float>(random() % 3) / 2.0f;
  sampling.top_p = 0.5f;
  sampling.edits_begin = static_cast<int32_t>(random() % 9);
  return sampling;
}

// A step of random trees, every fifth task padding, and what the device makes of it.
class FollowCase {
 public:
  FollowCase(uint32_t seed, int num_tasks, int most_nodes) : random_(seed) {
    for (int t = 0; t < num_tasks; ++t) {
      Task task = {0, -1, 0, 0, 0, 0};
      FollowTree tree;
      if (t % 5 != 4) {
        task = {static_cast<int64_t>(random_() % 500),
                t,
                static_cast<int32_t>(tokens_.size()),
                1 + static_cast<int32_t>(random_() % most_nodes),
                0,
                0};
        tree.Add(Token(), -1, 1);
        while (tree.size() < task.num_rows) tree.Add(Token(), static_cast<int>(random_() % tree.size()), 1);
      }
      for (int node = 0; node < tree.size(); ++node) {
        tokens_.push_back(tree.tokens[node]);
        ancestors_.push_back(tree.ancestors[node]);
        sampling_.push_back(FollowSampling(random_));
        sampled_.push_back(random_() % 16 == 0 ? -1 : Token());
      }
      tasks_.push_back(task);
      trees_.push_back(tree);
    }
  }

  void Accepts() {
    const DeviceArray<Task> tasks(tasks_);
    const DeviceArray<int32_t> tokens(tokens_), sampled(sampled_);
    const DeviceArray<uint64_t> ancestors(ancestors_);
    const DeviceArray<LinspecCudaSampling> sampling(sampling_);
    LaunchAccept({tasks.get(), tokens.get(), nullptr, ancestors.get(), sampling.get()}, sampled.get(), num_tasks(), 77,
                 out(), nullptr);
    Sync();
    accepted_ = out_tasks_.Read();
    rows_ = out_rows_.Read();
    roots_ = out_roots_.Read();
    const std::vector<int32_t> paths = out_paths_.Read();
    int wrong = out_call_.Read()[0] != 77;
    for (int t = 0; t < num_tasks(); ++t) {
      if (tasks_[t].slot < 0) {
        wrong += accepted_[t].slot >= 0;
        continue;
      }
      const auto [path, token] = Walk(t);
      const Task& task = accepted_[t];
      const int last = tasks_[t].row_begin + path.back();
      const int64_t position = sampling_[tasks_[t].row_begin].position + std::ssize(path);
      wrong += task.path_length != std::ssize(path) || task.length != tasks_[t].length ||
               task.row_begin != tasks_[t].row_begin || task.slot != t ||
               !std::equal(path.begin(), path.end(), paths.begin() + task.path_begin);
      wrong += rows_[t].token != std::max(token, 0) || rows_[t].hidden_row != last || rows_[t].position != position ||
               rows_[t].coupled != 1 || rows_[t].seed != sampling_[tasks_[t].row_begin].seed;
      wrong += roots_[t].position != position || roots_[t].edits_begin != sampling_[tasks_[t].row_begin].edits_begin;
    }
    Report("accept " + std::to_string(num_tasks()) + " tasks", wrong, 0);
  }

  // REQUIRES: Accepts before.
  void MakesTrees(bool chain, int levels, int top_k, int most_nodes, int group_size) {
    const int stride = num_tasks() + 3;
    candidates_ = RandomCandidates(levels, stride, top_k);
    const int roots = static_cast<int>(std::ranges::count_if(tasks_, [](const Task& t) { return t.slot >= 0; }));
    const int most_rows = roots + static_cast<int>(random_() % (roots * most_nodes)), rows = most_rows + 5;
    const DeviceArray<LinspecCudaDraftCandidate> candidates(candidates_);
    const DeviceArray<Task> tasks(num_tasks()), made_tasks(num_tasks());
    const DeviceArray<int32_t> tokens(rows);
    const DeviceArray<int64_t> positions(rows);
    const DeviceArray<uint64_t> ancestors(rows);
    const DeviceArray<LinspecCudaSampling> sampling(rows);
    const DeviceArray<LinspecCudaTreeNode> nodes(num_tasks() * LINSPEC_CUDA_MAX_FOLLOW_NODES);
    const DeviceArray<const LinspecCudaLogitEdit*> edits(1);
    LaunchTrees({.accepted = out(),
                 .candidates = candidates.get(),
                 .row_stride = stride,
                 .num_levels = levels,
                 .top_k = top_k,
                 .chain = chain,
                 .group_size = group_size,
                 .num_tasks = num_tasks(),
                 .num_rows = rows,
                 .most_rows = most_rows,
                 .most_nodes = most_nodes,
                 .step = {tasks.get(), tokens.get(), positions.get(), ancestors.get(), sampling.get()},
                 .edits = nullptr,
                 .step_edits = edits.get(),
                 .made_tasks = made_tasks.get(),
                 .made_nodes = nodes.get()},
                nullptr);
    Sync();
    std::vector<FollowTree> expected;
    for (int t = 0; t < num_tasks(); ++t)
      expected.push_back(Grow(t, chain, levels, top_k, stride, most_nodes, group_size));
    const std::vector<FollowTree> drafted = expected;
    Share(most_rows - roots, &expected);
    const auto got = tasks.Read(), told = made_tasks.Read();
    const auto got_tokens = tokens.Read();
    const auto got_positions = positions.Read();
    const auto got_ancestors = ancestors.Read();
    const auto got_sampling = sampling.Read();
    const auto got_nodes = nodes.Read();
    int wrong = edits.Read()[0] != nullptr, row = 0;
    for (int t = 0; t < num_tasks(); ++t) {
      const FollowTree& tree = expected[t];
      const int64_t length = accepted_[t].length + accepted_[t].path_length;
      wrong += got[t].slot != tasks_[t].slot || got[t].num_rows != tree.size() || told[t].num_rows != tree.size() ||
               told[t].slot != got[t].slot || told[t].row_begin != got[t].row_begin;
      if (tasks_[t].slot < 0) continue;
      wrong += got[t].length != length || got[t].row_begin != row || told[t].length != length;
      for (int i = 0; i < tree.size(); ++i, ++row) {
        wrong += got_tokens[row] != tree.tokens[i] || got_positions[row] != length + tree.depths[i] ||
                 got_ancestors[row] != tree.ancestors[i] ||
                 got_sampling[row].position != roots_[t].position + tree.depths[i] ||
                 got_sampling[row].seed != roots_[t].seed;
      }
      const FollowTree& all = drafted[t];
      wrong += told[t].out_shift != all.size();
      for (int i = 0; i < all.size(); ++i) {
        const LinspecCudaTreeNode& node = got_nodes[t * LINSPEC_CUDA_MAX_FOLLOW_NODES + i];
        wrong += node.token != all.tokens[i] || node.parent != all.parents[i] || node.probability != all.odds[i];
      }
    }
    for (; row < rows; ++row) wrong += got_tokens[row] != 0 || got_ancestors[row] != 1 || got_sampling[row].top_p != 1;
    Report("trees " + std::string(chain ? "chain " : "best first ") + std::to_string(num_tasks()) + " tasks " +
               std::to_string(levels) + " x " + std::to_string(top_k) + ", " + std::to_string(most_nodes) + " nodes",
           wrong, 0);
  }

 private:
  int num_tasks() const { return static_cast<int>(tasks_.size()); }
  int32_t Token() { return static_cast<int32_t>(random_() % 4); }
  Accepted out() const {
    return {out_tasks_.get(), out_paths_.get(), out_rows_.get(), out_roots_.get(), out_call_.get()};
  }

  std::pair<std::vector<int32_t>, int32_t> Walk(int t) const {
    const FollowTree& tree = trees_[t];
    std::vector<int32_t> path;
    int32_t token = -1;
    for (int node = 0; node >= 0;) {
      path.push_back(node);
      token = sampled_[tasks_[t].row_begin + node];
      int next = -1;
      for (int child = tree.size() - 1; child > node; --child) {
        if (tree.parents[child] == node && tree.tokens[child] == token) next = child;
      }
      node = next;
    }
    return {path, token};
  }

  // Odds fall along a level, many are equal; some levels have fewer candidates than places, or none.
  std::vector<LinspecCudaDraftCandidate> RandomCandidates(int levels, int stride, int top_k) {
    std::vector<LinspecCudaDraftCandidate> made;
    for (int i = 0; i < levels * stride; ++i) {
      const int there = random_() % 6 == 0 ? static_cast<int>(random_() % (top_k + 1)) : top_k;
      float odds = 1;
      for (int k = 0; k < top_k; ++k) {
        odds *= 0.25f * static_cast<float>(1 + random_() % 4);
        made.push_back(k < there ? LinspecCudaDraftCandidate{static_cast<int32_t>(random_() % 1000), odds}
                                 : LinspecCudaDraftCandidate{-1, 0});
      }
    }
    return made;
  }

  FollowTree Grow(int t, bool chain, int levels, int top_k, int stride, int most_nodes, int group_size) const {
    FollowTree tree;
    if (tasks_[t].slot < 0) return tree;
    tree.Add(rows_[t].token, -1, 1);
    const int64_t length = accepted_[t].length + accepted_[t].path_length;
    levels = std::min(levels, static_cast<int>(group_size - 1 - length % group_size));
    const auto at = [&](int level, int rank) {
      const bool there = level < levels && rank < top_k;
      return there ? candidates_[(level * stride + t) * top_k + rank] : LinspecCudaDraftCandidate{-1, 0};
    };
    chain ? GrowChain(at, levels, top_k, most_nodes, &tree) : GrowBestFirst(at, most_nodes, &tree);
    return tree;
  }

  static void GrowChain(const auto& at, int levels, int top_k, int most_nodes, FollowTree* tree) {
    struct Candidate {
      float odds;
      int32_t token;
      int above;  // candidate
    };
    std::vector<Candidate> all;
    float path = 1;
    int above = -1;
    for (int level = 0; level < levels && at(level, 0).token >= 0; ++level) {
      const int best = static_cast<int>(all.size());
      for (int k = 0; k < top_k && at(level, k).token >= 0; ++k) {
        all.push_back({path * at(level, k).probability, at(level, k).token, above});
      }
      path *= at(level, 0).probability;
      above = best;
    }
    std::vector<int> order(all.size()), places(all.size(), 0);
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    std::ranges::stable_sort(order, [&](int a, int b) { return all[a].odds > all[b].odds; });
    for (const int i : order) {
      if (tree->size() == most_nodes) break;
      places[i] = tree->size();
      tree->Add(all[i].token, all[i].above < 0 ? 0 : places[all[i].above], all[i].odds);
    }
  }

  static void GrowBestFirst(const auto& at, int most_nodes, FollowTree* tree) {
    struct Offer {
      float odds = -1;
      int32_t token = -1;
      int parent = 0, rank = 0, depth = 0;
    };
    std::array<Offer, LINSPEC_CUDA_MAX_FOLLOW_NODES + 1> offers{};  // of the root, and below node i
    const auto offer = [&](int parent, int rank, int depth) {
      const LinspecCudaDraftCandidate guess = at(depth - 1, rank);
      if (guess.token < 0) return Offer{};
      return Offer{tree->odds[parent] * guess.probability, guess.token, parent, rank, depth};
    };
    offers[0] = offer(0, 0, 1);
    while (tree->size() < most_nodes) {
      const auto better = [](const Offer& a, const Offer& b) {
        return std::tuple(-a.odds, a.depth, a.rank) < std::tuple(-b.odds, b.depth, b.rank);
      };
      const auto best = std::min_element(offers.begin(), offers.end(), better);
      if (best->odds < 0) break;
      const Offer taken = *best;
      tree->Add(taken.token, taken.parent, taken.odds);
      *best = offer(taken.parent, taken.rank + 1, taken.depth);
      offers[tree->size() - 1] = offer(tree->size() - 1, 0, taken.depth + 1);
    }
  }

  static void Share(int others, std::vector<FollowTree>* trees) {
    std::vector<std::tuple<float, int, int>> all;  // less likely ones are greater
    for (size_t t = 0; t < trees->size(); ++t) {
      for (int node = 1; node < (*trees)[t].size(); ++node) {
        all.emplace_back(-(*trees)[t].odds[node], static_cast<int>(t), node);
      }
    }
    std::ranges::sort(all);
    std::vector<int> sizes(trees->size(), 1);
    for (size_t i = 0; i < std::min<size_t>(all.size(), others); ++i) ++sizes[std::get<1>(all[i])];
    for (size_t t = 0; t < trees->size(); ++t) {
      FollowTree& tree = (*trees)[t];
      if (tree.size() == 0) continue;
      for (auto* part : {&tree.tokens, &tree.parents, &tree.depths}) part->resize(sizes[t]);
      tree.odds.resize(sizes[t]);
      tree.ancestors.resize(sizes[t]);
    }
  }

  std::mt19937 random_;
  std::vector<Task> tasks_, accepted_;
  std::vector<FollowTree> trees_;
  std::vector<int32_t> tokens_, sampled_;
  std::vector<uint64_t> ancestors_;
  std::vector<LinspecCudaSampling> sampling_, roots_;
  std::vector<LinspecCudaDraftRow> rows_;
  std::vector<LinspecCudaDraftCandidate> candidates_;
  DeviceArray<Task> out_tasks_{LINSPEC_CUDA_MAX_FOLLOW_TASKS};
  DeviceArray<int32_t> out_paths_{LINSPEC_CUDA_MAX_FOLLOW_TASKS * kPathStride};
  DeviceArray<LinspecCudaDraftRow> out_rows_{LINSPEC_CUDA_MAX_FOLLOW_TASKS};
  DeviceArray<LinspecCudaSampling> out_roots_{LINSPEC_CUDA_MAX_FOLLOW_TASKS};
  DeviceArray<uint32_t> out_call_{1};
};

inline void TestFollow() {
  for (const int tasks : {1, 3, 16, LINSPEC_CUDA_MAX_FOLLOW_TASKS}) {
    for (const int nodes : {1, 9, 64}) {
      FollowCase step(1000 * tasks + nodes, tasks, nodes);
      step.Accepts();
      for (const bool chain : {true, false}) {
        step.MakesTrees(chain, 1, 1, 2, 16);
        step.MakesTrees(chain, 4, 4, 8, 64);
        step.MakesTrees(chain, 16, 4, LINSPEC_CUDA_MAX_FOLLOW_NODES, 16);
        step.MakesTrees(chain, 5, 12, 7, 8);
      }
    }
  }
}

}  // namespace linspec::cuda
