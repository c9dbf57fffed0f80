// Up to 8 tokens: weights reach shared memory by the bulk copy engine, so that loads never wait for the arithmetic.
//
// The 8 warps of a block are the kSplit ranges of k of one tile of 16 weight rows. Each warp has its own ring of slots
// (16 rows by up to 8 steps, 512 consecutive bytes of each row) with one mbarrier each: 16 lanes order one copy per row,
// all multiply, and the slot is ordered again for a later tile; warps meet only where the ranges of a finished tile are
// added, in order. x's slice of a range stays in the warp's shared memory for the whole launch. The rings are filled
// before the kernel ahead has ended (pdl.h).
//
// Rows of a slot, and tokens, are padded so that 8 lanes reading 16 bytes each (two rows, four slices) meet 32 banks.
//
// RMSNorms can ride along on both sides (launch.h): the warp that adds the ranges of a tile leaves its sums of squares.
// With 8-bit weights that is faster (a step of one request on an H200 in fp8 2.53 ms for 2.61), in bf16 it was slower
// (3.82 for 3.73): every warp reads all parts of the squares.
//
// All products of a 7B step, share of the read bandwidth measured in the same run (2026-11-27; more: docs/cuda.md):
//   rows             1       2
//   bf16, H200      90 %    86 %
//   bf16, H100      97      96
//   fp8,  H200      70      70
//   fp8,  H100      83      82
//   int8, H100      83      82
// Rejected: 256-byte pieces of a row (75 %); 128-byte TMA boxes (78 %) and 512-byte ones (91 % at best, 77 % at
// 4096 x 4096); cp.async into per-lane slots (76 %); loads into registers one step ahead (57 %: they share scoreboards);
// ranges spread over a cluster and added through distributed shared memory (69 %); weights fetched into the L2 ahead:
// the launch's own (5 points worse), or 4 to 32 MB of the next product's (0.5 to 9 points worse, with other kernels
// between the products too).
#include <algorithm>

#include "kernels/cuda/gemm_ring.h"
#include "kernels/cuda/gemm_tile.h"
#include "kernels/cuda/mbarrier.h"
#include "kernels/cuda/pdl.h"

namespace linspec::cuda {
namespace {

constexpr int kWarps = kSplit;
constexpr int kChunk = 8;  // steps of a slot
constexpr int kSlotPitch = (kChunk + 1) * kStepBytes, kSlotBytes = kTileRows * kSlotPitch;
constexpr int kMaxSlots = 2;
constexpr int kReservedBytes = 1024;  // of shared memory, by the system for each block

struct WarpBarriers {
  uint64_t full[kMaxSlots], tokens;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// By a warp.
[[maybe_unused]] __device__ __forceinline__ void MakeBarriers(WarpBarriers& barriers) {
  if (threadIdx.x % kWarpSize == 0) {
    for (uint64_t& full : barriers.full) BarrierInit(&full, 1);
    BarrierInit(&barriers.tokens, 1);
    BarrierMade();
  }
  __syncwarp();
}
#endif

// Weights are read once: first to leave the L2.
[[maybe_unused]] __device__ __forceinline__ void CopyWeights(void* to, const void* from, int bytes, uint64_t* barrier,
                                                             uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(SharedAddress(to)),
      "l"(from), "r"(bytes), "r"(SharedAddress(barrier)), "l"(policy)
      : "memory");
}

[[maybe_unused]] __device__ __forceinline__ void CopyTokens(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   SharedAddress(to)),
               "l"(from), "r"(bytes), "r"(SharedAddress(barrier))
               : "memory");
}

__host__ __device__ constexpr int TokenPitch(int steps, int parts) {  // bytes; 64 or 16 past a multiple of 128
  return parts == 1 ? steps * 64 + (steps % 2 == 0 ? 64 : 0) : steps * 128 + 16;
}

// A warp's slice of every weight row, its ring, and what is ordered next.
template <int kType>
struct WarpRing {
  static constexpr int kParts = WeightTraits<kType>::kParts;
  const LinspecCudaMatrix& w;
  WarpBarriers& barriers;
  uint8_t* slots;
  int num_slots, tiles;
  int begin, count, bytes;  // steps; bytes of a row's slice, at most count * kStepBytes, 0 if empty
  int next_tile, next_byte = 0;
  uint64_t policy;

  __device__ WarpRing(const LinspecCudaMatrix& w, int range, WarpBarriers& barriers, uint8_t* slots, int num_slots)
      : w(w), barriers(barriers), slots(slots), num_slots(num_slots), next_tile(blockIdx.x) {
    const int steps = NumSteps(w);
    tiles = static_cast<int>((w.rows + kTileRows - 1) / kTileRows);
    begin = RangeBegin(steps, range);
    count = RangeBegin(steps, range + 1) - begin;
    bytes = static_cast<int>(min(pitch() - int64_t{begin} * kStepBytes, int64_t{count} * kStepBytes));
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  }
  __device__ int64_t pitch() const { return w.cols * 2 / kParts; }

  __device__ void Order(int slot) {  // by the whole warp, when all have read the slot
    if (next_tile >= tiles || bytes <= 0) return;
    const int lane = threadIdx.x % kWarpSize, piece = min(kChunk * kStepBytes, bytes - next_byte);
    if (lane == 0) BarrierExpect(&barriers.full[slot], piece * kTileRows);
    __syncwarp();
    if (lane < kTileRows) {
      const int64_t row = min(int64_t{next_tile} * kTileRows + lane, w.rows - 1);
      const char* from = static_cast<const char*>(w.data) + row * pitch() + int64_t{begin} * kStepBytes + next_byte;
      CopyWeights(slots + slot * kSlotBytes + lane * kSlotPitch, from, piece, &barriers.full[slot], policy);
    }
    next_byte += kChunk * kStepBytes;
    if (next_byte >= bytes) {
      next_byte = 0;
      next_tile += gridDim.x;
    }
  }
};

// One step of a slot; lanes past the end of the row bring zeros.
template <int kType>
__device__ __forceinline__ void MultiplyStep(const uint8_t* slot, const uint8_t* token, int step, bool inside,
                                             float (&sums)[4]) {
  constexpr int kParts = WeightTraits<kType>::kParts;
  const uint8_t* from = slot + step * kStepBytes;
  uint4 low = *reinterpret_cast<const uint4*>(from), high = *reinterpret_cast<const uint4*>(from + 8 * kSlotPitch);
  uint4 x[kParts];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const auto* tokens = reinterpret_cast<const uint4*>(token + step * kStepBytes * kParts + part * 16);
    x[part] = WeightTraits<kType>::Pair(*tokens);
    if (!inside) x[part] = uint4{};
  }
  if (!inside) low = high = uint4{};
  uint32_t a[4 * kParts], b[4 * kParts];
  WeightTraits<kType>::Widen(low, a);
  WeightTraits<kType>::Widen(high, b);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int i = part * 4;
    Mma(sums, a[i], b[i], a[i + 1], b[i + 1], x[part].x, x[part].y);
    Mma(sums, a[i + 2], b[i + 2], a[i + 3], b[i + 3], x[part].z, x[part].w);
  }
}

// 1 / rms of x, where the norm in front was left to this product; the lanes sum in a fixed order. For each warp.
[[maybe_unused]] __device__ __forceinline__ void ReadScales(const GemmParams& p, int rows,
                                                            float (&scales)[kRingNormRows]) {
  if (p.norm_before.squares == nullptr) return;
  const int parts = static_cast<int>(NormParts(p.w.cols, kRingNormPart)), lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int token = 0; token < kRingNormRows; ++token) {
    if (token >= rows) break;
    float sum = 0.0f;
#pragma unroll 8
    for (int i = lane; i < parts; i += kWarpSize) sum += __ldcg(p.norm_before.squares + token * parts + i);
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
    scales[token] = 1.0f / sqrtf(sum / static_cast<float>(p.w.cols) + p.norm_before.eps);
  }
}

// y = old + sums of a tile is the residual stream: what the norm behind needs of it.
[[maybe_unused]] __device__ __forceinline__ void LeaveNorm(const GemmParams& p, int rows, int tile,
                                                           const float (&sums)[4], const float (&old)[4]) {
  static_assert(kTileRows == kRingNormPart);
  const int lane = threadIdx.x % kWarpSize, first = lane % 4 * 2;
  float squares[2] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = int64_t{tile} * kTileRows + lane / 4 + i / 2 * 8, token = first + i % 2;
    if (row >= p.w.rows || token >= rows) continue;
    const float y = old[i] + sums[i];
    squares[i % 2] = fmaf(y, y, squares[i % 2]);
    p.norm_after.out[token * p.w.rows + row] = Bf16Bits(y * p.norm_after.weight[row]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for (int lanes = 4; lanes < kWarpSize; lanes *= 2) squares[i] += __shfl_xor_sync(0xFFFFFFFFu, squares[i], lanes);
    if (lane >= 4 || first + i >= rows) continue;
    p.norm_after.squares[(first + i) * NormParts(p.w.rows, kRingNormPart) + tile] = squares[i];
  }
}

// The ranges of a finished tile, added in order; by one warp.
template <bool kNorms>
__device__ __forceinline__ void WriteTile(const GemmParams& p, int rows, int tile,
                                          const float4 (&parts)[kSplit][kWarpSize],
                                          const float (&scales)[kRingNormRows]) {
  const int lane = threadIdx.x % kWarpSize, token = lane % 4 * 2;
  const int64_t row = int64_t{tile} * kTileRows + lane / 4;
  const OutputTile output{p, rows};
  float old[4], total[4] = {};
  output.ReadOld(row, token, old);
#pragma unroll
  for (const auto& part : parts) {
    total[0] += part[lane].x, total[1] += part[lane].y, total[2] += part[lane].z, total[3] += part[lane].w;
  }
  if constexpr (kNorms) {  // of kRingNormRows tokens: what other lanes bring is not used
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] *= scales[i % 2];
  }
  output.Write(row, token, total, old);
  if (kNorms && p.norm_after.weight != nullptr) LeaveNorm(p, rows, tile, total, old);
}

// kNorms: with a norm on either side.
template <int kType, bool kNorms>
__global__ void __launch_bounds__(kThreads) RingGemmKernel(const GemmParams p, const int rows, const int num_slots) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kParts = WeightTraits<kType>::kParts;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ WarpBarriers all_barriers[kWarps];
  __shared__ float4 partial[2][kSplit][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, g = lane / 4, s = lane % 4;
  WarpBarriers& barriers = all_barriers[warp];
  WarpRing<kType> ring(p.w, warp, barriers, shared + warp * num_slots * kSlotBytes, num_slots);
  const int token_pitch = TokenPitch((NumSteps(p.w) + kSplit - 1) / kSplit, kParts);
  uint8_t* tokens = shared + kWarps * num_slots * kSlotBytes + warp * rows * token_pitch;
  MakeBarriers(barriers);
  for (int slot = 0; slot < num_slots; ++slot) ring.Order(slot);
  GridLaunchDependents();
  GridWait();
  if (ring.bytes > 0) {
    asm volatile("fence.proxy.async;" ::: "memory");  // x was written by ordinary stores
    if (lane == 0) BarrierExpect(&barriers.tokens, ring.bytes * kParts * rows);
    __syncwarp();
    const uint16_t* from = p.x + int64_t{ring.begin} * 32 * kParts;
    if (lane < rows) {
      CopyTokens(tokens + lane * token_pitch, from + lane * p.w.cols, ring.bytes * kParts, &barriers.tokens);
    }
  }
  float scales[kRingNormRows] = {1.0f, 1.0f};
  if constexpr (kNorms) ReadScales(p, rows, scales);
  if (ring.bytes > 0) BarrierWait(&barriers.tokens, 0);
  const uint8_t* token = tokens + min(g, rows - 1) * token_pitch + s * 16 * kParts;
  const int whole = ring.bytes / kStepBytes;  // steps that are inside the row for every lane
  const int valid = (ring.bytes - s * 16 + kStepBytes - 1) / kStepBytes;
  int slot = 0, turn = 0;
  uint32_t parity = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < ring.tiles; tile += gridDim.x, ++turn) {
    float sums[4] = {};
    for (int first = 0; first * kStepBytes < ring.bytes; first += kChunk) {
      BarrierWait(&barriers.full[slot], parity);
      const uint8_t* weights = ring.slots + slot * kSlotBytes + g * kSlotPitch + s * 16;
      const uint8_t* x = token + first * kStepBytes * kParts;
      const int end = min(kChunk, ring.count - first), plain = min(end, whole - first);
      int step = 0;
#pragma unroll 4
      for (; step < plain; ++step) MultiplyStep<kType>(weights, x, step, true, sums);
      for (; step < end; ++step) MultiplyStep<kType>(weights, x, step, first + step < valid, sums);
      __syncwarp();
      ring.Order(slot);
      if (++slot == num_slots) {
        slot = 0;
        parity ^= 1;
      }
    }
    // Two buffers: a warp that is a tile ahead writes the other one, and none can be two ahead of the barrier.
    float4(&parts)[kSplit][kWarpSize] = partial[turn % 2];
    parts[warp][lane] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    __syncthreads();
    if (warp == turn % kWarps) WriteTile<kNorms>(p, rows, tile, parts, scales);
  }
#endif
}

struct RingShape {
  int num_slots, shared, blocks;  // of a warp; bytes of a block
  bool runs;
};

template <int kType>
RingShape ShapeOf(const LinspecCudaMatrix& w, int rows) {
  const Device& device = CurrentDevice();
  const int steps = (NumSteps(w) + kSplit - 1) / kSplit;
  const int tokens = kWarps * rows * TokenPitch(steps, WeightTraits<kType>::kParts), ring = kWarps * kSlotBytes;
  constexpr int kStatic = sizeof(WarpBarriers) * kWarps + 2 * sizeof(float4) * kSplit * kWarpSize;
  const int overhead = kStatic + kReservedBytes;
  // Two blocks with a slot each do better than one with two.
  const bool two_blocks = 2 * (ring + tokens + overhead) <= device.shared_per_processor && steps <= 2 * kChunk;
  const int num_slots = two_blocks ? 1 : 2, shared = num_slots * ring + tokens;
  const int tiles = static_cast<int>((w.rows + kTileRows - 1) / kTileRows);
  return {.num_slots = num_slots,
          .shared = shared,
          .blocks = std::min(tiles, device.processors * (two_blocks ? 2 : 1)),
          .runs = device.major >= 9 && rows <= kTileTokens && shared + overhead <= device.shared_per_block};
}

RingShape ShapeOf(const LinspecCudaMatrix& w, int rows) {
  return w.type == kLinspecCudaBf16 ? ShapeOf<kLinspecCudaBf16>(w, rows) : ShapeOf<kLinspecCudaFp8>(w, rows);
}

template <int kType>
void Launch(const GemmParams& p, int rows, const RingShape& shape, cudaStream_t stream) {
  auto kernel = &RingGemmKernel<kType, false>;
  if constexpr (kType != kLinspecCudaBf16) {
    if (p.norm_before.squares != nullptr || p.norm_after.weight != nullptr) kernel = &RingGemmKernel<kType, true>;
  }
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared) != cudaSuccess) return;
  LaunchOverlapped(kernel, shape.blocks, kThreads, shape.shared, stream, 1, p, rows, shape.num_slots);
}

}  // namespace

bool RingGemmTakesNorms(const LinspecCudaMatrix& w, int rows) {
  return w.type != kLinspecCudaBf16 && rows <= kRingNormRows && ShapeOf(w, rows).runs;
}

bool LaunchRingGemm(const GemmParams& params, int rows, cudaStream_t stream) {
  const RingShape shape = ShapeOf(params.w, rows);
  if (!shape.runs) return false;
  switch (params.w.type) {
    case kLinspecCudaI8:
      Launch<kLinspecCudaI8>(params, rows, shape, stream);
      break;
    case kLinspecCudaFp8:
      Launch<kLinspecCudaFp8>(params, rows, shape, stream);
      break;
    default:
      Launch<kLinspecCudaBf16>(params, rows, shape, stream);
  }
  return true;
}

}  // namespace linspec::cuda
