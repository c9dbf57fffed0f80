#include "models/tensor_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <utility>

namespace linspec {
namespace {

bool IsFloat(DType dtype) { return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16; }

std::vector<float> Widened(const StoredMatrix& matrix) {
  if (matrix.tensor.dtype != DType::kI8) return ToFloats(matrix.tensor);
  const auto* values = reinterpret_cast<const int8_t*>(matrix.tensor.data);
  const int64_t cols = matrix.tensor.shape[1];
  std::vector<float> floats(matrix.tensor.num_elements());
  for (int64_t i = 0; i < matrix.tensor.num_elements(); ++i) {
    floats[i] = static_cast<float>(values[i]) * matrix.scales()[i / cols];
  }
  return floats;
}

}  // namespace

absl::StatusOr<std::optional<DType>> ParseWeightDType(const std::string& name) {
  if (name == "auto") return std::optional<DType>();
  if (name == "f32") return std::optional(DType::kF32);
  if (name == "bf16") return std::optional(DType::kBF16);
  if (name == "int8") return std::optional(DType::kI8);
  return absl::InvalidArgumentError(fmt::format("weight dtype \"{}\": expected auto, f32, bf16 or int8", name));
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
  const DType dtype = matrix.tensor.dtype;
  return ops_->Pack(matrix.tensor.data, dtype, matrix.scales(), matrix.rows(), matrix.tensor.shape[1], Target(dtype));
}

std::unique_ptr<PackedWeight> TensorReader::Fused(const std::vector<MatrixShape>& shapes, int64_t cols) {
  std::vector<StoredMatrix> parts;
  int64_t rows = 0;
  for (const MatrixShape& shape : shapes) {
    parts.push_back(Matrix(shape.name, shape.rows, cols));
    if (!status_.ok()) return nullptr;
    rows += shape.rows;
  }
  if (parts.size() == 1) return Pack(parts[0]);
  const DType dtype = parts[0].tensor.dtype;
  const bool same =
      std::all_of(parts.begin(), parts.end(), [&](const StoredMatrix& m) { return m.tensor.dtype == dtype; });
  return same ? PackSame(parts, rows, cols) : PackMixed(parts, rows, cols);
}

std::unique_ptr<PackedWeight> TensorReader::PackSame(const std::vector<StoredMatrix>& parts, int64_t rows,
                                                     int64_t cols) {
  const DType dtype = parts[0].tensor.dtype;
  std::vector<std::byte> data;
  std::vector<float> scales;
  data.reserve(rows * cols * DTypeSize(dtype));
  for (const StoredMatrix& part : parts) {
    data.insert(data.end(), part.tensor.data, part.tensor.data + part.tensor.num_bytes);
    if (dtype == DType::kI8) scales.insert(scales.end(), part.scales(), part.scales() + part.rows());
  }
  return ops_->Pack(data.data(), dtype, scales.empty() ? nullptr : scales.data(), rows, cols, Target(dtype));
}

std::unique_ptr<PackedWeight> TensorReader::PackMixed(const std::vector<StoredMatrix>& parts, int64_t rows,
                                                      int64_t cols) {
  std::vector<float> data;
  data.reserve(rows * cols);
  for (const StoredMatrix& part : parts) {
    const std::vector<float> floats = Widened(part);
    data.insert(data.end(), floats.begin(), floats.end());
  }
  return ops_->Pack(data.data(), DType::kF32, nullptr, rows, cols, Target(DType::kF32));
}

}  // namespace linspec
