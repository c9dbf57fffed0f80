// token = argmax_v (logit_v - max) / T + G(seed, position, v) over the tokens that truncation keeps; T = 0: argmax.
//
// One block per row; the logits (4 V bytes) are read from L2 once per pass: edits, maximum, and the draw; with top_k or
// top_p a bisection over the 32 bits of an ordered key on top, one pass a bit. Truncated sets are prefixes of the order
// (score descending, id ascending), so a cut (score, id) describes them: min_p, top_k and top_p each lower it.
// Sums are taken per thread over a fixed stride and then over a fixed tree, so a row's token depends on that row alone.
//
// Floor: 4 V bytes a row, from L2: 128 KB at V = 32,000; 256 rows 33 MB.
#include <cfloat>
#include <climits>

#include "kernels/cuda/noise.h"
#include "kernels/cuda/pdl.h"
#include "kernels/cuda/sampling.h"

namespace linspec::cuda {
namespace {

constexpr int kSampleThreads = 512;
constexpr int kWarps = kSampleThreads / 32;
constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr float kLn2 = 0.69314718f;

// An upper bound without a logarithm, so that few elements need the noise itself.
__device__ float GumbelBound(uint32_t bits) { return static_cast<float>(__clz(bits) + 1) * kLn2 + 1e-4f; }

struct RowShared {
  ScoredToken best[kWarps];
  double sums[kWarps];
};

__device__ ScoredToken BlockBest(ScoredToken mine, RowShared& shared) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const ScoredToken other{__shfl_xor_sync(kAll, mine.score, offset), __shfl_xor_sync(kAll, mine.token, offset)};
    if (Better(other, mine)) mine = other;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.best[threadIdx.x / 32] = mine;
  __syncthreads();
  ScoredToken best = shared.best[0];
  for (int i = 1; i < kWarps; ++i) {
    if (Better(shared.best[i], best)) best = shared.best[i];
  }
  return best;
}

__device__ double BlockSum(double mine, RowShared& shared) {
  for (int offset = 16; offset > 0; offset /= 2) mine += __shfl_xor_sync(kAll, mine, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = mine;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += shared.sums[i];
  return sum;
}

// Larger floats have larger keys.
__device__ uint32_t OrderedKey(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ float FromOrderedKey(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key); }

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
__device__ void Truncate(Row& row, bool mass, double target, RowShared& shared) {
  uint32_t low = 0,
           high = OrderedKey(0.0f);  // weight(score > high) < target <= weight(score > low), if anything is cut
  const auto weight_from = [&](uint32_t key) {  // of kept tokens with a key of at least `key`
    double sum = 0;
    for (int v = threadIdx.x; v < row.vocab; v += kSampleThreads) {
      const ScoredToken c = row.At(v);
      if (row.Kept(c) && OrderedKey(c.score) >= key) sum += Weight(mass, c.score);
    }
    return BlockSum(sum, shared);
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
  // How many of the equals are needed; they come by ascending id. One warp counts them in order.
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

__device__ int Draw(Row row, const LinspecCudaSampling& s, RowShared& shared) {
  if (s.min_p > 0.0f) {
    // The cut is the lowest score that reaches log(min_p), all ids; the sampler compares in fp32.
    row.cut = {static_cast<float>(log(static_cast<double>(s.min_p))), INT_MAX};
  }
  if (s.top_k > 0) Truncate(row, false, s.top_k, shared);
  if (s.top_p < 1.0f) {
    double sum = 0;
    for (int v = threadIdx.x; v < row.vocab; v += kSampleThreads) {
      const ScoredToken c = row.At(v);
      if (row.Kept(c)) sum += Weight(true, c.score);
    }
    Truncate(row, true, s.top_p * BlockSum(sum, shared), shared);
  }
  ScoredToken best{-INFINITY, INT_MAX};
  for (int block = threadIdx.x; block * 4 < row.vocab; block += kSampleThreads) {
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
  return BlockBest(best, shared).token;
}

__device__ void ApplyEdits(float* logits, const LinspecCudaSampling& s, const LinspecCudaLogitEdit* edits) {
  for (int i = threadIdx.x; i < s.edits_count; i += kSampleThreads) {
    const LinspecCudaLogitEdit edit = edits[s.edits_begin + i];
    float logit = logits[edit.token] + edit.bias;
    logit = logit < 0 ? logit * edit.repetition : logit / edit.repetition;
    logits[edit.token] = logit - edit.subtract;
  }
}

__global__ void __launch_bounds__(kSampleThreads) SampleKernel(const SampleParams p) {
  __shared__ RowShared shared;
  GridLaunchDependents();
  GridWait();
  const LinspecCudaSampling s = p.sampling[blockIdx.x];
  float* logits = p.logits + blockIdx.x * p.vocab;
  if (s.edits_count > 0) {
    ApplyEdits(logits, s, *p.edits);
    __syncthreads();
  }
  const int vocab = static_cast<int>(p.vocab);
  ScoredToken max{-INFINITY, INT_MAX};
  bool bad = false;
  for (int v = threadIdx.x; v < vocab; v += kSampleThreads) {
    const ScoredToken c{logits[v], v};
    bad |= isnan(c.score);
    if (c.score > max.score || (c.score == max.score && c.token < max.token)) max = c;
  }
  max = BlockBest(max, shared);
  bad = __syncthreads_or(bad || !isfinite(max.score));
  int token = -1;
  if (!bad) {
    token = max.token;
    if (s.temperature != 0.0f) token = Draw({logits, vocab, max.score, s.temperature, {-INFINITY, INT_MAX}}, s, shared);
  }
  if (threadIdx.x == 0) p.sampled[blockIdx.x] = token;
}

}  // namespace

void LaunchSample(const SampleParams& params, int rows, cudaStream_t stream) {
  LaunchOverlapped(SampleKernel, rows, kSampleThreads, 0, stream, 1, params);
}

}  // namespace linspec::cuda
