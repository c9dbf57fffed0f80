// Draft heads: a block per row. The choice keeps a row's scores in the L1 / L2 (4 V bytes are written once and read
// about twice); of 32 values a lane holds its two best in registers, so that most rounds of the selection read nothing.
//
// Floor of a choice: 12 V bytes a row, from L2, and V / 4 Philox blocks for noisy rows.
#include <climits>

#include "kernels/cuda/draft_kernels.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/noise.h"
#include "kernels/cuda/pdl.h"
#include "kernels/cuda/window_attention.h"

namespace linspec::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xFFFFFFFFu;

__device__ float2 WarpSum(float2 value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value.x += __shfl_xor_sync(kAll, value.x, offset);
    value.y += __shfl_xor_sync(kAll, value.y, offset);
  }
  return value;
}

__global__ void __launch_bounds__(kThreads) RecurrentInputKernel(const RecurrentInputParams p) {
  __shared__ float2 warps[kThreads / kWarp];
  GridLaunchDependents();
  GridWait();
  const LinspecCudaDraftRow row = p.input.rows[blockIdx.x];
  const int64_t dim = p.embedding.cols, token = p.tokens == nullptr ? row.token : p.tokens[blockIdx.x];
  float* state = p.state + blockIdx.x * dim;
  const float* from = p.tokens == nullptr ? *p.input.hidden + row.hidden_row * dim : state;
  float2 squares{};  // of state and embedding
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) {
    const float s = from[i], e = EmbeddingValue(p.embedding, token, i);
    squares.x = fmaf(s, s, squares.x);
    squares.y = fmaf(e, e, squares.y);
  }
  squares = WarpSum(squares);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = squares;
  __syncthreads();
  squares = {};
  for (const float2 warp : warps) squares = make_float2(squares.x + warp.x, squares.y + warp.y);
  const float state_scale = 1.0f / sqrtf(squares.x / static_cast<float>(dim) + p.eps);
  const float token_scale = 1.0f / sqrtf(squares.y / static_cast<float>(dim) + p.eps);
  uint16_t* out = p.out + blockIdx.x * 2 * dim;
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) {
    const float s = from[i], e = EmbeddingValue(p.embedding, token, i);
    if (p.tokens == nullptr) state[i] = s;
    out[i] = RoundToBf16(s * state_scale * p.state_norm[i]);
    out[dim + i] = RoundToBf16(e * token_scale * p.token_norm[i]);
  }
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

constexpr int kChooseThreads = 512;
constexpr int kChooseWarps = kChooseThreads / kWarp;
constexpr int kRivals = 8;  // that the odds of noisy candidates are taken among, at least
constexpr int kMostRivals = LINSPEC_CUDA_MAX_DRAFT_CANDIDATES;
constexpr ScoredToken kNobody{-INFINITY, INT_MAX};

__device__ ScoredToken WarpBest(ScoredToken mine) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const ScoredToken other{__shfl_xor_sync(kAll, mine.score, offset), __shfl_xor_sync(kAll, mine.token, offset)};
    if (Better(other, mine)) mine = other;
  }
  return mine;
}

struct ChooseShared {
  ScoredToken best[kChooseWarps][kMostRivals];
  float values[kChooseWarps];
};

__device__ float BlockMax(float value, ChooseShared& shared) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(kAll, value, offset));
  if (threadIdx.x % kWarp == 0) shared.values[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (const float other : shared.values) value = fmaxf(value, other);
  __syncthreads();
  return value;
}

__device__ float BlockSum(float value, ChooseShared& shared) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  if (threadIdx.x % kWarp == 0) shared.values[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
  for (const float other : shared.values) sum += other;
  __syncthreads();
  return sum;
}

// Blocks of four tokens from this thread's first on: token -> f(token, index in the block of four).
template <typename Function>
__device__ void ForMyBlocks(int vocab, Function f) {
  for (int block = threadIdx.x; block * 4 < vocab; block += kChooseThreads) f(block);
}

// A thread's two best scores below `below`, best first.
struct TwoBest {
  ScoredToken first = kNobody, second = kNobody;

  __device__ void Offer(const ScoredToken& item) {
    if (!(item.score > -INFINITY)) return;  // NaN too
    if (Better(item, first)) {
      second = first;
      first = item;
    } else if (Better(item, second)) {
      second = item;
    }
  }
  __device__ void Scan(const float* scores, int vocab, const ScoredToken& below) {
    ForMyBlocks(vocab, [&](int block) {
      for (int v = block * 4; v < min(block * 4 + 4, vocab); ++v) {
        const ScoredToken item{scores[v], v};
        if (Better(below, item)) Offer(item);
      }
    });
  }
};

// The `count` best scores of the row, best first, to out (by the first warp). Each warp picks its own, then the first
// warp merges the lists.
__device__ void SelectBest(const float* scores, int vocab, TwoBest mine, int count, ChooseShared& shared,
                           ScoredToken* out) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int i = 0; i < count; ++i) {
    const ScoredToken best = WarpBest(mine.first);
    if (lane == 0) shared.best[warp][i] = best;
    if (best.token != mine.first.token || best.token == INT_MAX) continue;
    mine.first = mine.second;
    mine.second = kNobody;
    if (mine.first.token == INT_MAX) mine.Scan(scores, vocab, best);
  }
  __syncthreads();
  if (warp != 0) return;
  int next = 0;  // of the list of warp `lane`
  for (int i = 0; i < count; ++i) {
    const ScoredToken head = lane < kChooseWarps && next < count ? shared.best[lane][next] : kNobody;
    const ScoredToken best = WarpBest(head);
    if (best.token == head.token) ++next;
    out[i] = best;
  }
}

__global__ void __launch_bounds__(kChooseThreads) ChooseDraftKernel(const ChooseDraftParams p) {
  __shared__ ChooseShared shared;
  GridLaunchDependents();
  GridWait();
  const int r = static_cast<int>(blockIdx.x) % p.input.num_rows, vocab = static_cast<int>(p.vocab);
  const LinspecCudaDraftRow row = p.input.rows[r];
  const int64_t position = row.position + p.first_level + static_cast<int>(blockIdx.x) / p.input.num_rows;
  if (p.at_hidden_row && row.hidden_row < 0) {  // padding
    if (threadIdx.x == 0) p.next_tokens[r] = 0;
    return;
  }
  float* scores = p.logits + (p.at_hidden_row ? row.hidden_row : blockIdx.x) * p.vocab;
  const bool noisy = row.coupled != 0 && row.temperature > 0.0f;
  const float scale = !noisy && row.temperature > 0.0f ? 1.0f / row.temperature : 1.0f;
  float max = -INFINITY;
  ForMyBlocks(vocab, [&](int block) {
    for (int v = block * 4; v < min(block * 4 + 4, vocab); ++v) max = fmaxf(max, scores[v]);
  });
  max = BlockMax(max, shared);
  TwoBest mine;
  float sum = 0.0f;
  ForMyBlocks(vocab, [&](int block) {
    uint32_t words[4] = {};
    if (noisy) {
      const uint4 bits = NoiseBits(row.seed, position, block);
      words[0] = bits.x, words[1] = bits.y, words[2] = bits.z, words[3] = bits.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int v = block * 4 + i;
      if (v >= vocab) break;
      ScoredToken item{scores[v], v};
      if (noisy) {
        item.score = (item.score - max) / row.temperature + RoughGumbel(words[i]);
        scores[v] = item.score;
      } else if (item.score > -INFINITY) {
        sum += expf((item.score - max) * scale);
      }
      mine.Offer(item);
    }
  });
  if (!noisy) sum = BlockSum(sum, shared);
  const int count = noisy && p.top_k < kRivals ? kRivals : p.top_k;
  ScoredToken best[kMostRivals];
  SelectBest(scores, vocab, mine, count, shared, best);
  if (threadIdx.x != 0) return;
  if (noisy) {
    for (int i = 0; i < count; ++i) sum += best[i].token != INT_MAX ? expf(best[i].score - best[0].score) : 0.0f;
  }
  for (int i = 0; i < p.top_k; ++i) {
    const bool there = best[i].token != INT_MAX;
    p.candidates[static_cast<int64_t>(blockIdx.x) * p.top_k + i] = {
        there ? best[i].token : -1, there ? fminf(expf((best[i].score - best[0].score) * scale) / sum, 1.0f) : 0.0f};
  }
  if (p.next_tokens != nullptr) p.next_tokens[r] = best[0].token != INT_MAX ? best[0].token : 0;
}

}  // namespace

void LaunchRecurrentInput(const RecurrentInputParams& params, cudaStream_t stream) {
  LaunchOverlapped(RecurrentInputKernel, params.input.num_rows, kThreads, 0, stream, 1, params);
}

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
  LaunchOverlapped(ChooseDraftKernel, params.input.num_rows * params.num_levels, kChooseThreads, 0, stream, 1, params);
}

}  // namespace linspec::cuda
