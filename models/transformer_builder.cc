#include "models/transformer_builder.h"

#include <fmt/format.h>

#include <string>
#include <utility>
#include <vector>

#include "models/tensor_reader.h"

namespace linspec {
namespace {

constexpr int kPublishedTaps = 63;  // of which the last 31 would look into the future
constexpr int kPublishedLag0 = 31;  // tap of lag 0

// One layer after the other; the caller checks reader->status().
class Builder {
 public:
  Builder(const ModelConfig& config, TensorReader* reader) : config_(config), reader_(reader) {}

  TransformerLayer Layer(int index) {
    const std::string prefix = fmt::format("model.layers.{}.", index);
    const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
    const int64_t dim = config_.hidden_size, inner = config_.intermediate_size, head_dim = config_.head_dim;
    const int64_t q_rows = config_.num_heads * head_dim, kv_rows = config_.num_kv_heads * head_dim;
    TransformerLayer layer;
    layer.attention_norm = reader_->Vector(prefix + "input_layernorm.weight", {dim});
    layer.mlp_norm = reader_->Vector(prefix + "post_attention_layernorm.weight", {dim});
    layer.qkv = reader_->Fused({{attention + "q_proj.weight", q_rows},
                                {attention + "k_proj.weight", kv_rows},
                                {attention + "v_proj.weight", kv_rows}},
                               dim);
    layer.o = reader_->Fused({{attention + "o_proj.weight", dim}}, q_rows);
    layer.gate_up = reader_->GateUp({{mlp + "gate_proj.weight", inner}, {mlp + "up_proj.weight", inner}}, dim);
    layer.down = reader_->Fused({{mlp + "down_proj.weight", dim}}, inner);
    LinearAttention(attention, layer);
    layer.attention.index = index;
    return layer;
  }

 private:
  void LinearAttention(const std::string& prefix, TransformerLayer& layer) {
    const LinearAttentionConfig& rule = config_.linear_attention;
    if (rule.conv_kernel > 0) layer.conv_taps = ConvTaps(prefix);
    float factor = 0;
    if (rule.global == GlobalBranch::kScaled) factor = GlobalFactor(prefix);
    if (rule.global == GlobalBranch::kRmsNorm) {
      layer.global_gain = reader_->Vector(prefix + "global_gain", {config_.num_heads});
    }
    if (rule.decay) layer.decay = Decay(prefix + "global_decay");
    layer.attention = {.num_heads = config_.num_heads,
                       .num_kv_heads = config_.num_kv_heads,
                       .head_dim = config_.head_dim,
                       .group_size = rule.group_size,
                       .conv_kernel = rule.conv_kernel,
                       .local = rule.local,
                       .global = rule.global,
                       .global_factor = factor,
                       .global_gain = layer.global_gain.data(),
                       .global_norm_eps = rule.global_norm_eps,
                       .decay = rule.decay ? layer.decay.data() : nullptr,
                       .conv_taps = layer.conv_taps.data()};
  }

  // [H, conv_kernel]; from the published checkpoints' [H, 1, 63, 1], which runs from the oldest lag to the newest.
  std::vector<float> ConvTaps(const std::string& prefix) {
    const int64_t heads = config_.num_heads, kernel = config_.linear_attention.conv_kernel;
    const std::string published = prefix + "dwconv.weight";
    if (!reader_->Has(published)) return reader_->Vector(prefix + "conv_taps", {heads, kernel});
    published_ = true;
    const std::vector<float> stored = reader_->Vector(published, {heads, 1, kPublishedTaps, 1});
    std::vector<float> taps(heads * kernel);
    for (int64_t i = 0; i < heads * kernel && reader_->status().ok(); ++i) {
      taps[i] = stored[i / kernel * kPublishedTaps + kPublishedLag0 - i % kernel];
    }
    return taps;
  }

  float GlobalFactor(const std::string& prefix) {
    const std::string name = prefix + "global_factor";
    if (published_ && !reader_->Has(name)) return 1.0f;
    const std::vector<float> factor = reader_->Vector(name, {1});
    return factor.empty() ? 0.0f : factor[0];
  }

  std::vector<float> Decay(const std::string& name) {
    std::vector<float> decay = reader_->Vector(name, {config_.num_kv_heads});
    for (const float g : decay) {
      if (g > 0.0f && g <= 1.0f) continue;
      reader_->Fail(fmt::format("tensor {} holds {}, expected a factor in (0, 1]", name, g));
    }
    return decay;
  }

  const ModelConfig& config_;
  TensorReader* reader_;
  bool published_ = false;  // naming of the published checkpoints
};

EmbeddingTable CopyTable(const StoredMatrix& matrix) {
  EmbeddingTable table;
  table.dtype = matrix.tensor.dtype;
  table.dim = matrix.tensor.shape[1];
  table.data.assign(matrix.tensor.data, matrix.tensor.data + matrix.tensor.num_bytes);
  if (table.dtype == DType::kI8) table.row_scales.assign(matrix.scales(), matrix.scales() + matrix.rows());
  return table;
}

}  // namespace

absl::StatusOr<TransformerWeights> BuildTransformer(const ModelConfig& config, WeightSource* source,
                                                    MatrixPacker* packer, const BuildOptions& options) {
  TensorReader reader(source, packer, options.target);
  Builder builder(config, &reader);
  TransformerWeights weights;
  {
    const StoredMatrix embedding = reader.Matrix("model.embed_tokens.weight", config.vocab_size, config.hidden_size);
    if (!reader.status().ok()) return reader.status();
    if (options.pack_embedding) {
      weights.packed_embedding = TensorReader(source, packer, std::nullopt).Pack(embedding);
      if (weights.packed_embedding == nullptr) return packer->status();
    } else {
      weights.embedding = CopyTable(embedding);
    }
    weights.lm_head = config.tie_word_embeddings
                          ? reader.Pack(embedding)
                          : reader.Fused({{"lm_head.weight", config.vocab_size}}, config.hidden_size);
  }
  for (int i = 0; i < config.num_layers; ++i) {
    weights.layers.push_back(builder.Layer(i));
    if (!reader.status().ok()) return reader.status();
    if (options.progress) options.progress((i + 1.0) / config.num_layers);
  }
  weights.final_norm = reader.Vector("model.norm.weight", {config.hidden_size});
  if (!reader.status().ok()) return reader.status();
  if (absl::Status all = source->CheckAllTaken(); !all.ok()) return all;
  return weights;
}

}  // namespace linspec
