// Small models and folders for the tests of models/.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "models/model.h"
#include "models/state_pool.h"

namespace linspec {

#define ASSERT_OK(expression)                                                       \
  do {                                                                              \
    const absl::Status assert_ok_status = (expression);                             \
    ASSERT_TRUE(assert_ok_status.ok()) << std::string(assert_ok_status.ToString()); \
  } while (false)

// Code and a part of the message.
inline void ExpectError(const absl::Status& status, absl::StatusCode code, const std::string& part) {
  EXPECT_EQ(status.code(), code) << std::string(status.ToString());
  EXPECT_NE(std::string(status.message()).find(part), std::string::npos)
      << "message: " << std::string(status.message()) << "\nexpected to contain: " << part;
}

// Two layers, grouped-query attention, groups of 8 so that short sequences cross many boundaries.
inline ModelConfig TinyConfig() {
  ModelConfig config;
  config.hidden_size = 32;
  config.intermediate_size = 48;
  config.num_layers = 2;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 16;
  config.vocab_size = 96;
  config.max_position_embeddings = 256;
  config.linear_attention = {
      .group_size = 8, .conv_kernel = 5, .local = true, .global = GlobalBranch::kRmsNorm, .decay = true};
  return config;
}

// The paper's rule: one factor per layer, no decay; taps as long as a group.
inline ModelConfig PaperConfig() {
  ModelConfig config = TinyConfig();
  config.num_kv_heads = 4;
  config.tie_word_embeddings = true;
  config.linear_attention = {
      .group_size = 8, .conv_kernel = 8, .local = true, .global = GlobalBranch::kScaled, .decay = false};
  return config;
}

inline std::vector<int32_t> RandomTokens(int count, int64_t vocab_size, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % vocab_size);
  return tokens;
}

// A tree whose every node hangs below an earlier one; chains are likely, so that paths get long.
inline DraftTree RandomTree(int num_nodes, int64_t vocab_size, uint32_t seed) {
  std::mt19937 random(seed);
  DraftTree tree = DraftTree::Root(static_cast<int32_t>(random() % vocab_size));
  for (int node = 1; node < num_nodes; ++node) {
    const int parent = random() % 3 == 0 ? static_cast<int>(random() % node) : node - 1;
    tree.Add(static_cast<int32_t>(random() % vocab_size), parent);
  }
  return tree;
}

// Feeds tokens one at a time, by verify and commit; logits of each position, [tokens][V].
inline std::vector<std::vector<float>> Sequential(Model& model, StatePool& pool, int32_t slot,
                                                  const std::vector<int32_t>& tokens) {
  std::vector<std::vector<float>> logits;
  for (const int32_t token : tokens) {
    VerifyBatch batch;
    batch.Add(slot, DraftTree::Root(token));
    const auto result = model.Verify(batch, pool);
    EXPECT_TRUE(result.ok()) << std::string(result.status().ToString());
    logits.emplace_back(result->logits.begin(), result->logits.end());
    const std::vector<std::vector<int32_t>> paths = {{0}};
    EXPECT_TRUE(model.Commit(batch, paths, &pool).ok());
  }
  return logits;
}

// All bytes of a slot.
inline std::vector<std::byte> StateOf(const StatePool& pool, int32_t slot) {
  const std::byte* begin = pool.data() + slot * pool.bytes_per_slot();
  return {begin, begin + pool.bytes_per_slot()};
}

inline bool SameBits(const float* a, const float* b, size_t count) { return std::memcmp(a, b, count * 4) == 0; }
inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && SameBits(a.data(), b.data(), a.size());
}

// A folder that goes with the test.
class TempFolder {
 public:
  TempFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "linspec_test_XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~TempFolder() { std::filesystem::remove_all(path_); }
  std::string path(const std::string& name = "") const { return (std::filesystem::path(path_) / name).string(); }
  void Write(const std::string& name, const std::string& content) const {
    std::ofstream(path(name), std::ios::binary) << content;
  }

 private:
  std::string path_;
};

struct StoredTensor {
  std::string dtype = "F32";
  std::vector<int64_t> shape;
  std::string bytes;
};
using StoredTensors = std::map<std::string, StoredTensor>;

inline StoredTensor F32Tensor(std::vector<int64_t> shape, const std::vector<float>& values) {
  return {"F32", std::move(shape), std::string(reinterpret_cast<const char*>(values.data()), values.size() * 4)};
}

inline std::string WithHeader(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

inline std::string Safetensors(const StoredTensors& tensors) {
  std::string header = "{\"__metadata__\":{\"format\":\"pt\"}", data;
  for (const auto& [name, tensor] : tensors) {
    header += fmt::format(",\"{}\":{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}", name, tensor.dtype,
                          fmt::join(tensor.shape, ","), data.size(), data.size() + tensor.bytes.size());
    data += tensor.bytes;
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return WithHeader(header, data);
}

}  // namespace linspec
