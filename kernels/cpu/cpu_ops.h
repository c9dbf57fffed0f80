// The CPU implementation of CpuOps; see kernels/ops.h for the contract. Private to kernels/.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/aligned_vector.h"
#include "kernels/cpu/cpu_attention.h"
#include "kernels/cpu/isa_table.h"
#include "kernels/cpu/product_inputs.h"
#include "kernels/cpu/weight_arena.h"
#include "kernels/ops.h"
#include "kernels/thread_pool.h"

namespace linspec::cpu {

class CpuWeight : public PackedWeight {
 public:
  CpuWeight(int64_t rows, int64_t cols, DType dtype, WeightArena* arena);
  void Fill(const void* source, DType source_dtype, const float* row_scales);
  int64_t rows() const override { return rows_; }
  int64_t cols() const override { return cols_; }
  DType dtype() const override { return dtype_; }
  int64_t bytes() const override;
  PackedMatrix matrix() const;

 private:
  void FillInt8Row(const void* source, DType source_dtype, const float* row_scales, int64_t n);

  int64_t rows_, cols_;
  DType dtype_;
  int64_t data_bytes_;
  std::shared_ptr<uint8_t> data_;    // layout: PackedMatrix
  AlignedVector<float> scales_;      // i8 only, padded to whole blocks
  AlignedVector<int32_t> row_sums_;  // i8 only
};

class CpuOpsImpl : public CpuOps {
 public:
  CpuOpsImpl(Isa isa, int num_threads);
  Isa isa() const override { return isa_; }
  int num_threads() const override { return pool_.num_threads(); }
  std::unique_ptr<PackedWeight> Pack(const void* source, DType source_dtype, const float* row_scales, int64_t rows,
                                     int64_t cols, DType target) override;
  void Matmul(const MatmulParams&) override;
  void ProjectQkv(const MatmulParams& product, const RopeNormalizeParams& rope) override;
  void GatedMatmul(const GatedMatmulParams&) override;
  void RmsNorm(const RmsNormParams&) override;
  void SiluMul(const SiluMulParams&) override;
  void RopeNormalize(const RopeNormalizeParams&) override;
  void VerifyAttention(const VerifyAttentionParams&) override;
  void CommitAttention(std::span<const CommitAttentionParams> layers) override;
  void PrefillAttention(const PrefillAttentionParams&) override;

 private:
  // Waking the pool costs about a microsecond: small work stays on the caller.
  template <typename Body>
  void ForRows(int64_t num_rows, int64_t cost_per_row, Body body) {
    if (num_rows * cost_per_row < 16384) {
      for (int64_t m = 0; m < num_rows; ++m) body(m);
      return;
    }
    pool_.ParallelFor(num_rows, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) body(m);
    });
  }
  // y's blocks [block_begin, block_end) of 16 columns.
  void MultiplyBlocks(const MatmulParams& p, const ProductInput& x, int64_t block_begin, int64_t block_end);
  void UpdateRopeTable(const RopeNormalizeParams& p);
  // Heads [begin, end) of row m, counted from the first query head.
  void RopeHeads(const RopeNormalizeParams& p, int64_t m, int64_t begin, int64_t end);

  const Isa isa_;
  const IsaTable& table_;
  ThreadPool pool_;
  WeightArena arena_;
  ProductInputs inputs_;
  std::vector<AttentionScratch> attention_;  // [threads]
  struct {
    int head_dim = 0;
    float theta = 0;
    std::vector<int64_t> positions;
    AlignedVector<float> cosines, sines;  // [num_rows, head_dim / 2]
  } rope_;
};

}  // namespace linspec::cpu
