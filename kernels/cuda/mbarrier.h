// Barriers in shared memory that copies of the bulk copy engine complete (sm_90 and later).
#pragma once

#include <cstdint>

#include "kernels/cuda/gemm_tile.h"

namespace linspec::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// One thread makes a barrier of `arrivals` a phase; then BarrierMade by that thread, and a barrier of its readers.
__device__ __forceinline__ void BarrierInit(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void BarrierMade() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival; the phase also waits for `bytes` of copies.
__device__ __forceinline__ void BarrierExpect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void BarrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}

// Until the phase of this parity (0, 1, 0, ...) is over.
__device__ __forceinline__ void BarrierWait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred done; AGAIN%=: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; @!done bra AGAIN%=;}" ::"r"(
          SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}

#endif

}  // namespace linspec::cuda
