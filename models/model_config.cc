#include "models/model_config.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "models/config_fields.h"
#include "models/json_check.h"

namespace linspec {
namespace {

using config_internal::Fields;
using nlohmann::json;

// Upper limits far above any real model, low enough that no product of two or three fields overflows.
constexpr int64_t kMaxHidden = 65536;
constexpr int64_t kMaxIntermediate = 4 * kMaxHidden;
constexpr int64_t kMaxLayers = 512;
constexpr int64_t kMaxHeads = 1024;
constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kMaxVocab = int64_t{1} << 20;
constexpr int64_t kMaxPosition = int64_t{1} << 40;

// Things a LLaMA configuration may ask for that this engine does not compute: refused, never silently ignored.
void RefuseUnsupported(Fields& fields) {
  fields.Choice("model_type", {"llama"});
  fields.Choice("hidden_act", {"silu"}, 0);
  for (const char* name : {"attention_bias", "mlp_bias"}) {
    if (fields.Boolean(name, false)) fields.Fail(name, true, "false (projections have no bias)");
  }
  for (const char* name : {"rope_scaling", "rope_parameters"}) {
    if (const json* value = fields.Find(name)) fields.Fail(name, *value, "null (plain rope_theta only)");
  }
}

absl::StatusOr<LinearAttentionConfig> ParseLinearAttention(const json& object) {
  Fields fields(object, "linear_attention.");
  for (const auto& [name, value] : object.items()) {
    bool known = false;
    for (const char* field :
         {"version", "group_size", "conv_kernel", "local", "global", "decay", "qk_norm_eps", "global_norm_eps"}) {
      known = known || name == field;
    }
    if (!known) fields.Fail(name.c_str(), value, "no such field in version 1");
  }
  LinearAttentionConfig config;
  fields.Integer("version", 1, 1);
  config.group_size = static_cast<int>(fields.Integer("group_size", 8, 256, 64));
  config.conv_kernel = static_cast<int>(fields.Integer("conv_kernel", 0, 32, 32));
  config.local = fields.Choice("local", {"none", "relu_squared"}) == 1;
  config.global = static_cast<GlobalBranch>(fields.Choice("global", {"none", "scaled", "rms_norm"}));
  config.decay = fields.Boolean("decay", false);
  config.qk_norm_eps = fields.Number("qk_norm_eps", 0.0, 1.0, 1e-6);
  config.global_norm_eps = fields.Number("global_norm_eps", 0.0, 1.0, 1e-6);
  if (config.conv_kernel > config.group_size) {
    fields.Fail("conv_kernel", config.conv_kernel, fmt::format("at most group_size {}", config.group_size));
  }
  if (!fields.status().ok()) return fields.status();
  return config;
}

void ParseHeads(Fields& fields, ModelConfig& config) {
  config.num_heads = static_cast<int>(fields.Integer("num_attention_heads", 1, kMaxHeads));
  config.num_kv_heads = static_cast<int>(fields.Integer("num_key_value_heads", 1, config.num_heads, config.num_heads));
  if (config.num_heads % config.num_kv_heads != 0) {
    fields.Fail("num_key_value_heads", config.num_kv_heads,
                fmt::format("a divisor of num_attention_heads {}", config.num_heads));
  }
  if (fields.Find("head_dim") == nullptr && config.hidden_size % config.num_heads != 0) {
    fields.Fail("num_attention_heads", config.num_heads,
                fmt::format("a divisor of hidden_size {} (or a head_dim)", config.hidden_size));
  }
  config.head_dim = static_cast<int>(fields.Integer("head_dim", 2, kMaxHeadDim, config.hidden_size / config.num_heads));
  if (config.head_dim < 2 || config.head_dim > kMaxHeadDim || config.head_dim % 2 != 0) {
    fields.Fail("head_dim", config.head_dim, fmt::format("an even number from 2 to {}", kMaxHeadDim));
  }
  if (int64_t{config.num_heads} * config.head_dim > 2 * kMaxHidden) {
    fields.Fail("head_dim", config.head_dim, fmt::format("num_attention_heads * head_dim at most {}", 2 * kMaxHidden));
  }
}

}  // namespace

int64_t ModelConfig::NumLayerMatrixParameters() const {
  return hidden_size * head_dim * (2 * num_heads + 2 * num_kv_heads) + 3 * hidden_size * intermediate_size;
}

int64_t ModelConfig::NumParameters() const {
  const LinearAttentionConfig& attention = linear_attention;
  int64_t layer = 2 * hidden_size + NumLayerMatrixParameters();  // norms; q, k, v, o, gate, up, down
  layer += int64_t{num_heads} * attention.conv_kernel;
  if (attention.global == GlobalBranch::kScaled) layer += 1;
  if (attention.global == GlobalBranch::kRmsNorm) layer += num_heads;
  if (attention.decay) layer += num_kv_heads;
  return vocab_size * hidden_size * (tie_word_embeddings ? 1 : 2) + hidden_size + num_layers * layer;
}

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view text) {
  if (absl::Status checked = CheckJson(text); !checked.ok()) {
    return absl::InvalidArgumentError(fmt::format("config: {}", std::string(checked.message())));
  }
  const json root = json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (!root.is_object()) return absl::InvalidArgumentError("config: expected a JSON object");

  Fields fields(root, "");
  RefuseUnsupported(fields);
  ModelConfig config;
  config.hidden_size = fields.Integer("hidden_size", 1, kMaxHidden);
  config.intermediate_size = fields.Integer("intermediate_size", 1, kMaxIntermediate);
  config.num_layers = static_cast<int>(fields.Integer("num_hidden_layers", 1, kMaxLayers));
  ParseHeads(fields, config);
  config.vocab_size = fields.Integer("vocab_size", 1, kMaxVocab);
  config.max_position_embeddings = fields.Integer("max_position_embeddings", 1, kMaxPosition, 2048);
  config.rms_norm_eps = fields.Number("rms_norm_eps", 0.0, 1.0, 1e-6);
  config.rope_theta = fields.Number("rope_theta", 1.0, 1e12, 10000.0);
  config.tie_word_embeddings = fields.Boolean("tie_word_embeddings", false);
  config.bos_token_id = static_cast<int32_t>(fields.Integer("bos_token_id", 0, config.vocab_size - 1, -1));
  config.eos_token_ids = fields.TokenIds("eos_token_id", config.vocab_size);
  const json* block = fields.Find("linear_attention");
  if (block == nullptr || !block->is_object()) {
    fields.Fail("linear_attention", block == nullptr ? json() : *block, "an object (docs/model_format.md)");
  }
  if (!fields.status().ok()) return fields.status();

  absl::StatusOr<LinearAttentionConfig> attention = ParseLinearAttention(*block);
  if (!attention.ok()) return attention.status();
  config.linear_attention = *attention;
  return config;
}

}  // namespace linspec
