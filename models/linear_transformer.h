// LLaMA with augmented linear attention (docs/math.md) on CpuOps.
//
// One forward pass serves Verify, Extend and Prefill; they differ in the attention line only. Scratch is allocated on
// first use, grown when a batch is larger than any before, and reused. Threads: engine thread only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/aligned_vector.h"
#include "kernels/ops.h"
#include "models/model.h"
#include "models/model_config.h"
#include "models/verify_batch.h"

namespace linspec {

// Token embeddings as stored: a row is read and widened per token, never multiplied.
struct EmbeddingTable {
  DType dtype = DType::kF32;      // kF32, kF16, kBF16 or kI8
  int64_t dim = 0;                // D
  std::vector<std::byte> data;    // [V, D]
  std::vector<float> row_scales;  // [V] for kI8, else empty

  void Lookup(int32_t token, float* out) const;
};

struct TransformerLayer {
  std::vector<float> attention_norm;      // [D]
  std::unique_ptr<PackedWeight> qkv;      // [(H + 2 Hkv) * d, D]
  std::unique_ptr<PackedWeight> o;        // [D, H * d]
  std::vector<float> mlp_norm;            // [D]
  std::unique_ptr<PackedWeight> gate_up;  // [2 F, D]
  std::unique_ptr<PackedWeight> down;     // [D, F]
  std::vector<float> global_gain;         // [H]    global = rms_norm
  std::vector<float> decay;               // [Hkv]  decay = true
  std::vector<float> conv_taps;           // [H, conv_kernel]
  AttentionLayer attention;               // points into the three vectors above
};

struct TransformerWeights {
  EmbeddingTable embedding;
  std::unique_ptr<PackedWeight> packed_embedding;  // [V, D], in its place where the builder was told so
  std::vector<TransformerLayer> layers;
  std::vector<float> final_norm;          // [D]
  std::unique_ptr<PackedWeight> lm_head;  // [V, D]
};

class LinearTransformer final : public Model {
 public:
  // weights must fit config: the builder (transformer_builder.h) checks.
  LinearTransformer(ModelConfig config, TransformerWeights weights, std::shared_ptr<CpuOps> ops, DType state_dtype);

  const ModelConfig& config() const override { return config_; }
  int64_t weight_bytes() const override;
  int64_t streamed_bytes() const override;
  DType weight_dtype() const override { return weights_.lm_head->dtype(); }
  DType state_dtype() const override { return state_dtype_; }
  std::string Describe() const override;

  absl::Status Prefill(std::span<const PrefillChunk> chunks, StatePool* pool) override;
  absl::StatusOr<VerifyResult> Verify(const VerifyBatch& batch, const StatePool& pool) override;
  absl::StatusOr<VerifyResult> Extend(const VerifyBatch& batch, const StatePool& pool) override;
  absl::Status Commit(const VerifyBatch& batch, std::span<const std::vector<int32_t>> paths, StatePool* pool) override;
  absl::Status Embed(std::span<const int32_t> tokens, std::span<float> out) override;
  absl::StatusOr<std::span<const float>> Unembed(std::span<const float> hidden) override;

 private:
  // Attention of one layer: reads qkv [num_rows, (H + 2 Hkv) d] after RopeNormalize, writes out [num_rows, H d].
  using Attention = absl::FunctionRef<void(int layer, const float* qkv, float* out)>;

  enum class Purpose : uint8_t { kState, kOutput, kKeptOutput };

  // Runs the layers over rows; leaves the residual stream in x_. kState: only what attention does to the state counts.
  // kKeptOutput: qkv of each layer is computed in kept_qkv_, which has room for all rows.
  void Forward(std::span<const int32_t> tokens, std::span<const int64_t> positions, Purpose purpose,
               Attention attention);
  void Mlp(const TransformerLayer& layer, int64_t num_rows);
  VerifyResult Head(int64_t num_rows);  // final norm and lm_head over x_

  // The part of Verify and Extend behind their checks: computes the nodes of batch that verified_ lacks.
  VerifyResult VerifyNewNodes(const VerifyBatch& batch, const StatePool& pool);
  void MoveKeptRows(const VerifyBatch& batch);
  // One block of at most kPrefillRows rows, in pieces of chunks.
  void PrefillBlock(std::span<const PrefillChunk> pieces, StatePool* pool);

  int64_t qkv_width() const { return int64_t{config_.num_heads + 2 * config_.num_kv_heads} * config_.head_dim; }
  int64_t attention_width() const { return int64_t{config_.num_heads} * config_.head_dim; }

  const ModelConfig config_;
  const TransformerWeights weights_;
  const std::shared_ptr<CpuOps> ops_;
  const DType state_dtype_;

  // The last batch verified, and what Commit needs of it.
  VerifiedBatch verified_;
  std::vector<AlignedVector<float>> kept_qkv_;  // [num_layers][num_rows, (H + 2 Hkv) * d]

  // Scratch, [rows of the pass, ...].
  AlignedVector<float> x_;               // [D] residual stream
  AlignedVector<float> hidden_;          // [D] after the final norm: hidden of VerifyResult
  AlignedVector<float> qkv_;             // [(H + 2 Hkv) * d]
  AlignedVector<float> attention_;       // [H * d]
  AlignedVector<float> tree_attention_;  // [all rows of the batch, H * d], Extend only
  AlignedVector<float> gate_up_;         // [2 F]
  AlignedVector<float> mlp_;             // [F]
  AlignedVector<float> logits_;          // [V]
  std::vector<WindowRequest> requests_;
};

}  // namespace linspec
