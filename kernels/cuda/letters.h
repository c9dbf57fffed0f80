// Exchange between blocks that run at the same time, through global memory. A letter is 8 bytes, a value and the number
// of the call, written and read as one: whoever waits for a value polls the value itself, so that an exchange costs one
// store and one load through the L2, and no fence and no counter that would have to be reset.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace linspec::cuda {

__device__ __forceinline__ uint64_t Letter(uint32_t value, uint32_t call) { return uint64_t{call} << 32 | value; }
__device__ __forceinline__ void Post(uint64_t* to, uint64_t letter) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(letter) : "memory");
}
__device__ __forceinline__ void PostPair(uint64_t* to, uint64_t first, uint64_t second) {
  asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(first), "l"(second) : "memory");
}

// f(u, first value, second value) of `count` <= kMost pairs of letters, the u-th at at(u), when all are there.
template <int kMost, typename At, typename Function>
__device__ __forceinline__ void Collect(int count, uint32_t call, At at, Function f) {
  uint64_t a[kMost], b[kMost];
  bool there = false;
  while (!there) {
    there = true;
#pragma unroll
    for (int u = 0; u < kMost; ++u) {
      if (u >= count) break;
      asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a[u]), "=l"(b[u]) : "l"(at(u)) : "memory");
    }
#pragma unroll
    for (int u = 0; u < kMost; ++u) {
      if (u >= count) break;
      there &= a[u] >> 32 == call && b[u] >> 32 == call;
    }
  }
#pragma unroll
  for (int u = 0; u < kMost; ++u) {
    if (u >= count) break;
    f(u, static_cast<uint32_t>(a[u]), static_cast<uint32_t>(b[u]));
  }
}

}  // namespace linspec::cuda
