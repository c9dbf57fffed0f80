// A thread block cluster: blocks that run at the same time on neighbouring multiprocessors, wait for each other and
// read each other's shared memory. Where there are none (below sm_90) a block is alone, and the same code runs.
//
// A block may not end while another can still read its shared memory. Threads: all of the cluster call Sync, Leave and
// End.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace linspec::cuda {

inline constexpr int kMostClusterBlocks = 8;  // what every chip with clusters can place

class Cluster {
 public:
  __device__ Cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank_));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size_));
#endif
  }
  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }
  __device__ int index() const { return static_cast<int>(blockIdx.x) / size_; }  // of the cluster

  // Barrier of all threads of the cluster; what they wrote before it is visible to all after it.
  __device__ void Sync() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
    __syncthreads();
#endif
  }
  // The end of it in two halves. Leave: this thread has what it wanted of other blocks, in its registers or beyond.
  __device__ void Leave() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
  }
  // Waits until all have left.
  __device__ void End() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
  }
  // The same variable in the shared memory of the block of that rank.
  template <typename T>
  __device__ const T& Of(const T& mine, int rank) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint64_t theirs;
    asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(reinterpret_cast<uint64_t>(&mine)), "r"(rank));
    return *reinterpret_cast<const T*>(theirs);
#else
    return mine;
#endif
  }

 private:
  int rank_ = 0, size_ = 1;
};

}  // namespace linspec::cuda
