// LaunchStreamingGemm by warpgroup instructions, sm_90 only. Internal to the matrix products.
#pragma once

#include "kernels/cuda/launch.h"

namespace linspec::cuda {

// Whether the chip and this build have them. A property of the machine: asked once.
bool WgmmaGemmRuns();

// Where WgmmaGemmRuns, with params.workspace. Any number of rows, in passes of 128; the bits of a row depend on that
// row and the chip alone, but are not those of the other kernels.
void LaunchWgmmaGemm(const GemmParams& params, int rows, cudaStream_t stream);

// Whether it takes GemmParams::rope for these heads.
bool WgmmaGemmTurnsHeads(int head_dim);

// Its part of the products' workspace, at the end.
int64_t WgmmaGemmWorkspaceBytes();

}  // namespace linspec::cuda
