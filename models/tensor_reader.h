// Takes named tensors out of a WeightSource and packs them for the machine. The first error stays: later calls return
// empty values, so a loader checks status() once per layer and not per tensor.
//
// Ownership: source, packer and ops are borrowed. Threads: one thread (loading).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "kernels/ops.h"
#include "models/matrix_packer.h"
#include "models/weights.h"

namespace linspec {

// A 2-D weight as stored. row_scales belong to I8.
struct StoredMatrix {
  std::string name;
  TensorView tensor;
  TensorView row_scales;
  int64_t rows() const { return tensor.shape[0]; }
  const float* scales() const { return reinterpret_cast<const float*>(row_scales.data); }
};

struct MatrixShape {
  std::string name;
  int64_t rows;
};

// "auto" (none), "f32", "bf16" or "int8".
absl::StatusOr<std::optional<DType>> ParseWeightDType(const std::string& name);

class TensorReader {
 public:
  // target: of every packed matrix; none: I8 stays, the rest becomes bf16.
  TensorReader(WeightSource* source, MatrixPacker* packer, std::optional<DType> target)
      : source_(source), packer_(packer), target_(target) {}
  TensorReader(WeightSource* source, CpuOps* ops, std::optional<DType> target)
      : source_(source), cpu_packer_(MakeCpuPacker(ops)), packer_(cpu_packer_.get()), target_(target) {}

  const absl::Status& status() const { return status_; }
  bool Has(const std::string& name) const { return source_->Has(name); }
  void Fail(const std::string& message);  // INVALID_ARGUMENT, unless something failed before

  std::vector<float> Vector(const std::string& name, std::vector<int64_t> shape);  // a float type, widened
  StoredMatrix Matrix(const std::string& name, int64_t rows, int64_t cols);        // I8 comes with `name`_scale
  std::unique_ptr<PackedWeight> Pack(const StoredMatrix& matrix);
  // Several matrices of the same width as one, rows in the given order.
  std::unique_ptr<PackedWeight> Fused(const std::vector<MatrixShape>& shapes, int64_t cols);
  std::unique_ptr<PackedWeight> GateUp(const std::vector<MatrixShape>& gate_and_up, int64_t cols);

 private:
  TensorView Take(const std::string& name, std::vector<int64_t> shape);
  std::vector<StoredMatrix> Matrices(const std::vector<MatrixShape>& shapes, int64_t cols);
  std::unique_ptr<PackedWeight> PackParts(const std::vector<StoredMatrix>& parts, int64_t cols, bool gate_up = false);
  DType Target(DType stored) const { return target_.value_or(stored == DType::kI8 ? DType::kI8 : DType::kBF16); }

  WeightSource* source_;
  std::unique_ptr<MatrixPacker> cpu_packer_;  // when made from ops
  MatrixPacker* packer_;
  std::optional<DType> target_;
  absl::Status status_;
};

}  // namespace linspec
