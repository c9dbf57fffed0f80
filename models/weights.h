// The tensors of a model folder, handed out once each and strictly: missing, mis-shaped or left over is an error.
//
// Threads: one thread (loading). Views outlive the map.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "models/safetensors.h"

namespace linspec {

// Where a model's tensors come from: a folder, or a random generator for tests and benchmarks.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  virtual bool Has(const std::string& name) const = 0;
  // The tensor, finite throughout and of exactly this shape; each name once. Errors name tensor and shapes.
  virtual absl::StatusOr<TensorView> Take(const std::string& name, std::vector<int64_t> shape) = 0;
  // OK when every tensor was taken, else names the first that was not.
  virtual absl::Status CheckAllTaken() const = 0;
};

class WeightMap final : public WeightSource {
 public:
  // Opens model.safetensors, or the shards that model.safetensors.index.json lists (plain file names in the folder).
  // NOT_FOUND if there is neither; FAILED_PRECONDITION if there are only pickled weights.
  static absl::StatusOr<std::unique_ptr<WeightMap>> Open(const std::string& folder);
  // Opens one safetensors file.
  static absl::StatusOr<std::unique_ptr<WeightMap>> OpenFile(const std::string& path);

  bool Has(const std::string& name) const override { return tensors_.contains(name); }
  absl::StatusOr<TensorView> Take(const std::string& name, std::vector<int64_t> shape) override;
  absl::Status CheckAllTaken() const override;

 private:
  WeightMap(std::string path, TensorMap tensors) : path_(std::move(path)), tensors_(std::move(tensors)) {}
  std::string path_;   // folder or file
  TensorMap tensors_;  // not yet taken
};

inline constexpr int64_t kMaxConfigBytes = 1 << 20;  // of a JSON file that describes a model or heads

// Whole small text file. NOT_FOUND, PERMISSION_DENIED, or INVALID_ARGUMENT over max_bytes; the message names the path.
absl::StatusOr<std::string> ReadTextFile(const std::string& path, int64_t max_bytes);

// Elements of a float tensor (F32, F16, BF16) as fp32.
std::vector<float> ToFloats(const TensorView& tensor);

}  // namespace linspec
