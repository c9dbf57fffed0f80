// Shape and rule of one model, parsed from config.json (docs/model_format.md). Validated once, constant afterwards.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"

namespace linspec {

struct LinearAttentionConfig {
  int group_size = 64;
  int conv_kernel = 32;  // 0: no convolution
  bool local = true;
  GlobalBranch global = GlobalBranch::kScaled;
  bool decay = false;
  float qk_norm_eps = 1e-6f;
  float global_norm_eps = 1e-6f;
};

struct ModelConfig {
  int64_t hidden_size = 0;        // D
  int64_t intermediate_size = 0;  // F
  int num_layers = 0;
  int num_heads = 0;                    // H
  int num_kv_heads = 0;                 // Hkv
  int head_dim = 0;                     // d
  int64_t vocab_size = 0;               // V
  int64_t max_position_embeddings = 0;  // what it was trained at; a hint, not a limit: the state does not grow
  float rms_norm_eps = 1e-5f;
  float rope_theta = 10000.0f;
  bool tie_word_embeddings = false;
  int32_t bos_token_id = -1;  // -1: none
  std::vector<int32_t> eos_token_ids;
  LinearAttentionConfig linear_attention;

  int64_t StateSizePerLayer() const {  // elements: S + ring of k and v
    const int64_t d = head_dim, g = linear_attention.group_size;
    return num_kv_heads * (d * d + 2 * g * d);
  }
  int64_t StateBytes(DType dtype) const {  // of one request, at any context
    return num_layers * StateSizePerLayer() * static_cast<int64_t>(DTypeSize(dtype));
  }
  int64_t NumLayerMatrixParameters() const;  // of one layer: what a token is multiplied with
  int64_t NumParameters() const;
};

// INVALID_ARGUMENT names the field and the offending value.
absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json);

}  // namespace linspec
