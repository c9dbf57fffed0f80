// What the device programs over models share: reports, and inputs.
#pragma once

#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "models/draft_tree.h"

namespace linspec {

inline int checks = 0, failures = 0;

inline void Report(const std::string& name, bool ok, const std::string& detail = "") {
  ++checks;
  failures += !ok;
  fmt::print("{:<4} {:<64} {}\n", ok ? "ok" : "FAIL", name, detail);
  std::fflush(stdout);
}

template <typename T>
T Must(absl::StatusOr<T> value, const std::string& what) {
  if (value.ok()) return *std::move(value);
  fmt::print("FAIL {}: {}\n", what, value.status().ToString());
  std::exit(2);
}

inline void Must(const absl::Status& status, const std::string& what) {
  if (status.ok()) return;
  fmt::print("FAIL {}: {}\n", what, status.ToString());
  std::exit(2);
}

inline std::vector<int32_t> Tokens(int count, int64_t vocab, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % vocab);
  return tokens;
}

// The exit code.
inline int Finish(const char* program) {
  fmt::print("{}: {} checks, {} failed\n", program, checks, failures);
  return failures == 0 ? 0 : 1;
}

inline DraftTree RandomTree(int nodes, int64_t vocab, std::mt19937* random) {
  DraftTree tree = DraftTree::Root(static_cast<int32_t>((*random)() % vocab));
  while (tree.num_nodes() < nodes) {
    tree.Add(static_cast<int32_t>((*random)() % vocab), static_cast<int>((*random)() % tree.num_nodes()));
  }
  return tree;
}

}  // namespace linspec
