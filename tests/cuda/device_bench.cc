// Matrix products at LLaMA-2-7B layer shape (attention: attention_bench.cc): every time beside its floor, from the
// read bandwidth measured in this run. Buffers rotate so that nothing is served from the L2. Medians of event times.
#include <cstdint>

#include "kernels/cuda/launch.h"
#include "tests/cuda/device_buffers.h"
#include "tests/cuda/per_node.h"

namespace linspec::cuda {
namespace {

double ReadBandwidth() {
  const int blocks = 132 * 8;
  const int64_t floats = int64_t{1} << 29;
  const DeviceArray<float> data(floats), out(blocks);
  Check(cudaMemset(data.get(), 0x3D, floats * 4), "fill");
  const double us = MedianMicroseconds([&](int) { LaunchRead(data.get(), floats, out.get(), blocks, nullptr); });
  return static_cast<double>(floats * 4) / us * 1e-6;
}

double CopyBandwidth() {
  const int64_t bytes = int64_t{1} << 30;
  const DeviceArray<uint8_t> from(bytes), to(bytes);
  const double us =
      MedianMicroseconds([&](int) { cudaMemcpyAsync(to.get(), from.get(), bytes, cudaMemcpyDeviceToDevice, nullptr); });
  return 2.0 * static_cast<double>(bytes) / us * 1e-6;
}

void BenchGemm(int n, int k, int type, double bandwidth) {
  const int64_t bytes = int64_t{n} * k * (type == kLinspecCudaBf16 ? 2 : 1);
  const int copies = std::max<int>(2, static_cast<int>((int64_t{1} << 29) / bytes));
  std::mt19937 random(2);
  std::vector<uint32_t> host(bytes / 4);
  for (uint32_t& word : host) word = random() & 0xBF7FBF7Fu & (type == kLinspecCudaFp8 ? 0xF7F7F7F7u : ~0u);  // finite
  const DeviceArray<uint8_t> w(copies * bytes);
  for (int i = 0; i < copies; ++i)
    Check(cudaMemcpy(w.get() + i * bytes, host.data(), bytes, cudaMemcpyHostToDevice), "upload");
  const DeviceArray<uint8_t> workspace(std::vector<uint8_t>(static_cast<size_t>(StreamingGemmWorkspaceBytes()), 0));
  const DeviceArray<float> scales(std::vector<float>(n, 0.01f)), y(int64_t{256} * n);
  std::vector<uint16_t> activations(int64_t{256} * k);
  for (uint16_t& x : activations) x = static_cast<uint16_t>(0x3F00 | (random() & 0x80FF));
  const DeviceArray<uint16_t> x(activations);
  for (const int rows : {1, 2, 4, 8, 16, 32, 64, 128, 256}) {
    const double us = MedianMicroseconds([&](int i) {
      const LinspecCudaMatrix matrix{
          w.get() + i % copies * bytes, type == kLinspecCudaBf16 ? nullptr : scales.get(), n, k, type, 0};
      LaunchStreamingGemm({matrix, x.get(), y.get(), false, nullptr, false, workspace.get()}, rows, nullptr);
    });
    const double floor = static_cast<double>(bytes) / bandwidth * 1e-6;
    std::printf("gemm type %d %5d x %5d rows %3d: %8.1f us, weight floor %7.1f us, %5.1f %%, %6.1f TFLOP/s\n", type, n,
                k, rows, us, floor, 100.0 * floor / us, 2.0 * rows * n * k / us * 1e-6);
  }
}

}  // namespace
}  // namespace linspec::cuda

int main() {
  using namespace linspec::cuda;
  Check(cudaSetDevice(0), "no usable GPU");
  const double bandwidth = ReadBandwidth();
  std::printf("ceilings: read %.2f TB/s, copy %.2f TB/s (read + write)\n", bandwidth, CopyBandwidth());
  for (const auto& [n, k] : {std::pair{12288, 4096}, {4096, 4096}, {22016, 4096}, {4096, 11008}}) {
    BenchGemm(n, k, kLinspecCudaBf16, bandwidth);
  }
  BenchGemm(12288, 4096, kLinspecCudaI8, bandwidth);
  BenchGemm(12288, 4096, kLinspecCudaFp8, bandwidth);
  return 0;
}
