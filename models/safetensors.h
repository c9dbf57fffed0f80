// One safetensors file: https://huggingface.co/docs/safetensors, read with suspicion.
//
// Ownership: the file is mapped, tensors are views into the map; a TensorView keeps what it points into alive.
// The file must not shrink while views exist. Threads: immutable after opening.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/dtype.h"

namespace linspec {

// Values that are drawn instead of stored (models/random_weights.cc): center + spread * u, u uniform in [-1, 1).
struct RandomTensor {
  uint64_t seed, stream;
  float center, spread;
};

struct TensorView {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;  // row-major, aligned to its element size
  int64_t num_bytes = 0;
  std::shared_ptr<const void> owner;   // mapping or buffer
  std::optional<RandomTensor> random;  // then data is null

  int64_t num_elements() const { return num_bytes / static_cast<int64_t>(DTypeSize(dtype)); }
};

// "[2, 3]"
std::string ShapeText(std::span<const int64_t> shape);

using TensorMap = std::map<std::string, TensorView>;

// Errors name the file, and the tensor where there is one. INVALID_ARGUMENT: header or offsets that are out of bounds,
// overlapping, leaving holes, of an unknown dtype, or not agreeing with the shape; NOT_FOUND, PERMISSION_DENIED.
absl::StatusOr<TensorMap> OpenSafetensors(const std::string& path);
// The same on bytes that owner keeps alive; name stands for the path in messages.
absl::StatusOr<TensorMap> ParseSafetensors(std::span<const std::byte> bytes, std::shared_ptr<const void> owner,
                                           const std::string& name);

}  // namespace linspec
