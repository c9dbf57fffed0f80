#include "models/cuda_weights.h"

#include <fmt/format.h>

#include <string>
#include <utility>

namespace linspec {
namespace {

absl::StatusOr<int32_t> CudaType(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return kLinspecCudaF32;
    case DType::kF16:
      return kLinspecCudaF16;
    case DType::kBF16:
      return kLinspecCudaBf16;
    case DType::kI8:
      return kLinspecCudaI8;
    case DType::kF8:
      return kLinspecCudaFp8;
    default:
      return absl::UnimplementedError(fmt::format("no weights of type {} on a GPU", DTypeName(dtype)));
  }
}

class CudaPacker final : public MatrixPacker {
 public:
  explicit CudaPacker(std::shared_ptr<CudaDevice> device) : device_(std::move(device)) {}

  std::unique_ptr<PackedWeight> Pack(std::span<const MatrixPart> parts, int64_t cols, DType target) override {
    return Keep(TryPack(parts, cols, target, /*interleave=*/false));
  }
  std::unique_ptr<PackedWeight> PackGateUp(std::span<const MatrixPart> parts, int64_t cols, DType target) override {
    return Keep(TryPack(parts, cols, target, /*interleave=*/true));
  }
  absl::Status status() const override { return status_; }

 private:
  std::unique_ptr<PackedWeight> Keep(absl::StatusOr<std::unique_ptr<PackedWeight>> packed) {
    if (packed.ok()) return *std::move(packed);
    status_ = packed.status();
    return nullptr;
  }

  // interleave: two parts of equal height, 8 rows of the one and 8 of the other in turn.
  absl::StatusOr<std::unique_ptr<PackedWeight>> TryPack(std::span<const MatrixPart> parts, int64_t cols, DType target,
                                                        bool interleave) {
    if (!status_.ok()) return status_;
    if (target != DType::kBF16 && target != DType::kI8 && target != DType::kF8) {
      return absl::UnimplementedError(
          fmt::format("no products with {} weights on a GPU; use bf16, int8 or fp8", DTypeName(target)));
    }
    int64_t rows = 0;
    for (const MatrixPart& part : parts) rows += part.rows();
    const bool scaled = target != DType::kBF16;
    auto data = CudaMemory::Allocate(device_, rows * cols * static_cast<int64_t>(DTypeSize(target)));
    if (!data.ok()) return data.status();
    CudaMemory scales;
    if (scaled) {
      auto memory = CudaMemory::Allocate(device_, rows * static_cast<int64_t>(sizeof(float)));
      if (!memory.ok()) return memory.status();
      scales = *std::move(memory);
    }
    const LinspecCudaMatrix matrix{.data = data->as<void>(),
                                   .scales = scales.as<float>(),
                                   .rows = rows,
                                   .cols = cols,
                                   .type = *CudaType(target),
                                   .reserved = 0};
    int64_t row = 0;
    for (const MatrixPart& part : parts) {
      if (absl::Status packed = PackPart(part, row, interleave, matrix); !packed.ok()) return packed;
      row += interleave ? 8 : part.rows();
    }
    return std::make_unique<CudaMatrix>(matrix, target, *std::move(data), std::move(scales));
  }

  absl::Status PackPart(const MatrixPart& part, int64_t row_begin, bool interleave, const LinspecCudaMatrix& matrix) {
    const auto type = CudaType(part.tensor->dtype);
    if (!type.ok()) return type.status();
    LinspecCudaSource source = {};
    source.data = part.tensor->data;
    source.scales = part.row_scales;
    source.rows = part.rows();
    source.cols = matrix.cols;
    source.row_begin = row_begin;
    source.type = *type;
    source.interleave = interleave;
    if (part.tensor->random) {
      source.seed = part.tensor->random->seed;
      source.stream = part.tensor->random->stream;
      source.center = part.tensor->random->center;
      source.spread = part.tensor->random->spread;
    }
    return device_->Check(device_->api().pack(device_->context(), &source, &matrix), "load weights");
  }

  std::shared_ptr<CudaDevice> device_;
  absl::Status status_;
};

}  // namespace

std::unique_ptr<MatrixPacker> MakeCudaPacker(std::shared_ptr<CudaDevice> device) {
  return std::make_unique<CudaPacker>(std::move(device));
}

}  // namespace linspec
