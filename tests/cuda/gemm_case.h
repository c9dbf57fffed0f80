// One matrix product under test: its operands on the device and what comes out, in double (gemm_test).
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/cuda/launch.h"
#include "tests/cuda/device_buffers.h"
#include "tests/cuda/gemm_reference.h"
#include "tests/cuda/report.h"

namespace linspec::cuda {

inline constexpr int kMaxRows = 130;
inline constexpr float kWeightScale = 0.02f;

inline std::vector<float> Widen(const std::vector<uint16_t>& bits) {
  std::vector<float> values;
  values.reserve(bits.size());
  for (const uint16_t b : bits) values.push_back(std::bit_cast<float>(uint32_t{b} << 16));
  return values;
}

// A matrix and its products in double for `tokens` of kMaxRows tokens.
class GemmCase {
 public:
  GemmCase(int n, int k, int32_t type, uint8_t* workspace, int tokens = kMaxRows)
      : n_(n),
        k_(k),
        name_("gemm type " + std::to_string(type) + " n " + std::to_string(n) + " k " + std::to_string(k)),
        w_(int64_t{n} * k * (type == kLinspecCudaBf16 ? 2 : 1)),
        x_(int64_t{kMaxRows} * k),
        y_(int64_t{kMaxRows + 1} * n),
        scales_(Normal(random_, n, 0.01f)),
        workspace_(workspace) {
    LaunchFill(w_.get(), int64_t{n} * k, type, kWeightScale, 1, nullptr);
    LaunchFill(x_.get(), int64_t{kMaxRows} * k, kLinspecCudaBf16, 1.0f, 2, nullptr);
    matrix_ = {w_.get(), type == kLinspecCudaBf16 ? nullptr : scales_.get(), n, k, type, 0};
    const DeviceArray<double> reference(int64_t{tokens} * n);
    LaunchReferenceGemm({matrix_, x_.get(), y_.get(), false}, tokens, reference.get(), nullptr);
    Sync();
    for (const double value : reference.Read()) reference_.push_back(static_cast<float>(value));
  }

 protected:
  using Launcher = void (*)(const GemmParams&, int, cudaStream_t);
  GemmParams Params() const { return {matrix_, x_.get(), y_.get(), false, nullptr, false, workspace_}; }
  static std::vector<float> Head(std::vector<float> values, int64_t size) {
    values.resize(size);
    return values;
  }

  // y of `rows` tokens; the row after them must stay as it was, a NaN pattern.
  std::vector<float> Launch(Launcher launch, const GemmParams& params, int rows) {
    Check(cudaMemset(y_.get(), 0xFF, y_.size() * sizeof(float)), "poison");
    launch(params, rows, nullptr);
    Sync();
    std::vector<float> out = y_.Read();
    bool clean = true;
    for (int i = 0; i < n_; ++i) clean &= std::isnan(out[int64_t{rows} * n_ + i]);
    Report(name_ + " rows " + std::to_string(rows) + ": writes past the end", clean ? 0.0 : 1.0, 0.0);
    return Head(std::move(out), int64_t{rows} * n_);
  }

  std::mt19937 random_{7};
  int n_, k_;
  std::string name_;
  DeviceArray<uint8_t> w_;
  DeviceArray<uint16_t> x_;
  DeviceArray<float> y_, scales_;
  uint8_t* workspace_;
  LinspecCudaMatrix matrix_{};
  std::vector<float> reference_;
};

}  // namespace linspec::cuda
