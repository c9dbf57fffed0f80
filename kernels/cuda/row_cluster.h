// One row of logits for several blocks: a cluster that works as one block of kClusterThreads * size threads.
//
// Reductions combine the blocks' values in the order of their ranks, so a result depends on the row alone. All threads
// of the cluster take part in each of them, and call Sync last (cluster.h).
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "kernels/cuda/cluster.h"
#include "kernels/cuda/noise.h"
#include "kernels/cuda/pdl.h"

namespace linspec::cuda {

inline constexpr int kClusterThreads = 256, kClusterWarps = kClusterThreads / 32;
__device__ inline ScoredToken Nobody() { return {-INFINITY, INT_MAX}; }

// Blocks of a row: enough that a thread has few of the row's values.
inline int ClusterBlocks(int64_t vocab) {
  if (CurrentDevice().major < 9) return 1;
  int blocks = 1;
  while (blocks < kMostClusterBlocks && blocks * kClusterThreads * 4 < vocab) blocks *= 2;
  return blocks;
}

// Larger floats have larger keys.
__device__ inline uint32_t OrderedKey(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float FromOrderedKey(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

// The best of the warp's, in all its lanes; no score may be NaN. Two instructions of the warp instead of five rounds of
// exchange. Adding zero makes one number of the two zeros, which are equal as scores.
__device__ inline ScoredToken WarpBest(const ScoredToken& mine) {
  constexpr unsigned kAll = 0xFFFFFFFFu;
  const uint32_t key = OrderedKey(mine.score + 0.0f), best = __reduce_max_sync(kAll, key);
  const unsigned token = __reduce_min_sync(kAll, key == best ? static_cast<unsigned>(mine.token) : UINT_MAX);
  return {FromOrderedKey(best), static_cast<int>(token)};
}

struct RowClusterShared {
  ScoredToken best[kClusterWarps];
  double sums[kClusterWarps];
  // What the other blocks read, in turns: a block that is ahead by one reduction does not overwrite what others still
  // read.
  ScoredToken block_best[2];
  double block_sum[2];
};

class RowCluster : public Cluster {
 public:
  __device__ explicit RowCluster(RowClusterShared* shared) : shared_(shared) {}
  __device__ int row() const { return index(); }
  __device__ int thread() const { return rank() * kClusterThreads + static_cast<int>(threadIdx.x); }
  __device__ int num_threads() const { return size() * kClusterThreads; }

  __device__ ScoredToken Best(ScoredToken mine) {
    mine = WarpBest(mine);
    if (threadIdx.x % 32 == 0) shared_->best[threadIdx.x / 32] = mine;
    __syncthreads();
    turn_ ^= 1;
    if (threadIdx.x == 0) {
      for (const ScoredToken& other : shared_->best) {
        if (Better(other, mine)) mine = other;
      }
      shared_->block_best[turn_] = mine;
    }
    Sync();
    ScoredToken best = Of(shared_->block_best[turn_], 0);
    for (int rank = 1; rank < size(); ++rank) {
      const ScoredToken other = Of(shared_->block_best[turn_], rank);
      if (Better(other, best)) best = other;
    }
    return best;
  }

  __device__ double Sum(double mine) {
    for (int offset = 16; offset > 0; offset /= 2) mine += __shfl_xor_sync(0xFFFFFFFFu, mine, offset);
    if (threadIdx.x % 32 == 0) shared_->sums[threadIdx.x / 32] = mine;
    __syncthreads();
    turn_ ^= 1;
    if (threadIdx.x == 0) {
      double sum = 0;
      for (const double warp : shared_->sums) sum += warp;
      shared_->block_sum[turn_] = sum;
    }
    Sync();
    double sum = 0;
    for (int rank = 0; rank < size(); ++rank) sum += Of(shared_->block_sum[turn_], rank);
    return sum;
  }

 private:
  RowClusterShared* const shared_;
  int turn_ = 0;
};

}  // namespace linspec::cuda
