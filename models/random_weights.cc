#include <array>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/philox.h"
#include "models/transformer_builder.h"

namespace linspec {
namespace {

uint64_t Fnv1a(const std::string& text) {
  uint64_t hash = 0xCBF29CE484222325;
  for (const unsigned char c : text) hash = (hash ^ c) * 0x100000001B3;
  return hash;
}

// Values uniform in [center - spread, center + spread].
struct Range {
  float center, spread;
};

Range RangeOf(const std::string& name, const std::vector<int64_t>& shape) {
  if (name.ends_with("norm.weight")) return {1.0f, 0.1f};
  if (name.ends_with("global_decay")) return {0.9f, 0.1f};
  if (name.ends_with("global_factor") || name.ends_with("global_gain")) return {0.5f, 0.25f};
  if (name.ends_with("conv_taps")) return {0.0f, 0.5f};
  if (name.ends_with("embed_tokens.weight")) return {0.0f, 1.0f};
  return {0.0f, std::sqrt(3.0f / static_cast<float>(shape.back()))};  // keeps the variance of what it multiplies
}

class RandomWeights final : public WeightSource {
 public:
  RandomWeights(uint64_t seed, bool draw_matrices) : seed_(seed), draw_matrices_(draw_matrices) {}

  bool Has(const std::string& name) const override { return !name.ends_with("dwconv.weight"); }
  absl::Status CheckAllTaken() const override { return absl::OkStatus(); }

  absl::StatusOr<TensorView> Take(const std::string& name, std::vector<int64_t> shape) override {
    int64_t size = 1;
    for (const int64_t dim : shape) size *= dim;
    const auto [center, spread] = RangeOf(name, shape);
    const uint64_t stream = Fnv1a(name);
    TensorView tensor;
    tensor.dtype = DType::kF32;
    tensor.num_bytes = size * static_cast<int64_t>(sizeof(float));
    if (!draw_matrices_ && shape.size() == 2 && name.ends_with(".weight")) {
      tensor.shape = std::move(shape);
      tensor.random = RandomTensor{.seed = seed_, .stream = stream, .center = center, .spread = spread};
      return tensor;
    }
    tensor.shape = std::move(shape);
    auto values = std::make_shared<std::vector<float>>(size);
    for (int64_t i = 0; i < size; i += 4) {
      const std::array<uint32_t, 4> bits =
          Philox4x32({static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), static_cast<uint32_t>(stream),
                      static_cast<uint32_t>(stream >> 32)},
                     {static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32)});
      for (int64_t j = 0; j < 4 && i + j < size; ++j) {
        (*values)[i + j] = center + spread * (static_cast<float>(bits[j] >> 8) * 0x1p-23f - 1.0f);
      }
    }
    tensor.data = reinterpret_cast<const std::byte*>(values->data());
    tensor.owner = std::move(values);
    return tensor;
  }

 private:
  const uint64_t seed_;
  const bool draw_matrices_;
};

}  // namespace

std::unique_ptr<WeightSource> MakeRandomWeights(uint64_t seed, bool draw_matrices) {
  return std::make_unique<RandomWeights>(seed, draw_matrices);
}

}  // namespace linspec
