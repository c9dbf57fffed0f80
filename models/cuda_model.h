// A linearized transformer on a GPU: Model over the CUDA plugin. It chooses tokens itself, so logits leave the device
// only when somebody wants them.
//
// A row's bits do not depend on the rows beside it up to the row count at which products change to the library's
// kernels (docs/cuda.md); with deterministic, at any count. They are not the CPU's bits: bf16 activations.
// Threads: engine thread, but for health().
#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda_device.h"
#include "models/model.h"
#include "models/transformer_builder.h"

namespace linspec {

// Loads source into the device. options.target: bf16, int8 or fp8 (F32: UNIMPLEMENTED); state_dtype: kF32, or kBF16
// where the kernels have it (docs/cuda.md; else UNIMPLEMENTED). Errors as BuildTransformer, and
// those of the device.
absl::StatusOr<std::unique_ptr<Model>> BuildCudaModel(const ModelConfig& config, WeightSource* source,
                                                      std::shared_ptr<CudaDevice> device, BuildOptions options,
                                                      DType state_dtype, bool deterministic);

}  // namespace linspec
