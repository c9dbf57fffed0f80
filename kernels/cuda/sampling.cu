// token = argmax_v (logit_v - max) / T + G(seed, position, v) over the tokens that truncation keeps; T = 0: argmax.
//
// One cluster of blocks per row (row_cluster.h); the logits (4 V bytes) are read from L2 once per pass: edits, maximum,
// and the draw; with top_k or top_p a bisection over the 32 bits of an ordered key on top, one pass a bit. Truncated
// sets are prefixes of the order (score descending, id ascending), so a cut (score, id) describes them: min_p, top_k
// and top_p each lower it. Sums are taken per thread over a fixed stride and then in a fixed order, so a row's token
// depends on that row alone.
//
// Floor: 4 V bytes a row, from L2: 128 KB at V = 32,000; 256 rows 33 MB.
#include <climits>

#include "kernels/cuda/noise.h"
#include "kernels/cuda/pdl.h"
#include "kernels/cuda/row_cluster.h"
#include "kernels/cuda/sampling.h"

namespace linspec::cuda {
namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr float kLn2 = 0.69314718f;

// An upper bound without a logarithm, so that few elements need the noise itself.
__device__ float GumbelBound(uint32_t bits) { return static_cast<float>(__clz(bits) + 1) * kLn2 + 1e-4f; }

// One row: scores are (logit - max) / T; kept are those before the cut in the order of Better.
struct Row {
  const float* logits;
  int vocab;
  float max, temperature;
  ScoredToken cut;  // the last one kept

  __device__ ScoredToken At(int v) const { return {(logits[v] - max) / temperature, v}; }
  __device__ bool Kept(const ScoredToken& c) const { return c.score > -INFINITY && !Better(cut, c); }
};

// Weight of a token in what is summed: 1 for top_k, its probability (times the normaliser) for top_p.
__device__ double Weight(bool mass, float score) { return mass ? exp(static_cast<double>(score)) : 1.0; }

// Lowers the cut to the shortest prefix of the kept set whose weight reaches target. Finds the score by bisection over
// its key, then the last id among the equals.
__device__ void Truncate(Row& row, bool mass, double target, RowCluster& cluster) {
  uint32_t low = 0,
           high = OrderedKey(0.0f);  // weight(score > high) < target <= weight(score > low), if anything is cut
  const auto weight_from = [&](uint32_t key) {  // of kept tokens with a key of at least `key`
    double sum = 0;
    for (int v = cluster.thread(); v < row.vocab; v += cluster.num_threads()) {
      const ScoredToken c = row.At(v);
      if (row.Kept(c) && OrderedKey(c.score) >= key) sum += Weight(mass, c.score);
    }
    return cluster.Sum(sum);
  };
  if (weight_from(0) <= target) return;  // everything is needed
  while (low < high) {                   // the largest key whose weight reaches the target
    const uint32_t middle = low + (high - low + 1) / 2;
    if (weight_from(middle) >= target) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const float score = FromOrderedKey(low);
  double left = target - weight_from(low + 1);
  const double each = Weight(mass, score);
  // How many of the equals are needed; they come by ascending id. One warp of each block counts them in order.
  int needed = static_cast<int>(ceil(left / each - 1e-12));
  if (needed < 1) needed = 1;
  __shared__ int last;
  if (threadIdx.x < 32) {
    int seen = 0, at = row.cut.token;
    for (int begin = 0; begin < row.vocab && seen < needed; begin += 32) {
      const int v = begin + static_cast<int>(threadIdx.x);
      bool equal = false;
      if (v < row.vocab) {
        const ScoredToken c = row.At(v);
        equal = c.score == score && row.Kept(c);
      }
      unsigned found = __ballot_sync(kAll, equal);
      const int count = __popc(found);
      if (seen + count >= needed) {
        for (int skip = needed - seen - 1; skip > 0; --skip) found &= found - 1;
        at = begin + __ffs(static_cast<int>(found)) - 1;
      }
      seen += count;
    }
    if (threadIdx.x == 0) last = at;
  }
  __syncthreads();
  row.cut = {score, last};
  __syncthreads();
}

__device__ int Draw(Row row, const LinspecCudaSampling& s, RowCluster& cluster) {
  if (s.min_p > 0.0f) {
    // The cut is the lowest score that reaches log(min_p), all ids; the sampler compares in fp32.
    row.cut = {static_cast<float>(log(static_cast<double>(s.min_p))), INT_MAX};
  }
  if (s.top_k > 0) Truncate(row, false, s.top_k, cluster);
  if (s.top_p < 1.0f) {
    double sum = 0;
    for (int v = cluster.thread(); v < row.vocab; v += cluster.num_threads()) {
      const ScoredToken c = row.At(v);
      if (row.Kept(c)) sum += Weight(true, c.score);
    }
    Truncate(row, true, s.top_p * cluster.Sum(sum), cluster);
  }
  ScoredToken best{-INFINITY, INT_MAX};
  for (int block = cluster.thread(); block * 4 < row.vocab; block += cluster.num_threads()) {
    const uint4 noise = NoiseBits(s.seed, s.position, block);
    const uint32_t words[4] = {noise.x, noise.y, noise.z, noise.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int v = block * 4 + i;
      if (v >= row.vocab) break;
      ScoredToken c = row.At(v);
      if (!row.Kept(c) || c.score + GumbelBound(words[i]) < best.score) continue;
      c.score += GumbelFromBits(words[i]);
      if (Better(c, best)) best = c;
    }
  }
  return cluster.Best(best).token;
}

__device__ void ApplyEdits(float* logits, const LinspecCudaSampling& s, const LinspecCudaLogitEdit* edits,
                           const RowCluster& cluster) {
  for (int i = cluster.thread(); i < s.edits_count; i += cluster.num_threads()) {
    const LinspecCudaLogitEdit edit = edits[s.edits_begin + i];
    float logit = logits[edit.token] + edit.bias;
    logit = logit < 0 ? logit * edit.repetition : logit / edit.repetition;
    logits[edit.token] = logit - edit.subtract;
  }
}

__global__ void __launch_bounds__(kClusterThreads) SampleKernel(const SampleParams p) {
  __shared__ RowClusterShared shared;
  GridLaunchDependents();
  GridWait();
  RowCluster cluster(&shared);
  const LinspecCudaSampling s = p.sampling[cluster.row()];
  float* logits = p.logits + cluster.row() * p.vocab;
  if (s.edits_count > 0) {
    ApplyEdits(logits, s, *p.edits, cluster);
    cluster.Sync();
  }
  const int vocab = static_cast<int>(p.vocab);
  ScoredToken max = Nobody();
  for (int v = cluster.thread(); v < vocab; v += cluster.num_threads()) {
    // A NaN is as bad as an infinite logit, and the maximum finds it.
    const ScoredToken c{isnan(logits[v]) ? INFINITY : logits[v], v};
    if (Better(c, max)) max = c;
  }
  max = cluster.Best(max);
  int token = -1;
  if (isfinite(max.score)) {
    token = max.token;
    if (s.temperature != 0.0f) token = Draw({logits, vocab, max.score, s.temperature, Nobody()}, s, cluster);
  }
  if (cluster.thread() == 0) p.sampled[cluster.row()] = token;
  cluster.Sync();
}

}  // namespace

void LaunchSample(const SampleParams& params, int rows, cudaStream_t stream) {
  const int blocks = ClusterBlocks(params.vocab);
  LaunchOverlapped(SampleKernel, rows * blocks, kClusterThreads, 0, stream, blocks, params);
}

}  // namespace linspec::cuda
