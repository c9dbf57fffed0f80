// Turns named tensors into the packed weights of a LinearTransformer. Names and shapes: docs/model_format.md.
//
// Threads: one thread (loading).
#pragma once

#include <functional>
#include <memory>
#include <optional>

#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "models/linear_transformer.h"
#include "models/weights.h"

namespace linspec {

struct BuildOptions {
  std::optional<DType> target;           // kF32, kBF16 or kI8 for every matrix; none: I8 stays, the rest becomes bf16
  std::function<void(double)> progress;  // fraction done, may be empty
};

// Takes every tensor of source. Errors name the tensor: missing, mis-shaped, of a wrong dtype, infinite, or left over.
absl::StatusOr<TransformerWeights> BuildTransformer(const ModelConfig& config, WeightSource* source, CpuOps* ops,
                                                    const BuildOptions& options);

// Tensors of any name and shape drawn from seed, of the size that a trained model has: the same on any machine.
std::unique_ptr<WeightSource> MakeRandomWeights(uint64_t seed);

}  // namespace linspec
