#include "kernels/cuda/products.h"

#include "kernels/cuda/gemm_ring.h"
#include "kernels/cuda/gemm_wgmma.h"

namespace linspec::cuda {
namespace {

constexpr int kMaxRingRows = kRingNormRows;                  // beyond, on sm_90: warpgroup instructions
constexpr int kMaxOwnRows = 64, kMaxOwnRowsBf16Below90 = 8;  // beyond: cuBLASLt, where it may be used
constexpr int kMaxOwnRowsWidened = 512;                      // the same of int8 and fp8 by warpgroup instructions
constexpr int kMaxStreamedRows = 64;                         // of our kernels without those instructions, beyond: tiled
// Matrices that stay in the L2 have a kernel of their own, as long as its blocks are not too many for one wave or so
// (docs/cuda.md).
constexpr int64_t kSmallElements = int64_t{1} << 22, kSmallElementsFewRows = int64_t{1} << 20;
constexpr int kFewRows = 8, kMostSmallRows = 256, kMostSmallBlocks = 768;

bool IsSmall(const LinspecCudaMatrix& w) { return w.rows * w.cols <= kSmallElements; }

bool IsSmall(const LinspecCudaMatrix& w, int rows) {
  const int64_t blocks = (w.rows + 15) / 16 * ((rows + 63) / 64);
  return w.rows * w.cols <= (rows <= kFewRows ? kSmallElementsFewRows : kSmallElements) && rows <= kMostSmallRows &&
         blocks <= kMostSmallBlocks;
}

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

// Where the library's kernels are faster than ours, measured on an H200 (docs/cuda.md). They make a row's bits depend on
// the number of rows.
bool Products::UsesCublas(const LinspecCudaMatrix& w, int rows) const {
  if (deterministic_ || context_->cublas() == nullptr || IsSmall(w, rows)) return false;
  if (w.type != kLinspecCudaBf16 && WgmmaGemmRuns()) return rows > kMaxOwnRowsWidened;
  return rows > (w.type != kLinspecCudaBf16 || WgmmaGemmRuns() ? kMaxOwnRows : kMaxOwnRowsBf16Below90);
}

// Of our kernels the fastest, or in deterministic mode one whose bits are the same for any number of rows: those of the
// warpgroup kernel are its own, all others agree.
bool Products::UsesWgmma(const LinspecCudaMatrix& w, int rows) const {
  if (!WgmmaGemmRuns() || IsSmall(w, rows) || UsesCublas(w, rows)) return false;
  return deterministic_ ? !IsSmall(w) : rows > kMaxRingRows;
}

// What the norms are then rounded to depends on the kind of product, which is not for deterministic mode.
bool Products::UsesRingWithNorms(const LinspecCudaMatrix& w, int rows) const {
  return !deterministic_ && !IsSmall(w, rows) && !UsesCublas(w, rows) && RingGemmTakesNorms(w, rows);
}

void Products::LaunchOwn(const GemmParams& product, int rows) {
  if (UsesWgmma(product.w, rows)) {
    LaunchWgmmaGemm(product, rows, context_->stream());
  } else if (IsSmall(product.w, rows)) {
    LaunchSmallGemm(product, rows, context_->stream());
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

NormBefore Products::AddAndNorm(const LinspecCudaMatrix& w, const uint16_t* x, float* y, const NormAfter& after,
                                float eps, const LinspecCudaMatrix& next, int rows) {
  const bool wgmma = UsesWgmma(w, rows) && UsesWgmma(next, rows);
  if (wgmma || (UsesRingWithNorms(w, rows) && UsesRingWithNorms(next, rows))) {
    LaunchOwn({.w = w, .x = x, .y = y, .accumulate = true, .workspace = workspace_.as<void>(), .norm_after = after},
              rows);
    return {.squares = after.squares, .eps = eps};
  }
  Matmul(w, x, y, /*accumulate=*/true, rows);
  LaunchRmsNorm({.x = y, .weight = after.weight, .out = nullptr, .out_bf16 = after.out, .dim = w.rows, .eps = eps},
                rows, context_->stream());
  return {};
}

}  // namespace linspec::cuda
