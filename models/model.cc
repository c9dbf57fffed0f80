#include "models/model.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <optional>
#include <utility>

#include "models/cuda_model.h"
#include "models/linear_transformer.h"
#include "models/tensor_reader.h"
#include "models/transformer_builder.h"
#include "models/weights.h"

namespace linspec {
namespace {

absl::StatusOr<std::shared_ptr<CpuOps>> MakeOps(const LoadOptions& options) {
  if (options.ops != nullptr) return options.ops;
  CpuOps::Options ops_options;
  ops_options.num_threads = options.num_threads;
  if (options.isa != "auto") {
    bool known = false;
    for (const Isa isa : kIsas) {
      if (options.isa != IsaName(isa)) continue;
      ops_options.isa = isa;
      known = true;
    }
    if (!known) {
      return absl::InvalidArgumentError(
          fmt::format("isa \"{}\": expected auto, scalar, avx2, avx512 or amx", options.isa));
    }
  }
  absl::StatusOr<std::unique_ptr<CpuOps>> ops = CpuOps::Create(ops_options);
  if (!ops.ok()) return ops.status();
  return std::shared_ptr<CpuOps>(*std::move(ops));
}

absl::StatusOr<DType> ParseStateDType(const std::string& name) {
  for (const auto& [known, dtype] : {std::pair{"f32", DType::kF32}, std::pair{"bf16", DType::kBF16}}) {
    if (name == known) return dtype;
  }
  return absl::InvalidArgumentError(fmt::format("state dtype \"{}\": expected f32 or bf16", name));
}

absl::StatusOr<std::unique_ptr<Model>> Build(const ModelConfig& config, WeightSource* source,
                                             const LoadOptions& options) {
  const absl::StatusOr<std::optional<DType>> dtype = ParseWeightDType(options.weight_dtype);
  if (!dtype.ok()) return dtype.status();
  const absl::StatusOr<DType> state_dtype = ParseStateDType(options.state_dtype);
  if (!state_dtype.ok()) return state_dtype.status();
  BuildOptions build{.target = *dtype, .pack_embedding = false, .progress = options.progress};
  if (options.cuda != nullptr) {
    return BuildCudaModel(config, source, options.cuda, build, *state_dtype, options.deterministic);
  }
  if (build.target == DType::kF8) {
    return absl::InvalidArgumentError("weight dtype \"fp8\" needs a GPU; on the CPU use int8");
  }
  absl::StatusOr<std::shared_ptr<CpuOps>> ops = MakeOps(options);
  if (!ops.ok()) return ops.status();
  absl::StatusOr<TransformerWeights> weights = BuildTransformer(config, source, MakeCpuPacker(ops->get()).get(), build);
  if (!weights.ok()) return weights.status();
  return std::make_unique<LinearTransformer>(config, *std::move(weights), *std::move(ops), *state_dtype);
}

}  // namespace

void VerifyBatch::Add(int32_t slot, const DraftTree& tree) {
  if (row_starts.empty()) row_starts.push_back(0);
  tokens.insert(tokens.end(), tree.tokens.begin(), tree.tokens.end());
  parents.insert(parents.end(), tree.parents.begin(), tree.parents.end());
  row_starts.push_back(num_rows());
  slots.push_back(slot);
}

void VerifyBatch::Advance(std::span<const int32_t> sampled) {
  std::transform(sampled.begin(), sampled.end(), tokens.begin(), [](int32_t token) { return std::max(token, 0); });
  for (RowSampling& row : sampling) ++row.position;
}

absl::Status Model::StartVerify(const VerifyBatch& batch, const StatePool& pool) {
  started_ = Verify(batch, pool);
  return absl::OkStatus();
}

absl::StatusOr<VerifyResult> Model::FinishVerify() {
  if (!started_.has_value()) return absl::InternalError("no verify was started");
  return *std::exchange(started_, std::nullopt);
}

absl::Status Model::StartNext(StatePool*) {
  return absl::UnimplementedError("this model does not run ahead of its results");
}

absl::Status Model::StartDrafted(const SelfDraft&, StatePool*) {
  return absl::UnimplementedError("this model does not draft for itself");
}

absl::StatusOr<std::unique_ptr<StatePool>> Model::CreatePool(int num_slots) const {
  return StatePool::Create(config(), num_slots, state_dtype());
}

absl::StatusOr<VerifyResult> Model::Extend(const VerifyBatch&, const StatePool&) {
  return absl::UnimplementedError("this model does not extend verified trees");
}

absl::Status Model::Embed(std::span<const int32_t>, std::span<float>) {
  return absl::UnimplementedError("this model does not lend its embedding");
}

absl::StatusOr<std::span<const float>> Model::Unembed(std::span<const float>) {
  return absl::UnimplementedError("this model does not lend its unembedding");
}

absl::StatusOr<std::unique_ptr<Model>> LoadModel(const LoadOptions& options) {
  const std::string config_path = (std::filesystem::path(options.path) / "config.json").string();
  absl::StatusOr<std::string> text = ReadTextFile(config_path, kMaxConfigBytes);
  if (!text.ok()) return text.status();
  absl::StatusOr<ModelConfig> config = ParseModelConfig(*text);
  if (!config.ok()) {
    return absl::InvalidArgumentError(fmt::format("{}: {}", config_path, std::string(config.status().message())));
  }
  absl::StatusOr<std::unique_ptr<WeightMap>> weights = WeightMap::Open(options.path);
  if (!weights.ok()) return weights.status();
  return Build(*config, weights->get(), options);
}

absl::StatusOr<std::unique_ptr<Model>> BuildRandomModel(const ModelConfig& config, uint64_t seed,
                                                        const LoadOptions& options) {
  return Build(config, MakeRandomWeights(seed, /*draw_matrices=*/options.cuda == nullptr).get(), options);
}

}  // namespace linspec
