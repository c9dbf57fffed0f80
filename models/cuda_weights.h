// Weight matrices in GPU memory: converted there, part by part, straight from where the file is mapped.
#pragma once

#include <memory>

#include "kernels/cuda_device.h"
#include "models/matrix_packer.h"

namespace linspec {

class CudaMatrix final : public PackedWeight {
 public:
  CudaMatrix(LinspecCudaMatrix matrix, DType dtype, CudaMemory data, CudaMemory scales)
      : matrix_(matrix), dtype_(dtype), data_(std::move(data)), scales_(std::move(scales)) {}
  int64_t rows() const override { return matrix_.rows; }
  int64_t cols() const override { return matrix_.cols; }
  DType dtype() const override { return dtype_; }
  int64_t bytes() const override { return data_.bytes() + scales_.bytes(); }
  const LinspecCudaMatrix& matrix() const { return matrix_; }

 private:
  const LinspecCudaMatrix matrix_;
  const DType dtype_;
  CudaMemory data_, scales_;
};

// Packs into CudaMatrix; targets kBF16, kI8, kF8.
std::unique_ptr<MatrixPacker> MakeCudaPacker(std::shared_ptr<CudaDevice> device);

}  // namespace linspec
