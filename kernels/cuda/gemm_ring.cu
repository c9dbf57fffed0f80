// Up to 8 tokens: weights reach shared memory by the bulk copy engine, so that loads never wait for the arithmetic.
//
// The 8 warps of a block are the kSplit ranges of k of one tile of 16 weight rows. Each warp has its own ring of slots
// (16 rows by up to 8 steps, 512 consecutive bytes of each row) with one mbarrier each: 16 lanes order one copy per
// row, all multiply, and the slot is ordered again for a later tile; warps meet only where the ranges of a finished
// tile are added, in order. x's slice of a range stays in the warp's shared memory for the whole launch. The rings are
// filled before the kernel ahead has ended (pdl.h).
//
// Rows of a slot, and tokens, are padded so that 8 lanes reading 16 bytes each (two rows, four slices) meet 32 banks.
//
// The RMSNorm in front of a product can be its prologue (launch.h): each warp makes its slice of x from that of the
// residual stream and of the norm's weight, which it asked for before the kernel ahead had ended, and the warps' sums
// of squares meet where the ranges of the first tile do.
//
// Blocks have their x 3 to 6 us after the last write of the kernel ahead: who asks for it has waited for the copy
// engine to take all first copies of weights. The memory is busy with those so long; a launch takes 1 to 4 us over its
// bytes (bf16, H100).
//
// Rejected: 256-byte pieces of a row (75 %); 128-byte TMA boxes (78 %) and 512-byte ones (91 % at best, 77 % at 4096 x
// 4096); cp.async into per-lane slots (76 %); loads into registers one step ahead (57 %: they share scoreboards);
// ranges spread over a cluster and added through distributed shared memory (69 %); weights fetched into the L2 ahead:
// the launch's own (5 points worse), or 4 to 32 MB of the next product's (0.5 to 9 points worse, with other kernels
// between the products too); first copies by half of the warps and x by the others (an H200, a step of 1 request: fp8
// 2.24 ms for 2.13, bf16 3.60 for 3.44), or by a warp of their own (an H100, fp8 2.84 for 2.63): x is there 2 to 3 us
// earlier, the weights later.
#include <algorithm>

#include "kernels/cuda/gemm_ring.h"
#include "kernels/cuda/gemm_tile.h"
#include "kernels/cuda/mbarrier.h"
#include "kernels/cuda/pdl.h"
#include "kernels/cuda/tensor_core.h"

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

__host__ __device__ constexpr int TokenPitch(int steps, int parts) {  // bytes; 64 or 16 past a multiple of 128
  return parts == 1 ? steps * 64 + (steps % 2 == 0 ? 64 : 0) : steps * 128 + 16;
}

// A warp's slice of every weight row, its ring, and what is ordered and read next.
template <int kType>
struct WarpRing {
  static constexpr int kParts = WeightTraits<kType>::kParts;
  const LinspecCudaMatrix& w;
  WarpBarriers& barriers;
  uint8_t* slots;
  int num_slots, tiles;
  int begin, count, bytes;  // steps; bytes of a row's slice, at most count * kStepBytes, 0 if empty
  int next_tile, next_byte = 0;
  int slot = 0;  // that is read next
  uint32_t parity = 0;
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

  __device__ void Fill() {
#pragma unroll 1
    for (int i = 0; i < num_slots; ++i) Order(i);
  }
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

// A warp's slice of x, with nothing left to be done to it. Waits for it.
template <int kType>
__device__ __forceinline__ void CopyTokens(const WarpRing<kType>& ring, const GemmParams& p, int rows, uint8_t* tokens,
                                           int token_pitch) {
  constexpr int kParts = WeightTraits<kType>::kParts;
  const int lane = threadIdx.x % kWarpSize;
  if (lane == 0) BarrierExpect(&ring.barriers.tokens, ring.bytes * kParts * rows);
  __syncwarp();
  const uint16_t* from = p.x + int64_t{ring.begin} * 32 * kParts;
  if (lane < rows) {
    CopyBytes(SharedAddress(tokens + lane * token_pitch), from + lane * p.w.cols, ring.bytes * kParts,
              &ring.barriers.tokens);
  }
  BarrierWait(&ring.barriers.tokens, 0);
}

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
    x[part] = *reinterpret_cast<const uint4*>(token + step * kStepBytes * kParts + part * 16);
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

// The warp's range of a tile. token: the lane's part of its slice of x.
template <int kType>
__device__ __forceinline__ void MultiplyTile(WarpRing<kType>& ring, const uint8_t* token, float (&sums)[4]) {
  const int g = threadIdx.x % kWarpSize / 4, s = threadIdx.x % 4;
  const int whole = ring.bytes / kStepBytes;  // steps that are inside the row for every lane
  const int valid = (ring.bytes - s * 16 + kStepBytes - 1) / kStepBytes;
  for (int first = 0; first * kStepBytes < ring.bytes; first += kChunk) {
    BarrierWait(&ring.barriers.full[ring.slot], ring.parity);
    const uint8_t* weights = ring.slots + ring.slot * kSlotBytes + g * kSlotPitch + s * 16;
    const uint8_t* x = token + first * kStepBytes * WeightTraits<kType>::kParts;
    const int end = min(kChunk, ring.count - first), plain = min(end, whole - first);
    int step = 0;
#pragma unroll 4
    for (; step < plain; ++step) MultiplyStep<kType>(weights, x, step, true, sums);
    for (; step < end; ++step) MultiplyStep<kType>(weights, x, step, first + step < valid, sums);
    __syncwarp();
    ring.Order(ring.slot);
    if (++ring.slot == ring.num_slots) {
      ring.slot = 0;
      ring.parity ^= 1;
    }
  }
}

// A warp's slice of x as the product of a residual stream and the weight of a norm: its prologue.
template <int kType>
class NormSlice {
 public:
  // Asks for weights, which are older than the kernel ahead; before the rings do, whose copies they would wait behind.
  __device__ NormSlice(const NormBefore& norm, const WarpRing<kType>& ring)
      : norm_(norm),
        begin_(int64_t{ring.begin} * 32 * WeightTraits<kType>::kParts),
        quads_(ring.bytes * WeightTraits<kType>::kParts / 8) {
    if (quads_ <= 0) return;
#pragma unroll
    for (int i = 0; i < kEarly; ++i) LoadEarly(weights_[i], norm.weight + begin_ + 4 * min(Quad(i), quads_ - 1));
  }

  // When the stream is complete: bf16 for `rows` tokens of `cols` each, and the lane's sums of squares.
  __device__ void Write(int rows, int64_t cols, uint8_t* tokens, int token_pitch, float (&squares)[kRingNormRows]) {
    if (quads_ <= 0) return;
    float4 x[kRingNormRows][kEarly];
#pragma unroll
    for (int token = 0; token < kRingNormRows; ++token) {
      if (token >= rows) break;
#pragma unroll
      for (int i = 0; i < kEarly; ++i) x[token][i] = Read(token, cols, min(Quad(i), quads_ - 1));
    }
#pragma unroll
    for (int token = 0; token < kRingNormRows; ++token) {
      if (token >= rows) break;
      auto* to = reinterpret_cast<uint2*>(tokens + token * token_pitch);
#pragma unroll
      for (int i = 0; i < kEarly; ++i) {
        const float4 w = make_float4(weights_[i][0], weights_[i][1], weights_[i][2], weights_[i][3]);
        if (Quad(i) < quads_) to[Quad(i)] = NormFour(x[token][i], w, squares[token]);
      }
#pragma unroll 1
      for (int quad = Quad(kEarly); quad < quads_; quad += kWarpSize) {
        const float4 w = __ldg(reinterpret_cast<const float4*>(norm_.weight + begin_) + quad);
        to[quad] = NormFour(Read(token, cols, quad), w, squares[token]);
      }
    }
    __syncwarp();
  }

 private:
  static constexpr int kEarly = 4;  // quads of a lane: all at a hidden size of 4,096

  __device__ static int Quad(int i) { return i * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize; }
  __device__ float4 Read(int token, int64_t cols, int quad) const {
    return __ldcg(reinterpret_cast<const float4*>(norm_.x + token * cols + begin_) + quad);
  }

  const NormBefore& norm_;
  int64_t begin_;
  int quads_;
  float weights_[kEarly][4];
};

// A warp's sums of squares from its lanes'.
using Squares = float[kRingNormRows][kSplit];
[[maybe_unused]] __device__ __forceinline__ void LeaveSquares(const float (&of_lane)[kRingNormRows], Squares& squares) {
#pragma unroll
  for (int token = 0; token < kRingNormRows; ++token) {
    float sum = of_lane[token];
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
    if (threadIdx.x % kWarpSize == 0) squares[token][threadIdx.x / kWarpSize] = sum;
  }
}

// 1 / rms of each token.
[[maybe_unused]] __device__ __forceinline__ void ReadScales(const GemmParams& p, const Squares& squares,
                                                            float (&scales)[kRingNormRows]) {
#pragma unroll
  for (int token = 0; token < kRingNormRows; ++token) {
    float sum = 0.0f;
#pragma unroll
    for (const float part : squares[token]) sum += part;
    scales[token] = InverseRms(sum, p.w.cols, p.norm_before.eps);
  }
}

// A tile, by the warp that finishes it. What that reads is asked for before the tile is multiplied.
template <bool kNorm>
struct Finish {
  float old[4], scales[2];

  __device__ __forceinline__ void Read(const OutputTile& output, int64_t row, int token) {
    output.ReadOld(row, token, old);
    output.ReadScales(row, scales);
  }
  // Adds the ranges in order.
  __device__ __forceinline__ void Write(const OutputTile& output, int64_t row, int token,
                                        const float4 (&parts)[kSplit][kWarpSize],
                                        const float (&token_scales)[kRingNormRows]) const {
    const int lane = threadIdx.x % kWarpSize;
    float total[4] = {};
#pragma unroll
    for (const auto& part : parts) {
      total[0] += part[lane].x, total[1] += part[lane].y, total[2] += part[lane].z, total[3] += part[lane].w;
    }
    if constexpr (kNorm) {  // of kRingNormRows tokens: what other lanes bring is not used
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] *= token_scales[i % 2];
    }
    output.Write(row, token, total, old, scales);
  }
};

// kNorm: with a norm as its prologue.
template <int kType, bool kNorm>
__global__ void __launch_bounds__(kThreads, 2) RingGemmKernel(const GemmParams p, const int rows, const int num_slots) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kParts = WeightTraits<kType>::kParts;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ WarpBarriers all_barriers[kWarps];
  __shared__ float4 partial[2][kSplit][kWarpSize];
  __shared__ Squares squares;
  const int warp = UniformWarp(), lane = threadIdx.x % kWarpSize, g = lane / 4, s = lane % 4;
  WarpBarriers& barriers = all_barriers[warp];
  WarpRing<kType> ring(p.w, warp, barriers, shared + warp * num_slots * kSlotBytes, num_slots);
  const int token_pitch = TokenPitch((NumSteps(p.w) + kSplit - 1) / kSplit, kParts);
  uint8_t* tokens = shared + kWarps * num_slots * kSlotBytes + warp * rows * token_pitch;
  MakeBarriers(barriers);
  float scales[kRingNormRows] = {};  // first the lane's sums of squares
  if constexpr (kNorm) {
    NormSlice slice(p.norm_before, ring);
    ring.Fill();
    GridLaunchDependents();
    GridWait();
    slice.Write(rows, p.w.cols, tokens, token_pitch, scales);
  } else {
    ring.Fill();
    GridLaunchDependents();
    GridWait();
    if (ring.bytes > 0) CopyTokens(ring, p, rows, tokens, token_pitch);
  }
  const uint8_t* token = tokens + min(g, rows - 1) * token_pitch + s * 16 * kParts;
  const OutputTile output{p, rows};
  int turn = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < ring.tiles; tile += gridDim.x, ++turn) {
    const bool finishes = warp == turn % kWarps;
    const int64_t row = int64_t{tile} * kTileRows + g;
    Finish<kNorm> finish;
    if (finishes) finish.Read(output, row, 2 * s);
    float sums[4] = {};
    MultiplyTile(ring, token, sums);
    // Two buffers: a warp that is a tile ahead writes the other one, and none can be two ahead of the barrier.
    float4(&parts)[kSplit][kWarpSize] = partial[turn % 2];
    parts[warp][lane] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    if (kNorm && turn == 0) LeaveSquares(scales, squares);
    __syncthreads();
    if (kNorm && turn == 0) ReadScales(p, squares, scales);
    if (finishes) finish.Write(output, row, 2 * s, parts, scales);
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
  constexpr int kStatic = sizeof(WarpBarriers) * kWarps + 2 * sizeof(float4) * kSplit * kWarpSize + sizeof(Squares);
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
  const auto kernel = p.norm_before.x != nullptr ? &RingGemmKernel<kType, true> : &RingGemmKernel<kType, false>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared) != cudaSuccess) return;
  LaunchOverlapped(kernel, shape.blocks, kThreads, shape.shared, stream, 1, p, rows, shape.num_slots);
}

}  // namespace

bool RingGemmTakesNorm(const LinspecCudaMatrix& w, int rows) { return rows <= kRingNormRows && ShapeOf(w, rows).runs; }

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
