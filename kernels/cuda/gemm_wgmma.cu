// Products of any number of tokens on sm_90: weights are streamed by the copy engine's tensor form into a ring of
// shared memory and are the 64-row operand of warpgroup instructions; the tokens (8 to 128 at a time) are the other.
// bf16 weights are multiplied where they lie, int8 and fp8 are widened in registers (gemm_wgmma_multiply.h).
//
// A product has one of three forms, by its matrix, epilogue and chip alone:
// - Pairs (gemm_wgmma_pair.h), for sums that are added to y: a cluster of two blocks has a tile of 64 rows to itself
//   and the sums meet in its shared memory, 1 us after the last multiplication. It takes a matrix of which 128 to 132
//   such blocks, or so, make one wave (4,096 rows), and up to 64 tokens; more have the same bits from shares.
// - Tall tiles (gemm_wgmma_tall.h), for silu(gate) * up: a block has up to 192 rows and all of k, no sums are
//   exchanged.
// - Shares, everything else. The work is units: (tile of 128 weight rows, 128 bytes of k), in that order; every block
//   gets the same number of consecutive units, so that no multiprocessor idles whatever the shape. A tile that several
//   blocks share is summed in order of k by the block that holds its beginning, as its last work; the others leave
//   their sums in the workspace as their first, and these come through the ring like weights. Blocks take their work
//   backwards, so that a block only waits for blocks that started before it. The cuts of k depend on the shape and the
//   chip alone and the columns of an instruction do not mix: a row has the same bits beside any other rows. RMSNorms
//   can ride along on both sides (launch.h), which saves two launches a layer.
//
// Rings take more than half of the shared memory: of two, the next product's blocks would gather on the multiprocessors
// that are free first, two on one and none on another (a step of 64 requests took 7.4 instead of 6.6 ms).
//
// Up to 32 tokens in bf16, weights are asked for a few units at a time (kPaced): tokens and sums that a block wants of
// the L2 meanwhile wait behind all that blocks have asked the memory for, and so does every other read of a warp. The
// ring is larger then (before pairs, a step of 16 requests 3.82 ms for 3.90, of 32 4.34 for 4.41, an H200). In 8 bits
// neither gains (16 requests: 2.52 ms as it is, 2.60 with both), nor pacing 64 tokens, nor pacing the first ring alone.
//
// What is missing: the launch and the first tokens, 1 to 2 us a product, in which the memory idles once rings are full;
// the heads' end in qkv at 64 tokens, 3 us; 5 us between floor and last multiplication of qkv and 8-bit gate_up, which
// are neither sums nor the change of tiles (tall tiles have neither and lose as much at few tokens).
//
// Rejected, the first nine before warps were uniform (gemm_tile.h), all before pairs but the last five: up to four
// products in one launch with a barrier of all blocks between them (an H100, 8 rows: bf16 5.02 ms for 4.80, fp8 3.07
// for 2.94); the next product's first weights fetched into the L2 (2, 4, 8 units: 4.85, 4.91, 5.03 ms); four groups on
// 8-bit weights, a box each (2.98 ms for 2.92 at 8 rows, 3.67 for 3.35 at 64); rings of 208 KB (bf16 the same, fp8 3 %
// slower); clusters of two that share tokens by multicast (an H200, a step of 32, 64, 128 rows in bf16 4.69, 6.00, 8.07
// ms for 4.61, 5.94, 8.08, in fp8 3.76, 5.19, 8.83 for 3.69, 5.13, 8.87); clusters of four that share a tile (an H100
// runs 30 of the 32 at once); rings of half the size, so that two products share a multiprocessor (1 to 15 % slower in
// a step); fetching 256 bytes into the L2 for each 128 asked for (5 points); less work for blocks that only hand sums
// over (fp8 at 64 rows 6.19 ms for 6.14). Sums that their reader polls for, without flags: one block reading all, 2 to
// 3 us slower a product at 64 (an H100); all blocks of a tile completing some of its tokens each, by copies into the
// ring, 3 % slower at 16 and 7 % at 64 (an H200). Words of two units in turn instead of two boxes: nvcc 13.0 makes the
// instructions wait for each other. A slot given back before its warps wait for the next unit, when their instructions
// are done: 3 % slower in fp8. What the end of a tile reads fetched into the L2 at the start: nothing. An H200, steps
// in ms: the end of a tile run once without effect before the kernel ahead has ended, so that its instructions are
// there, 64 requests 5.96 for 5.90 (bf16), 4.92 for 4.89 (fp8); pairs up to 32 tokens only in 8 bits, because they read
// tokens twice as often, 4.60 for 4.38 at 64; tall tiles with rings of 224 KB at few tokens in 8 bits, 2.20 for 2.16 at
// 4; tall tiles in 8 bits by passes of 64, 8.64 for 8.14 at 128; the group's number uniform too, nothing.
#include <cuda.h>

#include <algorithm>

#include "kernels/cuda/gemm_wgmma.h"
#include "kernels/cuda/gemm_wgmma_consumer.h"
#include "kernels/cuda/gemm_wgmma_pair.h"
#include "kernels/cuda/gemm_wgmma_tall.h"

namespace linspec::cuda {
namespace {

constexpr int kMaxTokens = 128;
constexpr int kRingBytes = 148 << 10, kLargeRingBytes = 205 << 10;
constexpr int kMaxBlocks = 160;  // of which the workspace has room for sums

template <int kType, int kTokens, bool kNorms>
__global__ void __launch_bounds__(Unit<kType, kTokens>::kThreads + (kNorms ? kWarpSize : 0))
    WgmmaGemmKernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap tokens,
                    const __grid_constant__ GemmParams p, const int rows, const int stages, const Workspace workspace) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Unit = Unit<kType, kTokens>;
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t barriers[Ring::kBarrierBytes / sizeof(uint64_t)];
  __shared__ __align__(16) TileEnd<kTokens> end;
  const Shares shares(p.w, Unit::kDepth, static_cast<int>(gridDim.x));
  const int share = static_cast<int>(gridDim.x - 1 - blockIdx.x), warp = UniformWarp();
  const Ring ring{(SharedAddress(shared) + 1023) / 1024 * 1024, SharedAddress(barriers), stages};
  if (threadIdx.x == 0) {
    MakeRing<Unit>(ring);
    BarrierMade();
  }
  __syncthreads();
  GridLaunchDependents();
  if (warp < kConsumers) {
    Consumer<kType, kTokens, kNorms>{{ring}, p, rows, share, shares, workspace, end}.Run();
  } else if (warp < Unit::kThreads / kWarpSize) {
    const ShareUnits units(shares, share);
    Turn turn;
    if (threadIdx.x % kWarpSize == 0) {
      turn = Producer<Unit, ShareUnits>{weights, tokens, units, ring}.Run(warp - kConsumers);
    }
    __syncwarp();
    if (warp > kConsumers) return;
    GridWait();
    OrderSums<Unit>(shares, share, workspace, ring, turn);
  } else {
    MakeScales<kTokens>(p, rows, end.scales);
  }
#endif
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// Null without the driver's function, and where the chip's code was compiled from another chip's on the way.
Encode FindEncode() {
  cudaFuncAttributes compiled;
  if (cudaFuncGetAttributes(&compiled, &WgmmaGemmKernel<kLinspecCudaBf16, 8, false>) != cudaSuccess ||
      compiled.ptxVersion != 90) {
    cudaGetLastError();
    return nullptr;
  }
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

Encode UsableEncode() {
  static const Encode encode = FindEncode();
  return CurrentDevice().major == 9 ? encode : nullptr;
}

// [rows, cols] in boxes of box_rows by 128 bytes; what lies outside reads as zero.
bool Describe(bool bytes, const void* data, int64_t rows, int64_t cols, int box_rows, CUtensorMap* map) {
  const Encode encode = UsableEncode();
  if (encode == nullptr) return false;
  const cuuint32_t size_of = bytes ? 1 : 2;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(cols) * size_of};
  const cuuint32_t box[2] = {kUnitRowBytes / size_of, static_cast<cuuint32_t>(box_rows)}, stride[2] = {1, 1};
  return encode(map, bytes ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
                const_cast<void*>(data), size, pitch, box, stride, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// The last of the products' workspace: zero between launches is what counts warps.
constexpr int64_t kLeftBytes = kMaxBlocks * sizeof(unsigned);
constexpr int64_t kSumsBytes = int64_t{kMaxBlocks} * kUnitRows * kMaxTokens * sizeof(float);
Workspace WorkspaceAt(void* of_products) {
  char* at = static_cast<char*>(of_products) + StreamingGemmWorkspaceBytes() - WgmmaGemmWorkspaceBytes();
  return {.left = reinterpret_cast<unsigned*>(at), .sums = reinterpret_cast<float4*>(at + kLeftBytes)};
}

// Of a pair's block in shared memory; what the tile's end takes there grows with the tokens.
constexpr int kPairRingBytes = 205 << 10, kPairRingBytes8Bit = 161 << 10, kPairRingBytes64 = 193 << 10;
constexpr int kTallRingBytes = 224 << 10, kTallRingBytes8Bit = 148 << 10;

// An even number: gemm_wgmma_pair.h.
template <typename Unit>
constexpr int PairStages() {
  constexpr int kBytes = (Unit::kTokens > 32 ? kPairRingBytes64
                          : Unit::kWidens    ? kPairRingBytes8Bit
                                             : kPairRingBytes) -
                         1024;
  return std::min(kBytes / Unit::kBytes, Unit::kMostStages) / kGroups * kGroups;
}

// Pairs of blocks that run at once: those of any product, whose rings all leave a multiprocessor to one.
int FindPairs() {
  using Unit = Unit<kLinspecCudaBf16, 64, Form::kPair>;
  constexpr int kShared = PairStages<Unit>() * Unit::kBytes + 1024;
  const auto kernel = &WgmmaPairKernel<kLinspecCudaBf16, 64>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kPairBlocks, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = kPairBlocks;
  config.blockDim = Unit::kThreads;
  config.dynamicSmemBytes = kShared;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int pairs = 0;
  if (cudaOccupancyMaxActiveClusters(&pairs, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return pairs;
}

int MostPairs() {
  static const int pairs = FindPairs();
  return pairs;
}

// Whether a tile of 128 rows has four shares: blocks of their own that keep nine tenths of the chip busy, and that few
// tokens take by pairs of blocks. By the shape and the chip alone.
bool HasFourShares(const LinspecCudaMatrix& w, int depth) {
  const int64_t blocks = w.rows / kUnitRows * kPairSums;
  return w.rows % kUnitRows == 0 && depth >= kPairSums && blocks * 10 >= CurrentDevice().processors * 9 &&
         blocks <= std::min<int64_t>(MostPairs() * kPairBlocks, kMaxBlocks);
}

template <int kType, int kTokens>
struct Maps {
  CUtensorMap weights, tokens;
  bool described;
  Maps(const GemmParams& p, int rows, int unit_rows)
      : described(Describe(kType != kLinspecCudaBf16, p.w.data, p.w.rows, p.w.cols, unit_rows, &weights) &&
                  Describe(false, p.x, rows, p.w.cols, kTokens, &tokens)) {}
  // None, which no launch can have, without them: the caller finds the error where it looks for all others.
  int Blocks(int blocks) const { return described ? blocks : 0; }
};

template <int kType, int kTokens>
void Launch(const GemmParams& p, int rows, cudaStream_t stream) {
  using Unit = Unit<kType, kTokens>;
  constexpr int kBytes =
      (kTokens > 64 || Unit::kPaced ? kLargeRingBytes : kRingBytes) - 1024;  // from a multiple of 1,024 on
  constexpr int kStages = std::min(kBytes / Unit::kBytes, Unit::kMostStages);
  constexpr int kShared = kStages * Unit::kBytes + 1024;
  static_assert(!Unit::kPaced || Unit::kWindow <= kStages);
  const bool norms = p.norm_before.squares != nullptr || p.norm_after.weight != nullptr;
  const auto kernel = norms ? &WgmmaGemmKernel<kType, kTokens, true> : &WgmmaGemmKernel<kType, kTokens, false>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  const Shares whole(p.w, Unit::kDepth, 1);
  const int blocks = HasFourShares(p.w, whole.depth) ? whole.total / whole.depth * kPairSums
                                                     : std::min({whole.total, CurrentDevice().processors, kMaxBlocks});
  const Maps<kType, kTokens> maps(p, rows, kUnitRows);
  LaunchOverlapped(kernel, maps.Blocks(blocks), Unit::kThreads + (norms ? kWarpSize : 0), kShared, stream, 1,
                   maps.weights, maps.tokens, p, rows, kStages, WorkspaceAt(p.workspace));
}

template <int kType, int kTokens>
void LaunchPairs(const GemmParams& p, int rows, cudaStream_t stream) {
  using Unit = Unit<kType, kTokens, Form::kPair>;
  constexpr int kStages = PairStages<Unit>(), kShared = kStages * Unit::kBytes + 1024;
  static_assert(!Unit::kPaced || Unit::kWindow <= kStages);
  static_assert(kStages % kGroups == 0 && sizeof(typename PairEnd<kTokens>::Sums) <= kStages * Unit::kBytes);
  const auto kernel = &WgmmaPairKernel<kType, kTokens>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  const Maps<kType, kTokens> maps(p, rows, kGroupRows);
  const int blocks = static_cast<int>(p.w.rows / kGroupRows) * kPairBlocks;
  LaunchOverlapped(kernel, maps.Blocks(blocks), Unit::kThreads, kShared, stream, kPairBlocks, maps.weights, maps.tokens,
                   p, rows, Shares(p.w, Unit::kDepth, 1).depth, kStages);
}

template <typename Unit>
constexpr int TallStages() {
  return (Unit::kTokens <= 32 && Unit::kWidens ? kTallRingBytes8Bit : kTallRingBytes) / Unit::kBytes;
}

// Rows of a tile where each block has one, 0 if that is not to be: the tile would not be tall enough or too tall, or a
// tenth of the chip idle.
int TallHeight(const LinspecCudaMatrix& w) {
  const int64_t processors = CurrentDevice().processors, slices = (w.rows + kTileRows - 1) / kTileRows;
  const int64_t height = (slices + processors - 1) / processors * kTileRows;
  const bool busy = (w.rows + height - 1) / height * 10 >= processors * 9;
  return height > kUnitRows && height <= kTallRows && busy ? static_cast<int>(height) : 0;
}

template <int kType, int kTokens>
void LaunchTall(const GemmParams& p, int rows, cudaStream_t stream) {
  using Unit = Unit<kType, kTokens, Form::kTall>;
  constexpr int kStages = TallStages<Unit>(), kShared = kStages * Unit::kBytes + 1024;
  static_assert(!Unit::kPaced || Unit::kWindow <= kStages);
  static_assert(kTokens * (kTallRows + 4) * sizeof(float) <= kStages * Unit::kBytes);
  const auto kernel = &WgmmaTallKernel<kType, kTokens>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  const int height = TallHeight(p.w);
  const Maps<kType, kTokens> maps(p, rows, height);
  const int blocks = static_cast<int>((p.w.rows + height - 1) / height);
  LaunchOverlapped(kernel, maps.Blocks(blocks), Unit::kThreads + kWarpSize, kShared, stream, 1, maps.weights,
                   maps.tokens, p, rows, Shares(p.w, Unit::kDepth, 1).depth, height, kStages);
}

bool IsTall(const GemmParams& p) { return p.silu_mul && TallHeight(p.w) != 0; }

// In the form that suits.
template <int kType, int kTokens>
void LaunchTokens(const GemmParams& p, int rows, cudaStream_t stream) {
  if (IsTall(p)) return LaunchTall<kType, kTokens>(p, rows, stream);
  if constexpr (kTokens <= 64) {
    const bool adds = p.accumulate && p.norm_before.squares == nullptr;
    if (adds && HasFourShares(p.w, Shares(p.w, Unit<kType, kTokens>::kDepth, 1).depth)) {
      return LaunchPairs<kType, kTokens>(p, rows, stream);
    }
  }
  Launch<kType, kTokens>(p, rows, stream);
}

template <int kType>
void LaunchPass(const GemmParams& p, int rows, cudaStream_t stream) {
  if (rows <= 8) return LaunchTokens<kType, 8>(p, rows, stream);
  if (rows <= 16) return LaunchTokens<kType, 16>(p, rows, stream);
  if (rows <= 32) return LaunchTokens<kType, 32>(p, rows, stream);
  if (rows <= 64) return LaunchTokens<kType, 64>(p, rows, stream);
  return LaunchTokens<kType, 128>(p, rows, stream);
}

void LaunchPassOfType(const GemmParams& p, int rows, cudaStream_t stream) {
  switch (p.w.type) {
    case kLinspecCudaI8:
      return LaunchPass<kLinspecCudaI8>(p, rows, stream);
    case kLinspecCudaFp8:
      return LaunchPass<kLinspecCudaFp8>(p, rows, stream);
    default:
      return LaunchPass<kLinspecCudaBf16>(p, rows, stream);
  }
}

void SkipRows(RopeRows& rope, int64_t rows) {
  rope.angles += rows * (kUnitRows / 2);
  if (rope.kv_rows != nullptr) {
    rope.kv_rows += rows;
  } else if (rope.kv != nullptr) {
    const int64_t values = rows * 2 * rope.num_kv_heads * kUnitRows;
    rope.kv = static_cast<char*>(rope.kv) + values * static_cast<int64_t>(rope.bf16 ? sizeof(uint16_t) : sizeof(float));
  }
}

}  // namespace

int64_t WgmmaGemmWorkspaceBytes() { return kLeftBytes + kSumsBytes; }

bool WgmmaGemmTurnsHeads(int head_dim) { return head_dim == kUnitRows; }

bool WgmmaGemmRuns() { return UsableEncode() != nullptr; }

void LaunchWgmmaGemm(const GemmParams& params, int rows, cudaStream_t stream) {
  GemmParams p = params;
  for (int taken = 0; rows > 0; rows -= taken) {
    taken = std::min(rows, kMaxTokens);
    LaunchPassOfType(p, taken, stream);
    p.x += taken * p.w.cols;
    if (p.y != nullptr) p.y += taken * p.w.rows;
    if (p.y_bf16 != nullptr) p.y_bf16 += taken * (p.silu_mul ? p.w.rows / 2 : p.w.rows);
    if (p.rope.qkv != nullptr) SkipRows(p.rope, taken);
    if (p.norm_before.squares != nullptr) p.norm_before.squares += taken * NormParts(p.w.cols);
    if (p.norm_after.weight == nullptr) continue;
    p.norm_after.out += taken * p.w.rows;
    p.norm_after.squares += taken * NormParts(p.w.rows);
  }
}

}  // namespace linspec::cuda
