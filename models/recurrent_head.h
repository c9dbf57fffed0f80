// The recurrent draft head, in the manner of ReDrafter (arXiv 2403.09919): guesses one token after the other from the
// target's final hidden state h and the tokens drafted since. For a path x_1 (the pending token), x_2, ...:
//
//   s_0 = h,  u = [RMSNorm(s_{i-1}); RMSNorm(E[x_i])],  s_i = s_{i-1} + W_down (SiLU(W_gate u) * (W_up u))
//
// E is the target's embedding; its unembedding turns s_i into the logits of x_{i+1}. Files: docs/model_format.md.
//
// Ownership: owns its weights and scratch. Threads: engine thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "models/matrix_packer.h"
#include "models/model.h"
#include "models/model_config.h"

namespace linspec {

inline constexpr char kRecurrentHeadConfigFile[] = "recurrent_head_config.json";
inline constexpr char kRecurrentHeadWeightsFile[] = "recurrent_head.safetensors";

// The head's weights, packed for some machine.
struct RecurrentWeights {
  int64_t intermediate_size = 0;
  float rms_norm_eps = 0;
  std::vector<float> state_norm, token_norm;   // [D]
  std::unique_ptr<PackedWeight> gate_up_proj;  // [2 M, 2 D], in the machine's order of gate and up
  std::unique_ptr<PackedWeight> down_proj;     // [D, M]

  // Reads both files of `folder` for a target of this shape, strictly. weight_dtype as in LoadOptions. Errors name file
  // and field or tensor; NOT_FOUND without files.
  static absl::StatusOr<RecurrentWeights> Load(const std::string& folder, const ModelConfig& target,
                                               const std::string& weight_dtype, MatrixPacker* packer);
};

class RecurrentHead {
 public:
  // As RecurrentWeights::Load.
  static absl::StatusOr<std::unique_ptr<RecurrentHead>> Load(const std::string& folder, const ModelConfig& target,
                                                             const std::string& weight_dtype,
                                                             std::shared_ptr<CpuOps> ops);

  int64_t weight_bytes() const;

  // Moves each of the states [rows, D] on by its token [rows], in place, and returns the logits [rows, V] after it.
  // target lends embedding and unembedding; its errors are passed on. The span lives until the next call on target.
  absl::StatusOr<std::span<const float>> Step(std::span<float> states, std::span<const int32_t> tokens, Model* target);

 private:
  RecurrentHead(int64_t hidden_size, RecurrentWeights weights, std::shared_ptr<CpuOps> ops)
      : hidden_size_(hidden_size), weights_(std::move(weights)), ops_(std::move(ops)) {}
  void Advance(std::span<float> states);  // embedded_ holds the tokens' embeddings

  const int64_t hidden_size_;
  const RecurrentWeights weights_;
  const std::shared_ptr<CpuOps> ops_;

  // Scratch, [rows, ...].
  std::vector<float> embedded_, normed_;  // [D]
  std::vector<float> input_;              // [2 D] u
  std::vector<float> gate_up_;            // [2 M]
  std::vector<float> activated_;          // [M]
};

}  // namespace linspec
