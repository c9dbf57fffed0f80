#include "kernels/cuda/products.h"

#include "kernels/cuda/gemm_ring.h"
#include "kernels/cuda/gemm_wgmma.h"

namespace linspec::cuda {
namespace {

constexpr int kMaxRingRows = kRingNormRows;                  // of what is small but for few rows; beyond: warpgroups
constexpr int kMaxOwnRows = 64, kMaxOwnRowsBf16Below90 = 8;  // beyond: cuBLASLt, where it may be used
constexpr int kMaxOwnRowsWidened = 512;                      // the same of int8 and fp8 by warpgroup instructions
constexpr int kMaxStreamedRows = 64;                         // of our kernels without those instructions, beyond: tiled
// Matrices that stay in the L2 have a kernel of their own, as long as its blocks are not too many for one wave or so
// (docs/cuda.md).
constexpr int64_t kSmallElements = int64_t{1} << 22, kSmallElementsFewRows = int64_t{1} << 20;
constexpr int kFewRows = 8, kMostSmallRows = 256, kMostSmallBlocks = 768;
// kMostPrologueRows: beyond, the fp32 stream is too much to be read by every block. kMostSmallNormRows: of weights, so
// that kMostSmallRows never make more than kMostSmallBlocks.
constexpr int kMostPrologueRows = 16, kMostPrologueRows8Bit = 8;
constexpr int kMostSmallNormRows = kMostSmallBlocks / (kMostSmallRows / 64) * 16;
static_assert(kMostPrologueRows8Bit >= kFewRows);  // up to which a launched norm would meet a product that takes none

bool IsSmall(const LinspecCudaMatrix& w) { return w.rows * w.cols <= kSmallElements; }

bool IsSmall(const LinspecCudaMatrix& w, int rows) {
  const int64_t blocks = (w.rows + 15) / 16 * ((rows + 63) / 64);
  return w.rows * w.cols <= (rows <= kFewRows ? kSmallElementsFewRows : kSmallElements) && rows <= kMostSmallRows &&
         blocks <= kMostSmallBlocks;
}

// Whether norms in front of the product are those of small products: by the matrix alone, because the bits are others.
bool TakesNormsAsSmall(const LinspecCudaMatrix& w) { return IsSmall(w) && w.rows <= kMostSmallNormRows; }

}  // namespace

int32_t Products::Reserve() {
  if (workspace_.as<void>() != nullptr) return kLinspecCudaOk;
  LINSPEC_CUDA_TRY(workspace_.Reserve(context_, StreamingGemmWorkspaceBytes()));
  return context_->Check(cudaMemsetAsync(workspace_.as<void>(), 0, StreamingGemmWorkspaceBytes(), context_->stream()),
                         "zero");
}

int64_t Products::bytes_to_reserve() const {
  return workspace_.as<void>() != nullptr ? 0 : StreamingGemmWorkspaceBytes();
}

// Where the library's kernels are faster than ours, measured on an H200 (docs/cuda.md). They make a row's bits depend
// on the number of rows.
bool Products::UsesCublas(const LinspecCudaMatrix& w, int rows) const {
  if (deterministic_ || context_->cublas() == nullptr || IsSmall(w, rows)) return false;
  if (w.type != kLinspecCudaBf16 && WgmmaGemmRuns()) return rows > kMaxOwnRowsWidened;
  return rows > (w.type != kLinspecCudaBf16 || WgmmaGemmRuns() ? kMaxOwnRows : kMaxOwnRowsBf16Below90);
}

// Where the chip has them. In deterministic mode by the matrix alone: their bits are their own, all others agree.
bool Products::UsesWgmma(const LinspecCudaMatrix& w, int rows) const {
  if (!WgmmaGemmRuns() || IsSmall(w, rows) || UsesCublas(w, rows)) return false;
  return !IsSmall(w) || (!deterministic_ && rows > kMaxRingRows);
}

// x is then rounded before it is scaled: in deterministic mode for all numbers of rows, of matrices where it is for
// any.
bool Products::NormIsPrologue(const LinspecCudaMatrix& w, int rows) const {
  if (TakesNormsAsSmall(w)) return rows <= (w.type == kLinspecCudaBf16 ? kMostPrologueRows : kMostPrologueRows8Bit);
  return !deterministic_ && !IsSmall(w, rows) && !UsesCublas(w, rows) && !UsesWgmma(w, rows) &&
         RingGemmTakesNorm(w, rows);
}

bool Products::TurnsHeads(const LinspecCudaMatrix& w, int head_dim, int rows) const {
  return UsesWgmma(w, rows) && WgmmaGemmTurnsHeads(head_dim);
}

void Products::LaunchOwn(const GemmParams& product, int rows) {
  const bool small_norm = product.norm_before.x != nullptr && TakesNormsAsSmall(product.w);
  if (small_norm || IsSmall(product.w, rows)) {
    LaunchSmallGemm(product, rows, context_->stream());
  } else if (UsesWgmma(product.w, rows)) {
    LaunchWgmmaGemm(product, rows, context_->stream());
  } else {
    (rows <= kMaxStreamedRows ? LaunchStreamingGemm : LaunchTiledGemm)(product, rows, context_->stream());
  }
}

void Products::Matmul(const LinspecCudaMatrix& w, const uint16_t* x, float* y, bool accumulate, int rows,
                      const NormBefore& before) {
  const GemmParams product{
      .w = w, .x = x, .y = y, .accumulate = accumulate, .workspace = workspace_.as<void>(), .norm_before = before};
  if (UsesCublas(w, rows) && context_->cublas()->Launch(product, rows, context_->stream()) == kLinspecCudaOk) return;
  LaunchOwn(product, rows);
}

void Products::Qkv(const LinspecCudaMatrix& w, const uint16_t* x, const RopeRows& rope, int rows,
                   const NormBefore& before) {
  const bool prologue = before.x != nullptr;  // which warpgroup products have none of
  if (prologue || !TurnsHeads(w, rope.head_dim, rows)) {
    Matmul(w, x, rope.qkv, /*accumulate=*/false, rows, before);
    return LaunchRopeNormalize(rope, rows, context_->stream());
  }
  LaunchOwn({.w = w,
             .x = x,
             .y = rope.qkv,
             .accumulate = false,
             .workspace = workspace_.as<void>(),
             .norm_before = before,
             .rope = rope},
            rows);
}

void Products::GateUp(const LinspecCudaMatrix& w, const uint16_t* x, uint16_t* scratch, uint16_t* activated, int rows,
                      const NormBefore& before) {
  GemmParams product{.w = w,
                     .x = x,
                     .y = nullptr,
                     .accumulate = false,
                     .y_bf16 = scratch,
                     .silu_mul = false,
                     .workspace = workspace_.as<void>(),
                     .norm_before = before};
  if (UsesCublas(w, rows) && context_->cublas()->Launch(product, rows, context_->stream()) == kLinspecCudaOk) {
    LaunchSiluMul(scratch, activated, w.rows / 2, rows, context_->stream());
    return;
  }
  product.y_bf16 = activated;
  product.silu_mul = true;
  LaunchOwn(product, rows);
}

NormBefore Products::Norm(const float* x, const NormAfter& norm, float eps, const LinspecCudaMatrix& next, int rows) {
  const NormBefore prologue{.eps = eps, .x = x, .weight = norm.weight};
  if (NormIsPrologue(next, rows)) return prologue;
  if (deterministic_ && TakesNormsAsSmall(next)) {
    LaunchNormForSmall(prologue, next, norm.out, norm.squares, rows, context_->stream());
    return {.scales = norm.squares};
  }
  LaunchRmsNorm({.x = x, .weight = norm.weight, .out = nullptr, .out_bf16 = norm.out, .dim = next.cols, .eps = eps},
                rows, context_->stream());
  return {};
}

NormBefore Products::AddAndNorm(const LinspecCudaMatrix& w, const uint16_t* x, float* y, const NormAfter& norm,
                                float eps, const LinspecCudaMatrix& next, int rows) {
  if (UsesWgmma(w, rows) && UsesWgmma(next, rows)) {
    LaunchOwn({.w = w, .x = x, .y = y, .accumulate = true, .workspace = workspace_.as<void>(), .norm_after = norm},
              rows);
    return {.eps = eps, .squares = norm.squares};
  }
  Matmul(w, x, y, /*accumulate=*/true, rows);
  return Norm(y, norm, eps, next, rows);
}

}  // namespace linspec::cuda
