// LaunchStreamingGemm of bf16 weights by warpgroup instructions, sm_90 only. Internal to the matrix products.
#pragma once

#include "kernels/cuda/launch.h"

namespace linspec::cuda {

// Whether the chip and this build have them. A property of the machine: asked once.
bool WgmmaGemmRuns();

// False, with nothing launched, where they do not run or the weights are not bf16. Needs params.workspace. Any number of
// rows, in passes of 128; the bits of a row depend on that row and the chip alone, but are not those of the other kernels.
bool LaunchWgmmaGemm(const GemmParams& params, int rows, cudaStream_t stream);

}  // namespace linspec::cuda
