#include "models/tensor_reader.h"

#include <fmt/format.h>

#include <utility>

namespace linspec {
namespace {

bool IsFloat(DType dtype) { return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16; }

}  // namespace

absl::StatusOr<std::optional<DType>> ParseWeightDType(const std::string& name) {
  if (name == "auto") return std::optional<DType>();
  if (name == "f32") return std::optional(DType::kF32);
  if (name == "bf16") return std::optional(DType::kBF16);
  if (name == "int8") return std::optional(DType::kI8);
  if (name == "fp8") return std::optional(DType::kF8);
  return absl::InvalidArgumentError(fmt::format("weight dtype \"{}\": expected auto, f32, bf16, int8 or fp8", name));
}

void TensorReader::Fail(const std::string& message) {
  if (status_.ok()) status_ = absl::InvalidArgumentError(message);
}

TensorView TensorReader::Take(const std::string& name, std::vector<int64_t> shape) {
  if (!status_.ok()) return {};
  absl::StatusOr<TensorView> tensor = source_->Take(name, std::move(shape));
  if (tensor.ok()) return *std::move(tensor);
  status_ = tensor.status();
  return {};
}

std::vector<float> TensorReader::Vector(const std::string& name, std::vector<int64_t> shape) {
  const TensorView tensor = Take(name, std::move(shape));
  if (!status_.ok()) return {};
  if (IsFloat(tensor.dtype)) return ToFloats(tensor);
  Fail(fmt::format("tensor {} is {}, expected a float type", name, DTypeName(tensor.dtype)));
  return {};
}

StoredMatrix TensorReader::Matrix(const std::string& name, int64_t rows, int64_t cols) {
  StoredMatrix matrix{.name = name, .tensor = Take(name, {rows, cols}), .row_scales = {}};
  if (!status_.ok()) return matrix;
  if (matrix.tensor.dtype == DType::kI8) {
    matrix.row_scales = Take(name + "_scale", {rows});
    if (status_.ok() && matrix.row_scales.dtype != DType::kF32) {
      Fail(fmt::format("tensor {}_scale is {}, expected F32", name, DTypeName(matrix.row_scales.dtype)));
    }
  } else if (!IsFloat(matrix.tensor.dtype)) {
    Fail(fmt::format("tensor {} is {}, expected F32, F16, BF16 or I8", name, DTypeName(matrix.tensor.dtype)));
  }
  return matrix;
}

std::unique_ptr<PackedWeight> TensorReader::Pack(const StoredMatrix& matrix) {
  if (!status_.ok()) return nullptr;
  return PackParts({matrix}, matrix.tensor.shape[1]);
}

std::vector<StoredMatrix> TensorReader::Matrices(const std::vector<MatrixShape>& shapes, int64_t cols) {
  std::vector<StoredMatrix> parts;
  for (const MatrixShape& shape : shapes) parts.push_back(Matrix(shape.name, shape.rows, cols));
  return parts;
}

std::unique_ptr<PackedWeight> TensorReader::Fused(const std::vector<MatrixShape>& shapes, int64_t cols) {
  const std::vector<StoredMatrix> parts = Matrices(shapes, cols);
  return status_.ok() ? PackParts(parts, cols) : nullptr;
}

std::unique_ptr<PackedWeight> TensorReader::GateUp(const std::vector<MatrixShape>& gate_and_up, int64_t cols) {
  const std::vector<StoredMatrix> parts = Matrices(gate_and_up, cols);
  return status_.ok() ? PackParts(parts, cols, /*gate_up=*/true) : nullptr;
}

// Parts of different types become what F32 would.
std::unique_ptr<PackedWeight> TensorReader::PackParts(const std::vector<StoredMatrix>& parts, int64_t cols,
                                                      bool gate_up) {
  const DType dtype = parts[0].tensor.dtype;
  bool same = true;
  std::vector<MatrixPart> views;
  for (const StoredMatrix& part : parts) {
    same &= part.tensor.dtype == dtype;
    views.push_back({.tensor = &part.tensor, .row_scales = part.scales()});
  }
  const DType target = Target(same ? dtype : DType::kF32);
  std::unique_ptr<PackedWeight> packed =
      gate_up ? packer_->PackGateUp(views, cols, target) : packer_->Pack(views, cols, target);
  if (packed == nullptr) status_ = packer_->status();
  return packed;
}

}  // namespace linspec
