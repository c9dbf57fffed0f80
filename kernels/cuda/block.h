// Thread-block programs written once for the GPU and for a host test.
//
// A program is a sequence of phases; within a phase no thread reads what another writes. On the GPU a phase ends in
// __syncthreads; on the host it is a loop over the thread numbers, in either order, so that a test without a GPU runs
// the same index arithmetic, and a phase that breaks the rule shows as a difference between the two orders.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define LINSPEC_BLOCK __device__ __forceinline__
#define LINSPEC_UNROLL _Pragma("unroll")
#else
#include <bit>
#include <vector>
#define LINSPEC_BLOCK inline
#define LINSPEC_UNROLL
#endif

namespace linspec::cuda {

inline constexpr int kThreads = 256;  // of every block program

struct alignas(16) Vec4 {  // one 16-byte load
  float x, y, z, w;
};

LINSPEC_BLOCK Vec4 Load4(const float* p) { return *reinterpret_cast<const Vec4*>(p); }
LINSPEC_BLOCK void Store4(float* p, const Vec4& v) { *reinterpret_cast<Vec4*>(p) = v; }
LINSPEC_BLOCK void Fma4(float a, const Vec4& b, Vec4& c) {
  c.x = fmaf(a, b.x, c.x);
  c.y = fmaf(a, b.y, c.y);
  c.z = fmaf(a, b.z, c.z);
  c.w = fmaf(a, b.w, c.w);
}
LINSPEC_BLOCK float Dot4(const Vec4& a, const Vec4& b, float sum) {
  sum = fmaf(a.x, b.x, sum);
  sum = fmaf(a.y, b.y, sum);
  sum = fmaf(a.z, b.z, sum);
  return fmaf(a.w, b.w, sum);
}

#ifdef __CUDACC__

LINSPEC_BLOCK int PopCount(uint64_t mask) { return __popcll(mask); }

struct DeviceBlock {
  template <typename T>
  struct PerThread {
    T value;
    LINSPEC_BLOCK T& operator[](int) { return value; }
  };
  template <typename Work>
  LINSPEC_BLOCK void Phase(Work work) const {
    work(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
};

#else

inline int PopCount(uint64_t mask) { return std::popcount(mask); }

struct HostBlock {
  bool reversed = false;
  template <typename T>
  struct PerThread {
    std::vector<T> values = std::vector<T>(kThreads);
    T& operator[](int thread) { return values[thread]; }
  };
  template <typename Work>
  void Phase(Work work) const {
    for (int i = 0; i < kThreads; ++i) work(reversed ? kThreads - 1 - i : i);
  }
};

#endif

}  // namespace linspec::cuda
