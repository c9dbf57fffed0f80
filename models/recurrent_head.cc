#include "models/recurrent_head.h"

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
constexpr int64_t kMaxIntermediateSize = 1 << 16;

struct HeadConfig {
  int64_t intermediate_size = 0;
  float rms_norm_eps = 0;
};

absl::StatusOr<HeadConfig> ParseConfig(const std::string& text) {
  if (absl::Status checked = CheckJson(text); !checked.ok()) return checked;
  const nlohmann::json root = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!root.is_object()) return absl::InvalidArgumentError("expected a JSON object");
  const auto fail = [&](const char* name, const std::string& expected) {
    const std::string found = root.contains(name) ? fmt::format("{:.80}", root[name].dump(-1, ' ', true)) : "missing";
    return absl::InvalidArgumentError(fmt::format("{} = {}: expected {}", name, found, expected));
  };
  const nlohmann::json version = root.value("version", nlohmann::json());
  if (!version.is_number_integer() || version != kVersion) return fail("version", fmt::format("{}", kVersion));
  const nlohmann::json size = root.value("intermediate_size", nlohmann::json());
  if (!size.is_number_integer() || size < 1 || size > kMaxIntermediateSize) {
    return fail("intermediate_size", fmt::format("an integer from 1 to {}", kMaxIntermediateSize));
  }
  const nlohmann::json eps = root.value("rms_norm_eps", nlohmann::json());
  if (!eps.is_number() || !(eps > 0 && eps < 1)) return fail("rms_norm_eps", "a number between 0 and 1");
  return HeadConfig{size.get<int64_t>(), eps.get<float>()};
}

}  // namespace

absl::StatusOr<RecurrentWeights> RecurrentWeights::Load(const std::string& folder, const ModelConfig& target,
                                                        const std::string& weight_dtype, MatrixPacker* packer) {
  const absl::StatusOr<std::optional<DType>> dtype = ParseWeightDType(weight_dtype);
  if (!dtype.ok()) return dtype.status();
  const std::string config_path = (std::filesystem::path(folder) / kRecurrentHeadConfigFile).string();
  const absl::StatusOr<std::string> text = ReadTextFile(config_path, kMaxConfigBytes);
  if (!text.ok()) return text.status();
  const absl::StatusOr<HeadConfig> config = ParseConfig(*text);
  if (!config.ok()) {
    return absl::InvalidArgumentError(fmt::format("{}: {}", config_path, std::string(config.status().message())));
  }
  auto weights = WeightMap::OpenFile((std::filesystem::path(folder) / kRecurrentHeadWeightsFile).string());
  if (!weights.ok()) return weights.status();

  const int64_t dim = target.hidden_size, inner = config->intermediate_size;
  TensorReader reader(weights->get(), packer, *dtype);
  RecurrentWeights head;
  head.intermediate_size = inner;
  head.rms_norm_eps = config->rms_norm_eps;
  head.state_norm = reader.Vector("state_norm.weight", {dim});
  head.token_norm = reader.Vector("token_norm.weight", {dim});
  head.gate_up_proj = reader.GateUp({{"gate_proj.weight", inner}, {"up_proj.weight", inner}}, 2 * dim);
  head.down_proj = reader.Fused({{"down_proj.weight", dim}}, inner);
  if (!reader.status().ok()) return reader.status();
  if (absl::Status all = (*weights)->CheckAllTaken(); !all.ok()) return all;
  return head;
}

absl::StatusOr<std::unique_ptr<RecurrentHead>> RecurrentHead::Load(const std::string& folder, const ModelConfig& target,
                                                                   const std::string& weight_dtype,
                                                                   std::shared_ptr<CpuOps> ops) {
  auto weights = RecurrentWeights::Load(folder, target, weight_dtype, MakeCpuPacker(ops.get()).get());
  if (!weights.ok()) return weights.status();
  return std::unique_ptr<RecurrentHead>(new RecurrentHead(target.hidden_size, *std::move(weights), std::move(ops)));
}

int64_t RecurrentHead::weight_bytes() const {
  return weights_.gate_up_proj->bytes() + weights_.down_proj->bytes() +
         static_cast<int64_t>((weights_.state_norm.size() + weights_.token_norm.size()) * sizeof(float));
}

absl::StatusOr<std::span<const float>> RecurrentHead::Step(std::span<float> states, std::span<const int32_t> tokens,
                                                           Model* target) {
  if (tokens.empty() || std::ssize(states) != std::ssize(tokens) * hidden_size_) {
    return absl::InternalError(
        fmt::format("recurrent head: {} values for {} rows of {}", states.size(), tokens.size(), hidden_size_));
  }
  embedded_.resize(states.size());
  if (absl::Status embedded = target->Embed(tokens, embedded_); !embedded.ok()) return embedded;
  Advance(states);
  return target->Unembed(states);
}

void RecurrentHead::Advance(std::span<float> states) {
  const int64_t dim = hidden_size_, inner = weights_.intermediate_size, rows = std::ssize(states) / dim;
  normed_.resize(states.size());
  input_.resize(2 * states.size());
  gate_up_.resize(rows * 2 * inner);
  activated_.resize(rows * inner);
  const auto half = [&](const float* x, const std::vector<float>& weight, int64_t offset) {
    ops_->RmsNorm({.x = x,
                   .weight = weight.data(),
                   .out = normed_.data(),
                   .num_rows = rows,
                   .dim = dim,
                   .eps = weights_.rms_norm_eps});
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(normed_.data() + r * dim, dim, input_.data() + r * 2 * dim + offset);
    }
  };
  half(states.data(), weights_.state_norm, 0);
  half(embedded_.data(), weights_.token_norm, dim);
  ops_->GatedMatmul(
      {.product = {.x = input_.data(), .w = weights_.gate_up_proj.get(), .y = gate_up_.data(), .num_rows = rows},
       .out = activated_.data()});
  ops_->Matmul({.x = activated_.data(),
                .w = weights_.down_proj.get(),
                .y = states.data(),
                .num_rows = rows,
                .accumulate = true});
}

}  // namespace linspec
