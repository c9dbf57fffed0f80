// The fastest form of LaunchStreamingGemm, for up to 8 tokens on sm_90 and later. Internal to the matrix products.
#pragma once

#include "kernels/cuda/launch.h"

namespace linspec::cuda {

// Whether a norm in front can be the prologue (NormBefore::x): up to kRingNormRows rows.
bool RingGemmTakesNorm(const LinspecCudaMatrix& w, int rows);

// False, with nothing launched, if this chip or the size of x does not allow it. A prologue: only with
// RingGemmTakesNorm.
bool LaunchRingGemm(const GemmParams& params, int rows, cudaStream_t stream);

}  // namespace linspec::cuda
