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
#include "models/matrix_packer.h"
#include "models/weights.h"

namespace linspec {

struct BuildOptions {
  std::optional<DType> target;           // of every matrix; none: I8 stays, the rest becomes bf16
  bool pack_embedding = false;           // the table is packed too (I8 as stored, else bf16), not copied
  std::function<void(double)> progress;  // fraction done, may be empty
};

// Takes every tensor of source. Errors name the tensor: missing, mis-shaped, of a wrong dtype, infinite, or left over.
absl::StatusOr<TransformerWeights> BuildTransformer(const ModelConfig& config, WeightSource* source,
                                                    MatrixPacker* packer, const BuildOptions& options);

// Tensors of any name and shape drawn from seed, of the size that a trained model has: the same on any machine.
// draw_matrices false: weight matrices come as TensorView::random, for a packer that draws them itself.
std::unique_ptr<WeightSource> MakeRandomWeights(uint64_t seed, bool draw_matrices = true);

}  // namespace linspec
