// Barriers in shared memory, and copies to shared memory that complete them (sm_90 and later).
#pragma once

#include <cstdint>

#include "kernels/cuda/gemm_tile.h"

namespace linspec::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Barriers are uint64_t in shared memory, given by pointer or by their address there.

// One thread makes a barrier of `arrivals` a phase; then BarrierMade by that thread, and a barrier of its readers.
template <typename Barrier>
__device__ __forceinline__ void BarrierInit(Barrier barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void BarrierMade() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival; the phase also waits for `bytes` of copies.
template <typename Barrier>
__device__ __forceinline__ void BarrierExpect(Barrier barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(bytes)
               : "memory");
}
template <typename Barrier>
__device__ __forceinline__ void BarrierArrive(Barrier barrier, int arrivals) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(arrivals) : "memory");
}

// Until the phase of this parity (0, 1, 0, ...) is over.
template <typename Barrier>
__device__ __forceinline__ void BarrierWait(Barrier barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred done; AGAIN%=: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; @!done bra AGAIN%=;}" ::"r"(
          SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}

// A box of a tensor map from element (k, row) on, by one thread; its bytes count at the barrier.
template <typename Barrier>
__device__ __forceinline__ void CopyTile(uint32_t to, const void* map, int k, int row, Barrier barrier,
                                         uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(k), "r"(row), "r"(SharedAddress(barrier)), "l"(policy)
      : "memory");
}

// Of a tensor map that a copy will need.
__device__ __forceinline__ void PrefetchMap(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A multiple of 16 bytes, aligned to 16.
template <typename Barrier>
__device__ __forceinline__ void CopyBytes(uint32_t to, const void* from, int bytes, Barrier barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(SharedAddress(barrier))
               : "memory");
}

#endif

}  // namespace linspec::cuda
