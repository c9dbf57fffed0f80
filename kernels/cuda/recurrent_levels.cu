// All levels of few rows of the recurrent draft head in one cooperative launch: a block a multiprocessor, its tiles of
// gate_up, down and lm_head in shared memory from the first level to the last. What a level computes is small; what
// counts is how often all blocks wait for some (letters.h), three times:
//
//   norms of the input, gate_up, SiLU -> letters of M values -> down, added to the state -> letters of D values
//     -> lm_head, noise -> letters of each block's best token -> the next level
//
// Each level has its own letters, so none is overwritten in its call; the number of the call is read from memory, so
// that a graph can be replayed.
//
// Floor of a level: three exchanges of 0.8 us, each a store and a load through the L2 and the slowest of all blocks,
// and lm_head from shared memory (32 KB a block in 8 bits, 0.2 us); of a call: 5.5 MB of weights in 8 bits to shared
// memory, 2 us. Measured with the bundled head's sizes in int8 on an H200, graphs of this launch: 6.7 us a level and
// 5.7 a call for one row, 7.7 and 5.8 for four, 8.5 and 6.1 for eight. By the chip's clock a level is 1.5 us until
// the best token is there, 0.9 for each of the other letters, 0.4 for the embedding, 0.25 for norms, 0.45, 0.4 and
// 0.7 for the three products and 0.8 for what ends them. That is latency: what does not change from level to level is
// in registers, and loads are asked for together, which made 9.1 us 6.7. Tried without effect: 8-bit weights widened
// once a call (4 us more a call), fetching the embeddings of the blocks' best tokens into the L2.
#include <algorithm>
#include <climits>
#include <type_traits>
#include <utility>

#include "kernels/cuda/embedding.h"
#include "kernels/cuda/letters.h"
#include "kernels/cuda/noise.h"
#include "kernels/cuda/pdl.h"
#include "kernels/cuda/recurrent.h"
#include "kernels/cuda/recurrent_norm.h"
#include "kernels/cuda/resident_tiles.h"
#include "kernels/cuda/row_cluster.h"
#include "kernels/cuda/tensor_core.h"

namespace linspec::cuda {
namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kWarps = kSplit, kLevelThreads = kWarps * kWarpSize;
constexpr int kMostDim = kNormVectors * kWarpSize * 4;  // which a warp holds
constexpr int kTilesAtOnce = 4;                         // of lm_head
constexpr int kMostBlocks = 8 * kWarpSize;
constexpr int kReservedBytes = 8192;  // of shared memory: variables of the kernel, and the system's

struct Letters {        // of one level
  uint64_t* activated;  // [kMostLevelsRows, M / 2] two of bf16
  uint64_t* rounded;    // [kMostLevelsRows, D / 2] the state, two of bf16
  uint64_t* state;      // [kMostLevelsRows, D] fp32
  uint64_t* best;       // [kMostLevelsRows, blocks] pairs of score and token

  static __host__ __device__ int64_t Count(const RecurrentLevelsParams& p, int blocks) {
    return kMostLevelsRows * (p.down.cols / 2 + p.down.rows / 2 + p.down.rows + 2 * blocks);
  }
  __device__ explicit Letters(const RecurrentLevelsParams& p)
      : activated(p.mail),
        rounded(activated + kMostLevelsRows * p.down.cols / 2),
        state(rounded + kMostLevelsRows * p.down.rows / 2),
        best(state + kMostLevelsRows * p.down.rows) {}
  __device__ void Advance(int64_t count) { activated += count, rounded += count, state += count, best += count; }
};

struct Shared {
  LinspecCudaDraftRow rows[kMostLevelsRows];
  const float* hidden;
  uint32_t call;
  float scores[kMostLevelsRows][kMostResidentTiles * kTileRows];  // of the block's tokens
};

// A block of the launch. Lanes end sums of tokens 2 s and 2 s + 1 of gemm_tile.h, which are rows of the draft here.
// kVectors: of the state, up to kNormVectors.
template <int kType, int kVectors>
struct LevelsBlock {
  const RecurrentLevelsParams& p;
  const RecurrentLevelsPlan& plan;
  uint8_t* const memory;
  Shared& shared;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, g = lane / 4, s = lane % 4;
  const int rows = p.input.num_rows, dim = static_cast<int>(p.down.rows), inner = static_cast<int>(p.down.cols);
  // The blocks of down are the last ones, those of gate_up the first: most have one of them at most.
  const ResidentTiles<kType> gate_up{p.gate_up, plan.gate_up, static_cast<int>(blockIdx.x), memory};
  const ResidentTiles<kType> down{p.down, plan.down, static_cast<int>(gridDim.x - 1 - blockIdx.x), memory};
  const ResidentTiles<kType> lm_head{p.lm_head, plan.lm_head, static_cast<int>(blockIdx.x), memory};
  uint8_t* const input = memory + plan.input;  // [kMostLevelsRows, 2 D]
  uint8_t* const x = memory + plan.x;          // [kMostLevelsRows, M or D]
  float4* const partial = reinterpret_cast<float4*>(memory + plan.partial);
  Letters letters{p}, before{p};  // of this level and the one before
  float* logits = p.logits;       // of this level
  const float* hidden = nullptr;  // the target's
  uint32_t call = 0;
  float temperatures[2] = {};  // of a lane's rows, 0 without noise
  float state[4] = {};         // of the warps that end a tile of down, their part of it
  float noise[4] = {};         // of those that end a tile of lm_head

  // Of sum i of a lane.
  __device__ int Row(int i) const { return 2 * s + i % 2; }
  __device__ const float4* Hidden(int row) const {
    return reinterpret_cast<const float4*>(hidden + int64_t{shared.rows[row].hidden_row} * dim);
  }

  __device__ void Begin() {
    if (threadIdx.x < rows) shared.rows[threadIdx.x] = p.input.rows[threadIdx.x];
    if (threadIdx.x == 0) shared.hidden = *p.input.hidden, shared.call = *p.call;
    __syncthreads();
    hidden = shared.hidden, call = shared.call;
    for (int i = 0; i < 4; ++i) {
      if (Row(i) >= rows) continue;
      const LinspecCudaDraftRow& row = shared.rows[Row(i)];
      if (row.coupled != 0) temperatures[i % 2] = fmaxf(row.temperature, 0.0f);
      if (warp < down.count) state[i] = reinterpret_cast<const float*>(Hidden(Row(i)))[down.row + i / 2 * 8];
    }
  }
  __device__ void EndLevel() {
    before = letters;
    letters.Advance(Letters::Count(p, static_cast<int>(gridDim.x)));
    logits += rows * p.lm_head.rows;
  }

  // The best token of the level before, by a warp.
  __device__ int BestToken(int row) const {
    ScoredToken best = Nobody();
    const auto blocks = static_cast<int>(gridDim.x);
    const uint64_t* mine = before.best + 2 * (row * blocks + lane);
    Collect<kMostBlocks / kWarpSize>((blocks - lane + kWarpSize - 1) / kWarpSize, call,
                                     [&](int u) { return mine + 2 * u * kWarpSize; },
                                     [&](int, uint32_t score, uint32_t token) {
                                       const ScoredToken other{__uint_as_float(score), static_cast<int>(token)};
                                       if (Better(other, best)) best = other;
                                     });
    best = WarpBest(best);
    return best.token == INT_MAX ? 0 : best.token;
  }

  // A lane's vectors of a row, all loads at once.
  template <typename From, typename Widen>
  __device__ void ReadVectors(From from, Widen widen, float4 (&values)[kVectors]) const {
    std::decay_t<decltype(from[0])> raw[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) raw[v] = from[min(v * kWarpSize + lane, dim / 4 - 1)];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) values[v] = v * kWarpSize + lane < dim / 4 ? widen(raw[v]) : float4{};
  }
  __device__ void CollectState(int row, float4 (&values)[kVectors]) const {
    const int pairs = (dim - 4 * lane + kWarpSize * 4 - 1) / (kWarpSize * 4) * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float4* to = values + half * kVectors / 2;
      const uint64_t* from = before.state + row * dim + (half * kVectors / 2 * kWarpSize + lane) * 4;
      Collect<kVectors>(
          pairs - half * kVectors, call, [&](int u) { return from + u / 2 * kWarpSize * 4 + u % 2 * 2; },
          [&](int u, uint32_t a, uint32_t b) {
            (u % 2 == 0 ? to[u / 2].x : to[u / 2].z) = __uint_as_float(a);
            (u % 2 == 0 ? to[u / 2].y : to[u / 2].w) = __uint_as_float(b);
          });
    }
  }

  // A half of a row's input by each warp.
  __device__ void MakeInput(int level) const {
    for (int half = warp; half < 2 * rows; half += kWarps) {
      const int row = half < rows ? half : half - rows;
      const bool of_token = half >= rows;
      const auto* norm = reinterpret_cast<const float4*>(of_token ? p.token_norm : p.state_norm);
      float4 weights[kVectors], values[kVectors] = {};
      if (of_token) {
        const int token = level == 0 ? shared.rows[row].token : BestToken(row);
        ReadEmbedding(p.embedding, token, [&](auto from, auto widen) { ReadVectors(from, widen, values); });
      } else if (level == 0) {
        ReadVectors(Hidden(row), [](const float4& v) { return v; }, values);
      } else {
        CollectState(row, values);
      }
      ReadVectors(norm, [](const float4& v) { return v; }, weights);
      float squares = 0.0f;
#pragma unroll
      for (const float4& v : values) squares += Squares(v);
      const float scale = InverseRmsOf(AddLanes(squares), 1.0f / static_cast<float>(dim), p.eps);
      auto* to = reinterpret_cast<uint2*>(input + row * plan.input_pitch + (of_token ? 2 * dim : 0)) + lane;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v * kWarpSize + lane < dim / 4) to[v * kWarpSize] = Normed(values[v], scale, weights[v]);
      }
    }
  }

  // Letters of bf16 values [rows, 4 * pairs] into x, by the block.
  __device__ void CollectRows(const uint64_t* from, int pairs) const {
    for (auto pair = static_cast<int>(threadIdx.x); pair < pairs; pair += kLevelThreads) {
      Collect<kMostLevelsRows>(
          rows, call, [&](int row) { return from + 2 * (row * pairs + pair); },
          [&](int row, uint32_t a, uint32_t b) { reinterpret_cast<uint2*>(x + row * plan.x_pitch)[pair] = {a, b}; });
    }
  }

  // Posts bf16 values of rows g and g + 1 of a tile as a letter.
  __device__ void PostRounded(uint64_t* to, int i, float value) const {
    const uint32_t mine = Bf16Bits(value), next = __shfl_down_sync(kAll, mine, 4);
    if (g % 2 == 0 && Row(i) < rows) Post(to, Letter(mine | next << 16, call));
  }

  __device__ void GateUp(int level) const {
    if (gate_up.count == 0) return;
    MakeInput(level);
    WaitCopies<2>();
    __syncthreads();
    gate_up.template Multiply<1>(input, plan.input_pitch, rows, partial, plan.lm_head.tiles);
    __syncthreads();
    if (warp >= gate_up.count) return;
    float y[4];
    gate_up.End(partial, plan.lm_head.tiles, rows, y);
    uint64_t* to = letters.activated + ((gate_up.first + warp) * 8 + g) / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) PostRounded(to + Row(i) * inner / 2, i, Silu(y[i]) * y[2 + i]);
  }

  __device__ void Down() {
    if (down.count == 0) return;
    CollectRows(letters.activated, inner / 4);
    WaitCopies<1>();
    __syncthreads();
    down.template Multiply<1>(x, plan.x_pitch, rows, partial, plan.lm_head.tiles);
    __syncthreads();
    if (warp >= down.count) return;
    float y[4];
    down.End(partial, plan.lm_head.tiles, rows, y);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      state[i] += y[i];
      PostRounded(letters.rounded + (Row(i) * dim + down.row + i / 2 * 8) / 2, i, state[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (Row(i) >= rows) continue;
      Post(letters.state + Row(i) * dim + down.row + i / 2 * 8, Letter(__float_as_uint(state[i]), call));
    }
  }

  // While nobody waits for this block.
  __device__ void DrawNoise(int level) {
    if (warp >= lm_head.count) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (temperatures[i % 2] == 0.0f) continue;
      const LinspecCudaDraftRow& row = shared.rows[Row(i)];
      const int token = lm_head.row + i / 2 * 8;
      const uint4 bits = NoiseBits(row.seed, row.position + level, token / 4);
      noise[i] = RoughGumbel(token % 4 < 2 ? (token % 2 == 0 ? bits.x : bits.y) : (token % 2 == 0 ? bits.z : bits.w));
    }
  }

  // The warp's tile of logits and scores.
  __device__ void EndTile() const {
    float sums[4];
    lm_head.End(partial, plan.lm_head.tiles, rows, sums);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = lm_head.row + i / 2 * 8;
      if (Row(i) >= rows) continue;
      const bool there = token < p.lm_head.rows;
      const float score = NoisyScore(sums[i], temperatures[i % 2], noise[i]);
      shared.scores[Row(i)][warp * kTileRows + g + i / 2 * 8] = there && score > -INFINITY ? score : -INFINITY;
      if (there) logits[Row(i) * p.lm_head.rows + token] = sums[i];
    }
  }

  // The block's best of a row, by a warp.
  __device__ void PostBest(int row) const {
    ScoredToken best = Nobody();
#pragma unroll
    for (int i = 0; i < kMostResidentTiles * kTileRows / kWarpSize; ++i) {
      const int at = i * kWarpSize + lane;
      const float score = at < lm_head.count * kTileRows ? shared.scores[row][at] : -INFINITY;
      if (score > best.score) best = {score, lm_head.first * kTileRows + at};
    }
    best = WarpBest(best);
    if (lane == 0) {
      PostPair(letters.best + 2 * (row * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)),
               Letter(__float_as_uint(best.score), call), Letter(static_cast<uint32_t>(best.token), call));
    }
  }

  __device__ void Unembed() const {
    CollectRows(letters.rounded, dim / 4);
    WaitCopies<0>();
    __syncthreads();
    lm_head.template Multiply<kTilesAtOnce>(x, plan.x_pitch, rows, partial, plan.lm_head.tiles);
    __syncthreads();
    if (warp < lm_head.count) EndTile();
    __syncthreads();
    if (warp < rows) PostBest(warp);
  }
};

template <int kType, int kVectors>
__global__ void __launch_bounds__(kLevelThreads, 1)
    RecurrentLevelsKernel(const __grid_constant__ RecurrentLevelsParams p,
                          const __grid_constant__ RecurrentLevelsPlan plan) {
  extern __shared__ uint4 memory[];
  __shared__ Shared shared;
  GridLaunchDependents();
  LevelsBlock<kType, kVectors> block{
      .p = p, .plan = plan, .memory = reinterpret_cast<uint8_t*>(memory), .shared = shared};
  GridWait();
  block.Begin();
  for (int level = 0; level < p.num_levels; ++level) {
    block.GateUp(level);
    block.DrawNoise(level);
    block.Down();
    block.Unembed();
    block.EndLevel();
  }
}

using LevelsKernel = void (*)(RecurrentLevelsParams, RecurrentLevelsPlan);
template <int kType>
LevelsKernel KernelOf(int64_t dim) {
  constexpr int kFew = kNormVectors / 2;
  return dim <= kMostDim / 2 ? &RecurrentLevelsKernel<kType, kFew> : &RecurrentLevelsKernel<kType, kNormVectors>;
}
LevelsKernel KernelOf(const LinspecCudaMatrix& lm_head) {
  switch (lm_head.type) {
    case kLinspecCudaBf16:
      return KernelOf<kLinspecCudaBf16>(lm_head.cols);
    case kLinspecCudaI8:
      return KernelOf<kLinspecCudaI8>(lm_head.cols);
    case kLinspecCudaFp8:
      return KernelOf<kLinspecCudaFp8>(lm_head.cols);
    default:
      return nullptr;
  }
}

}  // namespace

RecurrentLevelsPlan PlanRecurrentLevels(const RecurrentLevelsParams& p) {
  const Device& device = CurrentDevice();
  const LevelsKernel kernel = KernelOf(p.lm_head);
  const bool one_type = p.gate_up.type == p.lm_head.type && p.down.type == p.lm_head.type;
  if (device.major < 9 || kernel == nullptr || !one_type || p.lm_head.cols > kMostDim) return {};
  const auto tiles = [](const LinspecCudaMatrix& w) { return static_cast<int>((w.rows + kTileRows - 1) / kTileRows); };
  const auto share = [](int count, int blocks) { return (count + blocks - 1) / blocks; };
  const int lm_blocks = share(tiles(p.lm_head), share(tiles(p.lm_head), device.processors));
  const int blocks = std::max({lm_blocks, tiles(p.gate_up), tiles(p.down)});
  if (blocks > std::min(device.processors, kMostBlocks)) return {};
  RecurrentLevelsPlan plan{};
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    return static_cast<int>(std::exchange(end, end + (bytes + 127) / 128 * 128));
  };
  const bool bf16 = p.lm_head.type == kLinspecCudaBf16;
  const auto keep = [&](const LinspecCudaMatrix& w) {
    const int count = share(tiles(w), blocks), pitch = ResidentPitch(w.cols * (bf16 ? 2 : 1));
    return ResidentPlan{count, pitch, take(int64_t{count} * kTileRows * pitch)};
  };
  plan.gate_up = keep(p.gate_up), plan.down = keep(p.down), plan.lm_head = keep(p.lm_head);
  plan.input_pitch = TokenPitch(p.gate_up.cols, bf16);
  plan.x_pitch = TokenPitch(std::max(p.down.cols, p.lm_head.cols), bf16);
  plan.input = take(int64_t{kMostLevelsRows} * plan.input_pitch);
  plan.x = take(int64_t{kMostLevelsRows} * plan.x_pitch);
  plan.partial = take(int64_t{kSplit} * plan.lm_head.tiles * kWarpSize * int64_t{sizeof(float4)});
  plan.mail_bytes = Letters::Count(p, blocks) * LINSPEC_CUDA_MAX_DRAFT_LEVELS * int64_t{sizeof(uint64_t)};
  const int most = device.shared_per_block - kReservedBytes;
  if (plan.lm_head.tiles > kMostResidentTiles || end > most) return {};
  plan.shared_bytes = static_cast<int>(end);
  // The same for every shape: heads of several shapes share the kernel.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  plan.blocks = blocks;
  return plan;
}

void LaunchRecurrentLevels(const RecurrentLevelsParams& params, const RecurrentLevelsPlan& plan, cudaStream_t stream) {
  cudaLaunchAttribute attributes[1] = {};
  attributes[0].id = cudaLaunchAttributeCooperative;  // all blocks run at once, or the launch fails
  attributes[0].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = plan.blocks;
  config.blockDim = kLevelThreads;
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, KernelOf(params.lm_head), params, plan);
}

}  // namespace linspec::cuda
