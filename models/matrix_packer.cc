#include "models/matrix_packer.h"

#include <algorithm>
#include <vector>

#include "models/weights.h"

namespace linspec {
namespace {

std::vector<float> Widened(const MatrixPart& part, int64_t cols) {
  if (part.tensor->dtype != DType::kI8) return ToFloats(*part.tensor);
  const auto* values = reinterpret_cast<const int8_t*>(part.tensor->data);
  std::vector<float> floats(part.tensor->num_elements());
  for (size_t i = 0; i < floats.size(); ++i) {
    floats[i] = static_cast<float>(values[i]) * part.row_scales[static_cast<int64_t>(i) / cols];
  }
  return floats;
}

class CpuPacker final : public MatrixPacker {
 public:
  explicit CpuPacker(CpuOps* ops) : ops_(ops) {}

  std::unique_ptr<PackedWeight> Pack(std::span<const MatrixPart> parts, int64_t cols, DType target) override {
    const DType dtype = parts[0].tensor->dtype;
    if (parts.size() == 1) {
      return ops_->Pack(parts[0].tensor->data, dtype, parts[0].row_scales, parts[0].rows(), cols, target);
    }
    const bool same =
        std::all_of(parts.begin(), parts.end(), [&](const MatrixPart& part) { return part.tensor->dtype == dtype; });
    return same ? PackSame(parts, cols, target) : PackMixed(parts, cols, target);
  }

 private:
  std::unique_ptr<PackedWeight> PackSame(std::span<const MatrixPart> parts, int64_t cols, DType target) {
    const DType dtype = parts[0].tensor->dtype;
    std::vector<std::byte> data;
    std::vector<float> scales;
    int64_t rows = 0;
    for (const MatrixPart& part : parts) rows += part.rows();
    data.reserve(rows * cols * DTypeSize(dtype));
    for (const MatrixPart& part : parts) {
      data.insert(data.end(), part.tensor->data, part.tensor->data + part.tensor->num_bytes);
      if (dtype == DType::kI8) scales.insert(scales.end(), part.row_scales, part.row_scales + part.rows());
    }
    return ops_->Pack(data.data(), dtype, scales.empty() ? nullptr : scales.data(), rows, cols, target);
  }

  std::unique_ptr<PackedWeight> PackMixed(std::span<const MatrixPart> parts, int64_t cols, DType target) {
    std::vector<float> data;
    int64_t rows = 0;
    for (const MatrixPart& part : parts) {
      const std::vector<float> floats = Widened(part, cols);
      data.insert(data.end(), floats.begin(), floats.end());
      rows += part.rows();
    }
    return ops_->Pack(data.data(), DType::kF32, nullptr, rows, cols, target);
  }

  CpuOps* ops_;
};

}  // namespace

std::unique_ptr<MatrixPacker> MakeCpuPacker(CpuOps* ops) { return std::make_unique<CpuPacker>(ops); }

}  // namespace linspec
