// Device benchmark at LLaMA-2-7B layer shape: every time beside its floor, from the read bandwidth measured in this
// run. Buffers rotate so that nothing is served from the L2. Medians of event times.
#include <cstdint>

#include "kernels/cuda/launch.h"
#include "tests/cuda/device_buffers.h"
#include "tests/cuda/per_node.h"

namespace linspec::cuda {
namespace {

constexpr int kHeads = 32, kDim = 128, kGroup = 64, kConv = 32, kHidden = 4096;
constexpr int kLength = 64 * 15 + 31;  // half a group in the ring
constexpr int64_t kStateFloats = int64_t{kHeads} * (kDim * kDim + 2 * kGroup * kDim);

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

void BenchVerify(int requests, int nodes, double bandwidth) {
  std::mt19937 random(1);
  const int copies = std::max<int>(1, static_cast<int>((int64_t{1} << 29) / (requests * kStateFloats * 4)));
  const int rows = requests * nodes;
  const std::vector<float> one = Normal(random, kStateFloats, 0.05f);
  const DeviceArray<float> states(int64_t{copies} * requests * kStateFloats);
  for (int i = 0; i < copies * requests; ++i) {
    Check(cudaMemcpy(states.get() + i * kStateFloats, one.data(), kStateFloats * 4, cudaMemcpyHostToDevice), "upload");
  }
  std::vector<uint64_t> ancestors;
  std::vector<Task> tasks;
  for (int r = 0; r < requests; ++r) {
    tasks.push_back({kLength, r, r * nodes, nodes, 0, 0});
    for (int i = 0; i < nodes; ++i) {  // a binary tree
      ancestors.push_back((i == 0 ? 0 : ancestors[r * nodes + (i - 1) / 2]) | uint64_t{1} << i);
    }
  }
  const DeviceArray<float> qkv(Normal(random, int64_t{rows} * 3 * kHidden, 0.088f)), out(int64_t{rows} * kHidden);
  const DeviceArray<float> gain(std::vector<float>(kHeads, 0.5f)), taps(Normal(random, kHeads * kConv, 0.3f));
  const DeviceArray<float> decay(std::vector<float>(kHeads, 0.9f));
  const DeviceArray<uint64_t> device_ancestors(ancestors);
  const DeviceArray<Task> device_tasks(tasks);
  const auto run = [&](int i) {
    LaunchVerify({.layer = {kHeads, kHeads, kDim, kGroup, kConv, 1, Global::kRmsNorm, 1.0f, 1e-6f, gain.get(),
                            decay.get(), taps.get()},
                  .states = {states.get() + i % copies * requests * kStateFloats, kStateFloats, 0},
                  .tasks = device_tasks.get(),
                  .qkv = qkv.get(),
                  .ancestors = device_ancestors.get(),
                  .paths = nullptr,
                  .out = out.get(),
                  .out_bf16 = nullptr},
                 requests, nullptr);
  };
  const double us = MedianMicroseconds(run);
  const double bytes = 4.0 * kHeads * (requests * (kDim * kDim + 2.0 * (kLength % kGroup) * kDim) + rows * 4.0 * kDim);
  const double floor = bytes / bandwidth * 1e-6;
  std::printf("verify    requests %3d nodes %2d: %9.1f us, floor %8.1f us, %5.1f %% of the floor's speed", requests,
              nodes, us, floor, 100.0 * floor / us);
  const int64_t node_bytes = int64_t{rows} * kHeads * kDim * kDim * 4;
  const DeviceArray<float> node_states(node_bytes / 4);
  const double per_node = MedianMicroseconds([&](int) {
    LaunchPerNodeVerify(states.get(), node_states.get(), qkv.get(), out.get(), requests, nodes, kHeads, nullptr);
  });
  std::printf("; per-node states %9.1f us, %.1f x our bytes\n", per_node,
              (static_cast<double>(node_bytes) + requests * kHeads * kDim * kDim * 4.0) / bytes);
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
  const DeviceArray<float> scales(std::vector<float>(n, 0.01f)), y(int64_t{256} * n);
  std::vector<uint16_t> activations(int64_t{256} * k);
  for (uint16_t& x : activations) x = static_cast<uint16_t>(0x3F00 | (random() & 0x80FF));
  const DeviceArray<uint16_t> x(activations);
  for (const int rows : {1, 2, 4, 8, 16, 32, 64, 128, 256}) {
    const double us = MedianMicroseconds([&](int i) {
      const LinspecCudaMatrix matrix{
          w.get() + i % copies * bytes, type == kLinspecCudaBf16 ? nullptr : scales.get(), n, k, type, 0};
      LaunchStreamingGemm({matrix, x.get(), y.get(), false}, rows, nullptr);
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
  for (const auto& [requests, nodes] : {std::pair{1, 1}, {1, 64}, {4, 32}, {16, 8}, {64, 4}, {64, 1}, {256, 1}}) {
    BenchVerify(requests, nodes, bandwidth);
  }
  return 0;
}
