// Draft heads: a block per row, but a cluster of blocks for the choice (row_cluster.h), which reads a row's logits
// twice; a thread holds its four best in registers, so that nearly no round of the selection computes scores again.
//
// Floor of a choice: 8 V bytes a row, from L2, and V / 4 Philox blocks for noisy rows.
#include <climits>

#include "kernels/cuda/draft_kernels.h"
#include "kernels/cuda/noise.h"
#include "kernels/cuda/pdl.h"
#include "kernels/cuda/row_cluster.h"
#include "kernels/cuda/window_attention.h"

namespace linspec::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xFFFFFFFFu;

__device__ float WarpSum(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

__device__ void StoreBf16(float4 v, uint16_t* out) {
  *reinterpret_cast<uint2*>(out) = make_uint2(RoundToBf16(v.x) | static_cast<uint32_t>(RoundToBf16(v.y)) << 16,
                                              RoundToBf16(v.z) | static_cast<uint32_t>(RoundToBf16(v.w)) << 16);
}

__global__ void __launch_bounds__(kThreads) RoundKernel(const float* x, uint16_t* out, int64_t count) {
  GridLaunchDependents();
  GridWait();
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (i < count) StoreBf16(*reinterpret_cast<const float4*>(x + i), out + i);
}

__global__ void __launch_bounds__(kThreads)
    GatherHiddenKernel(const DraftInput input, float* state, uint16_t* out, int64_t dim) {
  GridLaunchDependents();
  GridWait();
  const float* from = *input.hidden + input.rows[blockIdx.x].hidden_row * dim;
  for (int64_t i = threadIdx.x * 4; i < dim; i += kThreads * 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + i);
    *reinterpret_cast<float4*>(state + blockIdx.x * dim + i) = v;
    StoreBf16(v, out + blockIdx.x * dim + i);
  }
}

__device__ float Silu(float x) { return x / (1.0f + expf(-x)); }

__global__ void __launch_bounds__(kThreads) MedusaBlockKernel(const MedusaBlockParams p) {
  GridLaunchDependents();
  GridWait();
  for (int64_t i = threadIdx.x * 4; i < p.dim; i += kThreads * 4) {
    const int64_t at = blockIdx.x * p.dim + i;
    const float4 y = *reinterpret_cast<const float4*>(p.product + at);
    const float4 b = *reinterpret_cast<const float4*>(p.bias + i);
    float4 x = *reinterpret_cast<const float4*>(p.state + at);
    x = make_float4(x.x + Silu(y.x + b.x), x.y + Silu(y.y + b.y), x.z + Silu(y.z + b.z), x.w + Silu(y.w + b.w));
    *reinterpret_cast<float4*>(p.state + at) = x;
    StoreBf16(x, p.out + at);
  }
}

constexpr int kRivals = 8;  // that the odds of noisy candidates are taken among, at least
constexpr int kMostRivals = LINSPEC_CUDA_MAX_DRAFT_CANDIDATES;

struct ChooseShared {
  RowClusterShared cluster;
  ScoredToken lists[kClusterWarps][kMostRivals];  // the warps' best, then the blocks'
  ScoredToken block_best[kMostRivals];
};
static_assert(kMostClusterBlocks <= kClusterWarps && kMostClusterBlocks * kMostRivals <= kClusterThreads);

// What a row's tokens are chosen by, four tokens at a time: the logits, for a noisy row with the noise.
struct Scores {
  const float* logits;
  int vocab;
  bool noisy;
  float temperature;
  uint64_t seed;
  int64_t position;

  // Beyond the vocabulary there is nobody.
  __device__ float4 Logits(int block) const {
    if (vocab % 4 == 0) return *reinterpret_cast<const float4*>(logits + block * 4);
    const auto at = [&](int i) { return block * 4 + i < vocab ? logits[block * 4 + i] : -INFINITY; };
    return make_float4(at(0), at(1), at(2), at(3));
  }
  __device__ float4 Of(int block) const {
    const float4 v = Logits(block);
    if (!noisy) return v;
    const uint4 bits = NoiseBits(seed, position, block);
    const auto score = [&](float logit, uint32_t word) { return NoisyScore(logit, temperature, RoughGumbel(word)); };
    return make_float4(score(v.x, bits.x), score(v.y, bits.y), score(v.z, bits.z), score(v.w, bits.w));
  }
};

// f(block of four tokens) of this thread's blocks.
template <typename Function>
__device__ void ForMine(const RowCluster& cluster, int vocab, Function f) {
  for (int block = cluster.thread(); block * 4 < vocab; block += cluster.num_threads()) f(block);
}

// A thread's best scores, best first.
struct OwnBest {
  static constexpr int kCount = 4;
  ScoredToken items[kCount] = {Nobody(), Nobody(), Nobody(), Nobody()};

  __device__ void Offer(ScoredToken item) {
    if (!(item.score > -INFINITY)) return;  // NaN too
#pragma unroll
    for (ScoredToken& mine : items) {
      if (!Better(item, mine)) continue;
      const ScoredToken pushed = mine;
      mine = item;
      item = pushed;
    }
  }
  // Four tokens' scores, of those below `below`.
  __device__ void Offer(int block, const float4& scores, const ScoredToken& below) {
    const float values[4] = {scores.x, scores.y, scores.z, scores.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const ScoredToken item{values[i], block * 4 + i};
      if (Better(below, item)) Offer(item);
    }
  }
  __device__ void DropFirst() {
#pragma unroll
    for (int i = 0; i + 1 < kCount; ++i) items[i] = items[i + 1];
    items[kCount - 1] = Nobody();
  }
};

// Merges `num_lists` lists of `count`, best first: out(i, best) for each of the `count` best. By one warp.
template <typename Out>
__device__ void MergeLists(const ScoredToken (&lists)[kClusterWarps][kMostRivals], int num_lists, int count, Out out) {
  const int lane = threadIdx.x % kWarp;
  int next = 0;
  for (int i = 0; i < count; ++i) {
    const ScoredToken mine = lane < num_lists && next < count ? lists[lane][next] : Nobody();
    const ScoredToken best = WarpBest(mine);
    if (best.token == mine.token && best.token != INT_MAX) ++next;
    out(i, best);
  }
}

// The `count` best scores of the row, best first: lane i of the cluster's first warp gets the i-th. Each warp picks its
// own, then the warps' lists are merged, then the blocks'. The thread has left the cluster afterwards.
__device__ ScoredToken SelectBest(const RowCluster& cluster, const Scores& scores, OwnBest mine, int count,
                                  ChooseShared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, i = threadIdx.x % kMostRivals;
  for (int picked = 0; picked < count; ++picked) {
    const ScoredToken best = WarpBest(mine.items[0]);
    if (lane == 0) shared.lists[warp][picked] = best;
    if (best.token != mine.items[0].token || best.token == INT_MAX) continue;
    mine.DropFirst();
    if (mine.items[0].token != INT_MAX) continue;
    ForMine(cluster, scores.vocab, [&](int block) { mine.Offer(block, scores.Of(block), best); });
  }
  __syncthreads();
  if (warp == 0) {
    MergeLists(shared.lists, kClusterWarps, count, [&](int at, const ScoredToken& best) {
      if (lane == 0) shared.block_best[at] = best;
    });
  }
  cluster.Sync();
  ScoredToken own = Nobody();
  if (cluster.rank() == 0) {
    const int block = threadIdx.x / kMostRivals;
    if (block < cluster.size() && i < count) shared.lists[block][i] = cluster.Of(shared.block_best[i], block);
    __syncthreads();
  }
  cluster.Leave();
  if (cluster.rank() == 0 && warp == 0) {
    MergeLists(shared.lists, cluster.size(), count, [&](int at, const ScoredToken& best) {
      if (lane == at) own = best;
    });
  }
  return own;
}

__global__ void __launch_bounds__(kClusterThreads) ChooseDraftKernel(const ChooseDraftParams p) {
  __shared__ ChooseShared shared;
  GridLaunchDependents();
  RowCluster cluster(&shared.cluster);
  const int index = cluster.row(), r = index % p.input.num_rows, lane = threadIdx.x % kWarp;
  const LinspecCudaDraftRow row = p.input.rows[r];  // older than the kernel ahead, whose start waited for it
  GridWait();
  if (p.at_hidden_row && row.hidden_row < 0) {  // padding
    if (cluster.thread() == 0) p.next_tokens[r] = 0;
    return;
  }
  const Scores scores{.logits = p.logits + (p.at_hidden_row ? row.hidden_row : index) * p.vocab,
                      .vocab = static_cast<int>(p.vocab),
                      .noisy = row.coupled != 0 && row.temperature > 0.0f,
                      .temperature = row.temperature,
                      .seed = row.seed,
                      .position = row.position + p.first_level + index / p.input.num_rows};
  const bool noisy = scores.noisy;
  const float scale = row.temperature > 0.0f ? 1.0f / row.temperature : 1.0f;
  float max = -INFINITY;
  if (!noisy) {
    ForMine(cluster, scores.vocab, [&](int block) {
      const float4 v = scores.Logits(block);
      max = fmaxf(max, fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)));
    });
    max = cluster.Best({max, 0}).score;
  }
  OwnBest mine;
  float sum = 0.0f;
  ForMine(cluster, scores.vocab, [&](int block) {
    const float4 v = scores.Of(block);
    mine.Offer(block, v, {INFINITY, -1});
    const auto odds = [&](float score) { return score > -INFINITY ? expf((score - max) * scale) : 0.0f; };
    if (!noisy) sum += odds(v.x) + odds(v.y) + odds(v.z) + odds(v.w);
  });
  if (!noisy) sum = static_cast<float>(cluster.Sum(sum));
  const int count = noisy && p.top_k < kRivals ? kRivals : p.top_k;
  const ScoredToken own = SelectBest(cluster, scores, mine, count, shared);
  if (cluster.thread() < kWarp) {
    const bool there = own.token != INT_MAX;
    const float best = __shfl_sync(kAll, own.score, 0);
    const float odds = there ? expf((own.score - best) * scale) : 0.0f;
    if (noisy) sum = WarpSum(odds);
    if (lane < p.top_k) {
      p.candidates[static_cast<int64_t>(index) * p.top_k + lane] = {there ? own.token : -1,
                                                                    there ? fminf(odds / sum, 1.0f) : 0.0f};
    }
    if (lane == 0 && p.next_tokens != nullptr) p.next_tokens[r] = there ? own.token : 0;
  }
  cluster.End();
}

}  // namespace

void LaunchRound(const float* x, uint16_t* out, int64_t count, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((count / 4 + kThreads - 1) / kThreads);
  LaunchOverlapped(RoundKernel, blocks, kThreads, 0, stream, 1, x, out, count);
}

void LaunchGatherHidden(const DraftInput& input, float* state, uint16_t* out, int64_t dim, cudaStream_t stream) {
  LaunchOverlapped(GatherHiddenKernel, input.num_rows, kThreads, 0, stream, 1, input, state, out, dim);
}

void LaunchMedusaBlock(const MedusaBlockParams& params, int rows, cudaStream_t stream) {
  LaunchOverlapped(MedusaBlockKernel, rows, kThreads, 0, stream, 1, params);
}

void LaunchChooseDraft(const ChooseDraftParams& params, cudaStream_t stream) {
  const int blocks = ClusterBlocks(params.vocab);
  LaunchOverlapped(ChooseDraftKernel, params.input.num_rows * params.num_levels * blocks, kClusterThreads, 0, stream,
                   blocks, params);
}

}  // namespace linspec::cuda
