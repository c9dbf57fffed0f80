// Turns stored weight matrices into what a machine multiplies with: the seam between loading and CPU or GPU.
//
// Threads: one thread (loading). Sources are borrowed for the call.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "kernels/ops.h"
#include "models/safetensors.h"

namespace linspec {

// Rows of a matrix as stored; several parts of the same width stack.
struct MatrixPart {
  const TensorView* tensor;  // [rows, cols] F32, F16, BF16 or I8; data null: to be drawn (tensor->random)
  const float* row_scales;   // [rows] for I8
  int64_t rows() const { return tensor->shape[0]; }
};

class MatrixPacker {
 public:
  virtual ~MatrixPacker() = default;
  // Null when it failed: status() says why, from then on.
  virtual std::unique_ptr<PackedWeight> Pack(std::span<const MatrixPart> parts, int64_t cols, DType target) = 0;
  // gate and up of an MLP, in the order that the machine's product wants them.
  virtual std::unique_ptr<PackedWeight> PackGateUp(std::span<const MatrixPart> parts, int64_t cols, DType target) {
    return Pack(parts, cols, target);
  }
  virtual absl::Status status() const { return absl::OkStatus(); }
};

// For the CPU, with ops that outlives the packer.
std::unique_ptr<MatrixPacker> MakeCpuPacker(CpuOps* ops);

}  // namespace linspec
