// Medusa heads (arXiv 2401.10774): head n guesses, from the target's final hidden state at one token, the token n + 2
// ahead of it. A head is a few residual blocks x + SiLU(W x + b); the target's unembedding, or the head's own, turns
// its output into logits. Files: docs/model_format.md.
//
// Ownership: owns its weights and scratch. Threads: engine thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "models/matrix_packer.h"
#include "models/model.h"
#include "models/model_config.h"

namespace linspec {

inline constexpr char kMedusaConfigFile[] = "medusa_config.json";
inline constexpr char kMedusaWeightsFile[] = "medusa.safetensors";

// The heads' weights, packed for some machine.
struct MedusaWeights {
  struct Block {
    std::unique_ptr<PackedWeight> weight;  // [D, D]
    std::vector<float> bias;               // [D]
  };
  struct Head {
    std::vector<Block> blocks;                  // as many in every head
    std::unique_ptr<PackedWeight> unembedding;  // [V, D]; null: the target's. All heads have one or none has
  };
  std::vector<Head> heads;

  // Reads both files of `folder` for a target of this shape, strictly. Errors name file and field or tensor; NOT_FOUND
  // without files.
  static absl::StatusOr<MedusaWeights> Load(const std::string& folder, const ModelConfig& target,
                                            const std::string& weight_dtype, MatrixPacker* packer);
};

class MedusaHeads {
 public:
  // As MedusaWeights::Load. weight_dtype as in LoadOptions.
  static absl::StatusOr<std::unique_ptr<MedusaHeads>> Load(const std::string& folder, const ModelConfig& target,
                                                           const std::string& weight_dtype,
                                                           std::shared_ptr<CpuOps> ops);

  int num_heads() const { return static_cast<int>(heads_.size()); }
  bool shares_unembedding() const { return heads_.front().unembedding == nullptr; }
  int64_t weight_bytes() const;

  // Logits [num_heads, rows, V] of the first num_heads heads for hidden [rows, D]. target lends its unembedding where
  // the heads have none; its errors are passed on. The span lives until the next call on this or on target.
  absl::StatusOr<std::span<const float>> Logits(std::span<const float> hidden, int num_heads, Model* target);

 private:
  MedusaHeads(int64_t hidden_size, int64_t vocab_size, MedusaWeights weights, std::shared_ptr<CpuOps> ops)
      : hidden_size_(hidden_size), vocab_size_(vocab_size), heads_(std::move(weights.heads)), ops_(std::move(ops)) {}
  void ApplyBlock(const MedusaWeights::Block& block, float* x, int64_t num_rows);

  const int64_t hidden_size_, vocab_size_;
  const std::vector<MedusaWeights::Head> heads_;
  const std::shared_ptr<CpuOps> ops_;
  std::vector<float> states_;      // [num_heads, rows, D]
  std::vector<float> gate_up_;     // [rows, 2 D]: W x + b, then ones
  std::vector<float> activation_;  // [rows, D]
  std::vector<float> logits_;      // [num_heads, rows, V], own unembeddings only
};

}  // namespace linspec
