// Matrix products at LLaMA-2-7B shapes: the share of the read bandwidth measured in this run, for each shape and for
// the products of a whole step, own kernels beside cuBLASLt (attention: attention_bench.cc). Every time is of a
// captured graph of products over different weights, so that nothing is served from the L2 and launches overlap as they
// do in a model; medians of event times.
#include <cstdint>
#include <memory>
#include <string>

#include "kernels/cuda/cublas_gemm.h"
#include "kernels/cuda/gemm_wgmma.h"
#include "kernels/cuda/launch.h"
#include "tests/cuda/device_buffers.h"
#include "tests/cuda/gemm_reference.h"
#include "tests/cuda/per_node.h"

namespace linspec::cuda {
namespace {

constexpr int kMaxRows = 4096;
constexpr int kLayers = 32;
struct Shape {
  int n, k;
};
constexpr Shape kLayer[] = {{12288, 4096}, {4096, 4096}, {22016, 4096}, {4096, 11008}};
constexpr Shape kHead = {32000, 4096};

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

// Median time of what `work` launches, captured and replayed as one graph.
double GraphMicroseconds(const std::function<void(cudaStream_t)>& work) {
  cudaStream_t stream;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  work(stream);  // attributes and algorithms are settled outside the capture
  Check(cudaStreamSynchronize(stream), "warm up");
  cudaGraph_t captured;
  cudaGraphExec_t graph;
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  work(stream);
  Check(cudaStreamEndCapture(stream, &captured), "end of capture");
  Check(cudaGraphInstantiate(&graph, captured, 0), "instantiate");
  cudaEvent_t begin, end;
  Check(cudaEventCreate(&begin), "event");
  Check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < 10; ++i) {
    Check(cudaEventRecord(begin, stream), "record");
    Check(cudaGraphLaunch(graph, stream), "launch");
    Check(cudaEventRecord(end, stream), "record");
    Check(cudaStreamSynchronize(stream), "graph");
    float milliseconds = 0;
    Check(cudaEventElapsedTime(&milliseconds, begin, end), "elapsed");
    if (i > 0) times.push_back(milliseconds * 1000.0f);
  }
  std::sort(times.begin(), times.end());
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(graph);
  cudaGraphDestroy(captured);
  cudaStreamDestroy(stream);
  return times[times.size() / 2];
}

enum class Kernel { kStreaming, kTiled, kWgmma, kCublas };

class GemmBench {
 public:
  GemmBench(int32_t type, double bandwidth, CublasGemm* cublas)
      : type_(type),
        bytes_(type == kLinspecCudaBf16 ? 2 : 1),
        bandwidth_(bandwidth),
        cublas_(cublas),
        weights_(StepBytes()),
        workspace_(StreamingGemmWorkspaceBytes()),
        x_(int64_t{kMaxRows} * 11008),
        y_(int64_t{kMaxRows} * 22016),
        scales_(std::vector<float>(32000, 0.01f)) {
    Check(cudaMemset(workspace_.get(), 0, workspace_.size()), "zero the workspace");
    LaunchFill(weights_.get(), StepBytes() / bytes_, type, 0.02f, 1, nullptr);
    LaunchFill(x_.get(), static_cast<int64_t>(x_.size()), kLinspecCudaBf16, 1.0f, 2, nullptr);
    Sync();
  }

  void Shapes(Kernel kernel, std::initializer_list<int> rows) {
    for (const Shape& shape : {kLayer[0], kLayer[1], kLayer[2], kLayer[3], kHead}) {
      std::printf("%-10s %s %5d x %5d: rows:us(%% of read bandwidth)", Name(kernel), TypeName(), shape.n, shape.k);
      for (const int m : rows) {
        const int64_t size = int64_t{shape.n} * shape.k * bytes_;
        const int copies = static_cast<int>(std::min<int64_t>(24, StepBytes() / size));
        const double us = GraphMicroseconds([&](cudaStream_t stream) {
          for (int i = 0; i < copies; ++i) Launch(kernel, shape, i * size, m, stream);
        });
        std::printf("  %d:%.1f(%.0f)", m, us / copies, 100.0 * size * copies / bandwidth_ / us * 1e-6);
      }
      std::printf("\n");
    }
  }

  void Step(Kernel kernel, std::initializer_list<int> rows) {
    std::printf("%-10s %s products of a 7B step, floor %.3f ms: rows:ms(%%)", Name(kernel), TypeName(),
                static_cast<double>(StepBytes()) / bandwidth_ * 1e-9);
    for (const int m : rows) {
      const double us = GraphMicroseconds([&](cudaStream_t stream) {
        int64_t at = 0;
        const auto product = [&](const Shape& shape) {
          Launch(kernel, shape, at, m, stream);
          at += int64_t{shape.n} * shape.k * bytes_;
        };
        for (int layer = 0; layer < kLayers; ++layer) {
          for (const Shape& shape : kLayer) product(shape);
        }
        product(kHead);
      });
      std::printf("  %d:%.3f(%.1f)", m, us * 1e-3, 100.0 * static_cast<double>(StepBytes()) / bandwidth_ / us * 1e-6);
    }
    std::printf("\n");
  }

  void ManyRows(Kernel kernel) {
    std::printf("%-10s %s 22016 x 4096, rows:TFLOP/s", Name(kernel), TypeName());
    for (const int m : {512, 2048, 4096}) {
      const double us = GraphMicroseconds([&](cudaStream_t stream) { Launch(kernel, kLayer[2], 0, m, stream); });
      std::printf("  %d:%.0f", m, 2.0 * m * 22016 * 4096 / us * 1e-6);
    }
    std::printf("\n");
  }

 private:
  int64_t StepBytes() const {
    int64_t elements = int64_t{kHead.n} * kHead.k;
    for (const Shape& shape : kLayer) elements += kLayers * int64_t{shape.n} * shape.k;
    return elements * bytes_;
  }
  static const char* Name(Kernel kernel) {
    constexpr const char* kNames[] = {"streaming", "tiled", "wgmma", "cublasLt"};
    return kNames[static_cast<int>(kernel)];
  }
  const char* TypeName() const {
    return type_ == kLinspecCudaBf16 ? "bf16" : type_ == kLinspecCudaI8 ? "int8" : "fp8 ";
  }

  void Launch(Kernel kernel, const Shape& shape, int64_t offset, int rows, cudaStream_t stream) {
    const float* scales = type_ == kLinspecCudaBf16 ? nullptr : scales_.get();
    const GemmParams params{{weights_.get() + offset, scales, shape.n, shape.k, type_, 0},
                            x_.get(),
                            y_.get(),
                            false,
                            nullptr,
                            false,
                            workspace_.get()};
    switch (kernel) {
      case Kernel::kStreaming:
        return LaunchStreamingGemm(params, rows, stream);
      case Kernel::kTiled:
        return LaunchTiledGemm(params, rows, stream);
      case Kernel::kWgmma:
        return LaunchWgmmaGemm(params, rows, stream);
      case Kernel::kCublas:
        if (cublas_->Launch(params, rows, stream) == kLinspecCudaOk) return;
        std::fprintf(stderr, "%s\n", cublas_->last_error().c_str());
        std::exit(2);
    }
  }

  int32_t type_;
  int bytes_;
  double bandwidth_;
  CublasGemm* cublas_;
  DeviceArray<uint8_t> weights_, workspace_;
  DeviceArray<uint16_t> x_;
  DeviceArray<float> y_, scales_;
};

void Bench(int32_t type, double bandwidth, CublasGemm* cublas) {
  GemmBench bench(type, bandwidth, cublas);
  const bool wgmma = WgmmaGemmRuns();
  bench.Shapes(Kernel::kStreaming, {1, 2, 4, 8, 16, 32, 64});
  if (wgmma) bench.Shapes(Kernel::kWgmma, {1, 8, 16, 32, 64, 128});
  if (cublas != nullptr && type == kLinspecCudaBf16) bench.Shapes(Kernel::kCublas, {8, 16, 32, 64, 128, 256});
  bench.Step(Kernel::kStreaming, {1, 2, 4, 8, 16, 32, 64});
  if (wgmma) bench.Step(Kernel::kWgmma, {1, 2, 4, 8, 16, 32, 64, 128, 256});
  if (cublas != nullptr && type == kLinspecCudaBf16) bench.Step(Kernel::kCublas, {8, 16, 32, 64, 128, 256});
  bench.Step(Kernel::kTiled, {64, 128, 256});
  if (cublas != nullptr) bench.ManyRows(Kernel::kCublas);
  if (wgmma) bench.ManyRows(Kernel::kWgmma);
  bench.ManyRows(Kernel::kTiled);
}

}  // namespace
}  // namespace linspec::cuda

int main() {
  using namespace linspec::cuda;
  Check(cudaSetDevice(0), "no usable GPU");
  const double bandwidth = ReadBandwidth();
  std::string why;
  const std::unique_ptr<CublasGemm> cublas = CublasGemm::Open("", &why);
  std::printf("ceilings: read %.2f TB/s, copy %.2f TB/s (read + write); cuBLASLt: %s\n", bandwidth, CopyBandwidth(),
              cublas != nullptr ? cublas->path().c_str() : why.c_str());
  for (const int32_t type : {int{kLinspecCudaBf16}, int{kLinspecCudaFp8}, int{kLinspecCudaI8}}) {
    Bench(type, bandwidth, cublas.get());
  }
  return 0;
}
