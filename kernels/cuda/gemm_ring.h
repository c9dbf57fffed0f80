// The fastest form of LaunchStreamingGemm, for up to 8 tokens on sm_90 and later. Internal to the matrix products.
#pragma once

#include "kernels/cuda/launch.h"

namespace linspec::cuda {

// Whether a norm on either side can ride along (launch.h) and pays: with 8-bit weights, up to kRingNormRows rows. In bf16
// a step of one request then took 3.82 ms instead of 3.73.
bool RingGemmTakesNorms(const LinspecCudaMatrix& w, int rows);

// False, with nothing launched, if this chip or the size of x does not allow it. Norms: only with RingGemmTakesNorms.
bool LaunchRingGemm(const GemmParams& params, int rows, cudaStream_t stream);

}  // namespace linspec::cuda
