// Choosing the token after each row on the device: position-keyed Gumbel-max, the contract of models/sampler.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/plugin_api.h"

namespace linspec::cuda {

struct SampleParams {
  float* logits;                        // [rows, vocab]; the edits are written into it
  const LinspecCudaSampling* sampling;  // [rows]
  // Where this step's edits are, device memory that outlives the launch; read through one more pointer so that a
  // captured graph can serve steps with other buffers.
  const LinspecCudaLogitEdit* const* edits;
  int32_t* sampled;  // [rows]; -1: NaN or +Inf among the logits, or nothing left to choose from
  int64_t vocab;
};
void LaunchSample(const SampleParams& params, int rows, cudaStream_t stream);

}  // namespace linspec::cuda
