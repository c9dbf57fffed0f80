#include "models/medusa_heads.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>

#include "models/json_check.h"
#include "models/tensor_reader.h"
#include "models/weights.h"

namespace linspec {
namespace {

constexpr int kVersion = 1;
constexpr int kMaxHeads = 16, kMaxLayers = 16;

struct MedusaConfig {
  int num_heads = 0, num_layers = 0;
};

absl::StatusOr<int> ReadInteger(const nlohmann::json& root, const char* name, int low, int high) {
  const auto it = root.find(name);
  if (it == root.end()) return absl::InvalidArgumentError(fmt::format("{} is missing", name));
  if (it->is_number_integer() && *it >= low && *it <= high) return it->get<int>();
  return absl::InvalidArgumentError(
      fmt::format("{} = {:.80}: expected an integer from {} to {}", name, it->dump(-1, ' ', true), low, high));
}

absl::StatusOr<MedusaConfig> ParseConfig(const std::string& text) {
  if (absl::Status checked = CheckJson(text); !checked.ok()) return checked;
  const nlohmann::json root = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!root.is_object()) return absl::InvalidArgumentError("expected a JSON object");
  MedusaConfig config;
  const absl::StatusOr<int> version = ReadInteger(root, "version", kVersion, kVersion);
  if (!version.ok()) return version.status();
  const absl::StatusOr<int> heads = ReadInteger(root, "medusa_num_heads", 1, kMaxHeads);
  if (!heads.ok()) return heads.status();
  const absl::StatusOr<int> layers = ReadInteger(root, "medusa_num_layers", 1, kMaxLayers);
  if (!layers.ok()) return layers.status();
  return MedusaConfig{*heads, *layers};
}

}  // namespace

absl::StatusOr<MedusaWeights> MedusaWeights::Load(const std::string& folder, const ModelConfig& target,
                                                  const std::string& weight_dtype, MatrixPacker* packer) {
  const absl::StatusOr<std::optional<DType>> dtype = ParseWeightDType(weight_dtype);
  if (!dtype.ok()) return dtype.status();
  const std::string config_path = (std::filesystem::path(folder) / kMedusaConfigFile).string();
  const absl::StatusOr<std::string> text = ReadTextFile(config_path, kMaxConfigBytes);
  if (!text.ok()) return text.status();
  const absl::StatusOr<MedusaConfig> config = ParseConfig(*text);
  if (!config.ok()) {
    return absl::InvalidArgumentError(fmt::format("{}: {}", config_path, std::string(config.status().message())));
  }
  auto weights = WeightMap::OpenFile((std::filesystem::path(folder) / kMedusaWeightsFile).string());
  if (!weights.ok()) return weights.status();

  const int64_t dim = target.hidden_size;
  TensorReader reader(weights->get(), packer, *dtype);
  // In the published layout a head's last member is its own unembedding; all heads have one or none has.
  const bool own = reader.Has(fmt::format("0.{}.weight", config->num_layers));
  std::vector<Head> heads(config->num_heads);
  for (int n = 0; n < config->num_heads; ++n) {
    for (int l = 0; l < config->num_layers; ++l) {
      const std::string prefix = fmt::format("{}.{}.linear.", n, l);
      auto weight = reader.Fused({{prefix + "weight", dim}}, dim);
      heads[n].blocks.push_back({std::move(weight), reader.Vector(prefix + "bias", {dim})});
    }
    if (own) {
      heads[n].unembedding =
          reader.Fused({{fmt::format("{}.{}.weight", n, config->num_layers), target.vocab_size}}, dim);
    }
  }
  if (!reader.status().ok()) return reader.status();
  if (absl::Status all = (*weights)->CheckAllTaken(); !all.ok()) return all;
  return MedusaWeights{std::move(heads)};
}

absl::StatusOr<std::unique_ptr<MedusaHeads>> MedusaHeads::Load(const std::string& folder, const ModelConfig& target,
                                                               const std::string& weight_dtype,
                                                               std::shared_ptr<CpuOps> ops) {
  auto weights = MedusaWeights::Load(folder, target, weight_dtype, MakeCpuPacker(ops.get()).get());
  if (!weights.ok()) return weights.status();
  return std::unique_ptr<MedusaHeads>(
      new MedusaHeads(target.hidden_size, target.vocab_size, *std::move(weights), std::move(ops)));
}

int64_t MedusaHeads::weight_bytes() const {
  int64_t bytes = 0;
  for (const MedusaWeights::Head& head : heads_) {
    for (const MedusaWeights::Block& block : head.blocks) {
      bytes += block.weight->bytes() + static_cast<int64_t>(block.bias.size() * sizeof(float));
    }
    if (head.unembedding != nullptr) bytes += head.unembedding->bytes();
  }
  return bytes;
}

absl::StatusOr<std::span<const float>> MedusaHeads::Logits(std::span<const float> hidden, int num_heads,
                                                           Model* target) {
  const int64_t num_rows = std::ssize(hidden) / hidden_size_;
  if (num_rows < 1 || std::ssize(hidden) != num_rows * hidden_size_ || num_heads < 1 || num_heads > this->num_heads()) {
    return absl::InternalError(fmt::format("medusa: {} values for rows of {}, {} of {} heads", hidden.size(),
                                           hidden_size_, num_heads, this->num_heads()));
  }
  states_.resize(num_heads * hidden.size());
  for (int n = 0; n < num_heads; ++n) {
    float* x = states_.data() + n * hidden.size();
    std::copy(hidden.begin(), hidden.end(), x);
    for (const MedusaWeights::Block& block : heads_[n].blocks) ApplyBlock(block, x, num_rows);
  }
  if (shares_unembedding()) return target->Unembed(states_);
  logits_.resize(num_heads * num_rows * vocab_size_);
  for (int n = 0; n < num_heads; ++n) {
    ops_->Matmul({.x = states_.data() + n * hidden.size(),
                  .w = heads_[n].unembedding.get(),
                  .y = logits_.data() + n * num_rows * vocab_size_,
                  .num_rows = num_rows});
  }
  return logits_;
}

// x += SiLU(W x + b), with the gated activation of the MLP and a gate of one.
void MedusaHeads::ApplyBlock(const MedusaWeights::Block& block, float* x, int64_t num_rows) {
  const int64_t dim = hidden_size_;
  gate_up_.assign(num_rows * 2 * dim, 1.0f);
  activation_.resize(num_rows * dim);
  ops_->Matmul({.x = x, .w = block.weight.get(), .y = activation_.data(), .num_rows = num_rows});
  for (int64_t i = 0; i < num_rows * dim; ++i) {
    gate_up_[i / dim * 2 * dim + i % dim] = activation_[i] + block.bias[i % dim];
  }
  ops_->SiluMul({.gate_up = gate_up_.data(), .out = activation_.data(), .num_rows = num_rows, .dim = dim});
  for (int64_t i = 0; i < num_rows * dim; ++i) x[i] += activation_[i];
}

}  // namespace linspec
