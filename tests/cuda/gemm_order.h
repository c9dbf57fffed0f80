// Products that follow each other closely: what only goes wrong when memory answers late and out of order (gemm_test).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/cuda/gemm_wgmma.h"
#include "kernels/cuda/launch.h"
#include "tests/cuda/device_buffers.h"
#include "tests/cuda/report.h"

namespace linspec::cuda {

// Launches behind each other, each begun before the one ahead has ended, while copies keep the memory busy. The sums of
// all, by 64 and by 32 tokens against by 16 at a time, to the bit. product: of at least 64 tokens.
inline void KeepsOrderInARow(const std::string& name, const GemmParams& product) {
  constexpr int kLaunches = 3000, kTokens = 64;
  constexpr int64_t kCopied = int64_t{64} << 20;
  const DeviceArray<uint8_t> from(2 * kCopied);
  cudaStream_t busy = nullptr;
  Check(cudaStreamCreateWithFlags(&busy, cudaStreamNonBlocking), "stream");
  std::vector<float> expected;
  for (const int each : {16, 32, kTokens}) {
    const DeviceArray<float> y(std::vector<float>(int64_t{kTokens} * product.w.rows, 1.0f));
    for (int i = 0; i < kLaunches; ++i) {
      if (i % 8 == 0) {
        Check(cudaMemcpyAsync(from.get() + kCopied, from.get(), kCopied, cudaMemcpyDeviceToDevice, busy), "copy");
      }
      for (int first = 0; first < kTokens; first += each) {
        GemmParams params = product;
        params.x += int64_t{first} * product.w.cols;
        params.y = y.get() + int64_t{first} * product.w.rows;
        params.accumulate = true;
        LaunchWgmmaGemm(params, each, nullptr);
      }
    }
    Sync();
    const std::vector<float> sums = y.Read();
    if (expected.empty()) {
      expected = sums;
      continue;
    }
    Report(name + " wgmma " + std::to_string(kLaunches) + " in a row by " + std::to_string(each) + " beside copies",
           sums == expected ? 0.0 : 1.0, 0.0);
  }
  Check(cudaStreamDestroy(busy), "stream");
}

}  // namespace linspec::cuda
