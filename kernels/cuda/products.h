// Which kernel computes a matrix product of how many rows: our own, or cuBLASLt where it may be used and is faster.
//
// deterministic: no bit of a row depends on the number of rows beside it (docs/cuda.md). Owns the workspace of the
// split products, one for everything on the context's stream. Threads: one at a time per context.
#pragma once

#include <cstdint>

#include "kernels/cuda/context.h"
#include "kernels/cuda/launch.h"

namespace linspec::cuda {

class Products {
 public:
  Products(Context* context, bool deterministic) : context_(context), deterministic_(deterministic) {}

  int32_t Reserve();  // before the first product
  int64_t bytes_to_reserve() const;
  // y [rows, N] (+)= x [rows, K] w^T. before: what x still lacks, from Norm for this w.
  void Matmul(const LinspecCudaMatrix& w, const uint16_t* x, float* y, bool accumulate, int rows,
              const NormBefore& before = {});
  // rope.qkv [rows, N] = x w^T, then LaunchRopeNormalize, to the same bits whichever way.
  void Qkv(const LinspecCudaMatrix& w, const uint16_t* x, const RopeRows& rope, int rows, const NormBefore& before);
  // Whether that is one launch, unless a norm is its prologue.
  bool TurnsHeads(const LinspecCudaMatrix& w, int head_dim, int rows) const;
  // activated [rows, N / 2] = silu(gate) * up of w x, w in the order of PackedGateUpRow. scratch: [rows, N].
  void GateUp(const LinspecCudaMatrix& w, const uint16_t* x, uint16_t* scratch, uint16_t* activated, int rows,
              const NormBefore& before = {});
  // RMSNorm of x for the product of `next`: in bf16 in norm.out, complete, or but for what is returned and that product
  // must be told. norm.squares is scratch.
  NormBefore Norm(const float* x, const NormAfter& norm, float eps, const LinspecCudaMatrix& next, int rows);
  // y += x w^T, then Norm of y.
  NormBefore AddAndNorm(const LinspecCudaMatrix& w, const uint16_t* x, float* y, const NormAfter& norm, float eps,
                        const LinspecCudaMatrix& next, int rows);
  bool deterministic() const { return deterministic_; }

 private:
  bool UsesCublas(const LinspecCudaMatrix& w, int rows) const;
  bool UsesWgmma(const LinspecCudaMatrix& w, int rows) const;
  bool NormIsPrologue(const LinspecCudaMatrix& w, int rows) const;
  void LaunchOwn(const GemmParams& product, int rows);

  Context* const context_;
  const bool deterministic_;
  Buffer workspace_;
};

}  // namespace linspec::cuda
