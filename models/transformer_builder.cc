#include "models/transformer_builder.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace linspec {
namespace {

constexpr int kPublishedTaps = 63;  // of which the last 31 would look into the future
constexpr int kPublishedLag0 = 31;  // tap of lag 0

// A 2-D weight as stored. row_scales belong to I8.
struct Matrix {
  std::string name;
  TensorView tensor;
  TensorView row_scales;
  int64_t rows() const { return tensor.shape[0]; }
  const float* scales() const { return reinterpret_cast<const float*>(row_scales.data); }
};

struct MatrixShape {
  std::string name;
  int64_t rows;
};

bool IsFloat(DType dtype) { return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16; }

std::vector<float> Widened(const Matrix& matrix) {
  if (matrix.tensor.dtype != DType::kI8) return ToFloats(matrix.tensor);
  const auto* values = reinterpret_cast<const int8_t*>(matrix.tensor.data);
  const int64_t cols = matrix.tensor.shape[1];
  std::vector<float> floats(matrix.tensor.num_elements());
  for (int64_t i = 0; i < matrix.tensor.num_elements(); ++i) {
    floats[i] = static_cast<float>(values[i]) * matrix.scales()[i / cols];
  }
  return floats;
}

// Reads tensors in order and stops at the first error: later calls return empty values, the caller checks status() once
// per layer.
class Builder {
 public:
  Builder(const ModelConfig& config, WeightSource* source, CpuOps* ops, std::optional<DType> target)
      : config_(config), source_(source), ops_(ops), target_(target) {}

  const absl::Status& status() const { return status_; }

  std::vector<float> Vector(const std::string& name, std::vector<int64_t> shape) {
    const TensorView tensor = Take(name, std::move(shape));
    if (!status_.ok()) return {};
    if (IsFloat(tensor.dtype)) return ToFloats(tensor);
    Fail(fmt::format("tensor {} is {}, expected a float type", name, DTypeName(tensor.dtype)));
    return {};
  }

  Matrix TakeMatrix(const std::string& name, int64_t rows, int64_t cols) {
    Matrix matrix{.name = name, .tensor = Take(name, {rows, cols}), .row_scales = {}};
    if (!status_.ok()) return matrix;
    if (matrix.tensor.dtype == DType::kI8) {
      matrix.row_scales = Take(name + "_scale", {rows});
      if (status_.ok() && matrix.row_scales.dtype != DType::kF32) {
        Fail(fmt::format("tensor {}_scale is {}, expected F32", name, DTypeName(matrix.row_scales.dtype)));
      }
    } else if (!IsFloat(matrix.tensor.dtype)) {
      Fail(fmt::format("tensor {} is {}, expected F32, F16, BF16 or I8", name, DTypeName(matrix.tensor.dtype)));
    }
    return matrix;
  }

  // Several matrices of the same width as one, rows in the given order.
  std::unique_ptr<PackedWeight> Fused(const std::vector<MatrixShape>& shapes, int64_t cols) {
    std::vector<Matrix> parts;
    int64_t rows = 0;
    for (const MatrixShape& shape : shapes) {
      parts.push_back(TakeMatrix(shape.name, shape.rows, cols));
      if (!status_.ok()) return nullptr;
      rows += shape.rows;
    }
    if (parts.size() == 1) return Pack(parts[0]);
    const DType dtype = parts[0].tensor.dtype;
    const bool same = std::all_of(parts.begin(), parts.end(), [&](const Matrix& m) { return m.tensor.dtype == dtype; });
    return same ? PackSame(parts, rows, cols) : PackMixed(parts, rows, cols);
  }

  std::unique_ptr<PackedWeight> Pack(const Matrix& matrix) {
    const DType dtype = matrix.tensor.dtype;
    return ops_->Pack(matrix.tensor.data, dtype, matrix.scales(), matrix.rows(), matrix.tensor.shape[1], Target(dtype));
  }

  TransformerLayer Layer(int index) {
    const std::string prefix = fmt::format("model.layers.{}.", index);
    const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
    const int64_t dim = config_.hidden_size, inner = config_.intermediate_size, head_dim = config_.head_dim;
    const int64_t q_rows = config_.num_heads * head_dim, kv_rows = config_.num_kv_heads * head_dim;
    TransformerLayer layer;
    layer.attention_norm = Vector(prefix + "input_layernorm.weight", {dim});
    layer.mlp_norm = Vector(prefix + "post_attention_layernorm.weight", {dim});
    layer.qkv = Fused({{attention + "q_proj.weight", q_rows},
                       {attention + "k_proj.weight", kv_rows},
                       {attention + "v_proj.weight", kv_rows}},
                      dim);
    layer.o = Fused({{attention + "o_proj.weight", dim}}, q_rows);
    layer.gate_up = Fused({{mlp + "gate_proj.weight", inner}, {mlp + "up_proj.weight", inner}}, dim);
    layer.down = Fused({{mlp + "down_proj.weight", dim}}, inner);
    LinearAttention(attention, layer);
    return layer;
  }

 private:
  void LinearAttention(const std::string& prefix, TransformerLayer& layer) {
    const LinearAttentionConfig& rule = config_.linear_attention;
    if (rule.conv_kernel > 0) layer.conv_taps = ConvTaps(prefix);
    float factor = 0;
    if (rule.global == GlobalBranch::kScaled) factor = GlobalFactor(prefix);
    if (rule.global == GlobalBranch::kRmsNorm) layer.global_gain = Vector(prefix + "global_gain", {config_.num_heads});
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
    if (!source_->Has(published)) return Vector(prefix + "conv_taps", {heads, kernel});
    published_ = true;
    const std::vector<float> stored = Vector(published, {heads, 1, kPublishedTaps, 1});
    std::vector<float> taps(heads * kernel);
    for (int64_t i = 0; i < heads * kernel && status_.ok(); ++i) {
      taps[i] = stored[i / kernel * kPublishedTaps + kPublishedLag0 - i % kernel];
    }
    return taps;
  }

  float GlobalFactor(const std::string& prefix) {
    const std::string name = prefix + "global_factor";
    if (published_ && !source_->Has(name)) return 1.0f;
    const std::vector<float> factor = Vector(name, {1});
    return factor.empty() ? 0.0f : factor[0];
  }

  std::vector<float> Decay(const std::string& name) {
    std::vector<float> decay = Vector(name, {config_.num_kv_heads});
    for (const float g : decay) {
      if (!(g > 0.0f && g <= 1.0f)) Fail(fmt::format("tensor {} holds {}, expected a factor in (0, 1]", name, g));
    }
    return decay;
  }

  std::unique_ptr<PackedWeight> PackSame(const std::vector<Matrix>& parts, int64_t rows, int64_t cols) {
    const DType dtype = parts[0].tensor.dtype;
    std::vector<std::byte> data;
    std::vector<float> scales;
    data.reserve(rows * cols * DTypeSize(dtype));
    for (const Matrix& part : parts) {
      data.insert(data.end(), part.tensor.data, part.tensor.data + part.tensor.num_bytes);
      if (dtype == DType::kI8) scales.insert(scales.end(), part.scales(), part.scales() + part.rows());
    }
    return ops_->Pack(data.data(), dtype, scales.empty() ? nullptr : scales.data(), rows, cols, Target(dtype));
  }

  std::unique_ptr<PackedWeight> PackMixed(const std::vector<Matrix>& parts, int64_t rows, int64_t cols) {
    std::vector<float> data;
    data.reserve(rows * cols);
    for (const Matrix& part : parts) {
      const std::vector<float> floats = Widened(part);
      data.insert(data.end(), floats.begin(), floats.end());
    }
    return ops_->Pack(data.data(), DType::kF32, nullptr, rows, cols, Target(DType::kF32));
  }

  TensorView Take(const std::string& name, std::vector<int64_t> shape) {
    if (!status_.ok()) return {};
    absl::StatusOr<TensorView> tensor = source_->Take(name, std::move(shape));
    if (tensor.ok()) return *std::move(tensor);
    status_ = tensor.status();
    return {};
  }

  DType Target(DType stored) const { return target_.value_or(stored == DType::kI8 ? DType::kI8 : DType::kBF16); }

  void Fail(const std::string& message) {
    if (status_.ok()) status_ = absl::InvalidArgumentError(message);
  }

  const ModelConfig& config_;
  WeightSource* source_;
  CpuOps* ops_;
  std::optional<DType> target_;
  bool published_ = false;  // naming of the published checkpoints
  absl::Status status_;
};

EmbeddingTable CopyTable(const Matrix& matrix) {
  EmbeddingTable table;
  table.dtype = matrix.tensor.dtype;
  table.dim = matrix.tensor.shape[1];
  table.data.assign(matrix.tensor.data, matrix.tensor.data + matrix.tensor.num_bytes);
  if (table.dtype == DType::kI8) table.row_scales.assign(matrix.scales(), matrix.scales() + matrix.rows());
  return table;
}

}  // namespace

absl::StatusOr<TransformerWeights> BuildTransformer(const ModelConfig& config, WeightSource* source, CpuOps* ops,
                                                    const BuildOptions& options) {
  Builder builder(config, source, ops, options.target);
  TransformerWeights weights;
  {
    const Matrix embedding = builder.TakeMatrix("model.embed_tokens.weight", config.vocab_size, config.hidden_size);
    if (!builder.status().ok()) return builder.status();
    weights.embedding = CopyTable(embedding);
    weights.lm_head = config.tie_word_embeddings
                          ? builder.Pack(embedding)
                          : builder.Fused({{"lm_head.weight", config.vocab_size}}, config.hidden_size);
  }
  for (int i = 0; i < config.num_layers; ++i) {
    weights.layers.push_back(builder.Layer(i));
    if (!builder.status().ok()) return builder.status();
    if (options.progress) options.progress((i + 1.0) / config.num_layers);
  }
  weights.final_norm = builder.Vector("model.norm.weight", {config.hidden_size});
  if (!builder.status().ok()) return builder.status();
  if (absl::Status all = source->CheckAllTaken(); !all.ok()) return all;
  return weights;
}

}  // namespace linspec
