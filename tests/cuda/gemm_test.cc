// Every matrix product against a sum in double, over odd sizes and numbers of tokens: values, the promise that a row's
// bits depend on that row alone whichever kernel runs, epilogues, and that nothing is written past the last row.
// A plain program: one line per check, a summary last, exit code 0 only if all passed.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "kernels/cuda/cublas_gemm.h"
#include "kernels/cuda/gemm_ring.h"
#include "kernels/cuda/gemm_wgmma.h"
#include "kernels/cuda/launch.h"
#include "tests/cuda/gemm_case.h"
#include "tests/cuda/gemm_order.h"
#include "tests/cuda/report.h"

namespace linspec::cuda {
namespace {

// Sizes whose products are by pairs of blocks, which get parts of k of unequal size, and by tall tiles of unequal
// height.
constexpr int kPairDepth = 656, kTallRows = 22016;
constexpr int64_t kLarge = 300'000, kHuge = 10'000'000;                                          // weights
constexpr int kFormRows[] = {33, 9}, kNormRows[] = {kMaxRows, 1, 2, 8, 9, 17, 33, 64, 65, 100};  // the most first

// Every kernel's checks on a matrix.
class GemmChecks : GemmCase {
 public:
  // quick: fewer numbers of tokens, for the sanitizers; forms: RunForms alone.
  GemmChecks(int n, int k, int32_t type, uint8_t* workspace, CublasGemm* cublas, bool quick, bool forms)
      : GemmCase(n, k, type, workspace, forms ? kFormRows[0] : kMaxRows), quick_(quick), cublas_(cublas) {}

  // Of shapes that the sanitizers take too long for: what pairs of blocks do, and tall tiles.
  void RunForms() {
    if (!WgmmaGemmRuns()) return;
    k_ == kPairDepth ? LeavesNorm(kFormRows) : MultipliesSiluOfNorm(kFormRows);
  }

  void Run() {
    CheckKernel("streaming", &LaunchStreamingGemm, Launch(&LaunchTiledGemm, Params(), kMaxRows));
    CheckKernel("small", &LaunchSmallGemm, Launch(&LaunchTiledGemm, Params(), kMaxRows));
    if (n_ % 16 == 0) MultipliesSilu("tiled", &LaunchTiledGemm);
    if (WgmmaGemmRuns()) {
      CheckKernel("wgmma", &LaunchWgmmaGemm, Launch(&LaunchWgmmaGemm, Params(), kMaxRows));
      MultipliesNorm();
      LeavesNorm(kNormRows);
      if (int64_t{n_} * k_ > kHuge) KeepsOrderInARow(name_, Params());
      if (n_ % 16 == 0) MultipliesSiluOfNorm(kNormRows);
      if (n_ % 512 == 0) TurnsHeads();
    }
    NormIsPrologue("small", &LaunchSmallGemm, {kMaxRows, 1, 2, 8, 9, 17, 33, 64, 65});
    NormForSmall();
    if (RingGemmTakesNorm(matrix_, kRingNormRows)) NormIsPrologue("ring", &LaunchStreamingGemm, {kRingNormRows, 1});
    if (cublas_ != nullptr && k_ % 8 == 0 && n_ % 8 == 0) Cublas();
  }

 private:
  // `all`: of kMaxRows tokens, by a kernel that must give each row the same bits.
  void CheckKernel(const std::string& kernel, Launcher launch, const std::vector<float>& all) {
    Report(name_ + " all rows for " + kernel, RelativeError(all, reference_), 1e-5);
    const std::vector<int> few{1, 2, 9, 33, kMaxRows},
        many{1, 2, 3, 4, 5, 8, 9, 16, 29, 33, 64, 65, 128, 129, kMaxRows};
    for (const int rows : quick_ ? few : many) {
      const std::vector<float> out = Launch(launch, Params(), rows);
      const std::string name = name_ + " " + kernel + " rows " + std::to_string(rows);
      Report(name, RelativeError(out, Head(reference_, rows * n_)), 1e-5);
      Report(name + ": bits of all rows", out == Head(all, rows * n_) ? 0.0 : 1.0, 0.0);
    }
    Accumulates(kernel, launch);
    RoundsToBf16(kernel, launch);
    if (n_ % 16 == 0) MultipliesSilu(kernel, launch);
  }

  void Accumulates(const std::string& kernel, Launcher launch) {
    for (const int rows : {3, 21, 100}) {
      std::vector<float> expected = Normal(random_, int64_t{rows} * n_, 1.0f);
      const DeviceArray<float> y(expected);
      for (size_t i = 0; i < expected.size(); ++i) expected[i] += reference_[i];
      GemmParams params = Params();
      params.y = y.get();
      params.accumulate = true;
      launch(params, rows, nullptr);
      Sync();
      Report(name_ + " " + kernel + " accumulate rows " + std::to_string(rows), RelativeError(y.Read(), expected),
             1e-5);
    }
  }

  void RoundsToBf16(const std::string& kernel, Launcher launch) {
    for (const int rows : {2, 40}) {
      const DeviceArray<uint16_t> y(int64_t{rows} * n_);
      GemmParams params = Params();
      params.y_bf16 = y.get();
      launch(params, rows, nullptr);
      Sync();
      Report(name_ + " " + kernel + " bf16 rows " + std::to_string(rows),
             RelativeError(Widen(y.Read()), Head(reference_, int64_t{rows} * n_)), 4e-3);
    }
  }

  // silu(gate) * up of the reference, each row over roots[row]. Rows r and r + 8 of each 16 are gate and up of one
  // output.
  std::vector<float> ExpectedSilu(int rows, const std::vector<double>& roots) const {
    const int half = n_ / 2;
    std::vector<float> expected(int64_t{rows} * half);
    for (int64_t r = 0; r < n_; ++r) {
      const int64_t source = PackedGateUpRow(r, half);
      if (source >= half) continue;
      for (int m = 0; m < rows; ++m) {
        const double gate = reference_[int64_t{m} * n_ + r] / roots[m],
                     up = reference_[int64_t{m} * n_ + r + 8] / roots[m];
        expected[int64_t{m} * half + source] = static_cast<float>(gate / (1.0 + std::exp(-gate)) * up);
      }
    }
    return expected;
  }

  void MultipliesSilu(const std::string& kernel, Launcher launch) {
    for (const int rows : {1, 17, 100}) {
      const std::vector<float> expected = ExpectedSilu(rows, std::vector<double>(rows, 1.0));
      const DeviceArray<uint16_t> y(expected.size());
      GemmParams params = Params();
      params.y_bf16 = y.get();
      params.silu_mul = true;
      launch(params, rows, nullptr);
      Sync();
      Report(name_ + " " + kernel + " silu rows " + std::to_string(rows), RelativeError(Widen(y.Read()), expected),
             4e-3);
    }
  }

  static constexpr float kEps = 1e-5f;

  // The same of gates and ups over the root mean square of each token's x, as MultipliesNorm. What is not written stays
  // NaN.
  void MultipliesSiluOfNorm(std::span<const int> all_rows) {
    const auto parts = static_cast<int>(NormParts(k_));
    const std::vector<float> squares(int64_t{kMaxRows} * parts, static_cast<float>(k_) / static_cast<float>(parts) * 4);
    const DeviceArray<float> on_device(squares);
    const std::vector<float> expected = ExpectedSilu(all_rows[0], std::vector<double>(all_rows[0], 2.0));
    const int64_t half = n_ / 2;
    std::vector<uint16_t> all;
    for (const int rows : all_rows) {
      const DeviceArray<uint16_t> y(std::vector<uint16_t>((rows + 1) * half, 0xFFFF));
      GemmParams params = Params();
      params.y_bf16 = y.get();
      params.silu_mul = true;
      params.norm_before = {.eps = 0.0f, .squares = on_device.get()};
      LaunchWgmmaGemm(params, rows, nullptr);
      Sync();
      const std::vector<uint16_t> bits = y.Read();
      if (rows == all_rows[0]) all = bits;
      const std::string name = name_ + " wgmma silu of norm, rows " + std::to_string(rows);
      Report(name, RelativeError(Head(Widen(bits), rows * half), Head(expected, rows * half)), 4e-3);
      const bool same = std::equal(bits.begin(), bits.begin() + rows * half, all.begin());
      const bool clean = std::all_of(bits.begin() + rows * half, bits.end(), [](uint16_t b) { return b == 0xFFFF; });
      Report(name + ": bits of all rows, none past them", same && clean ? 0.0 : 1.0, 0.0);
    }
  }

  // Results over the root mean square of each token's x, given as sums of parts.
  void MultipliesNorm() {
    const auto parts = static_cast<int>(NormParts(k_));
    std::vector<float> squares = Normal(random_, int64_t{kMaxRows} * parts, 1.0f);
    std::vector<double> sums(kMaxRows);
    for (float& square : squares) square = square * square + 0.1f;
    for (size_t i = 0; i < squares.size(); ++i) sums[i / parts] += squares[i];
    const DeviceArray<float> on_device(squares);
    GemmParams params = Params();
    params.norm_before = {.eps = kEps, .squares = on_device.get()};
    CheckNormed("wgmma norm before", &LaunchWgmmaGemm, params, sums, {kMaxRows, 1, 9, 33, 100});
  }

  // The same with the norm as prologue: x is the stream times a weight, exactly.
  void NormIsPrologue(const std::string& kernel, Launcher launch, const std::vector<int>& all_rows) {
    std::vector<float> weight = Normal(random_, k_, 1.0f), stream = Widen(x_.Read());
    std::vector<double> squares(kMaxRows);
    for (float& w : weight) w = std::ldexp(1.0f, static_cast<int>(std::lround(w)));
    for (size_t i = 0; i < stream.size(); ++i) {
      stream[i] /= weight[i % k_];
      squares[i / k_] += double{stream[i]} * stream[i];
    }
    const DeviceArray<float> weights(weight), streams(stream);
    GemmParams params = Params();
    params.x = nullptr;
    params.norm_before = {.eps = kEps, .x = streams.get(), .weight = weights.get()};
    CheckNormed(kernel + " norm as prologue", launch, params, squares, all_rows);
  }

  // Products of params for several numbers of tokens, the most first, against the reference over the root of a token's
  // sum of squares.
  void CheckNormed(const std::string& what, Launcher launch, const GemmParams& params,
                   const std::vector<double>& squares, const std::vector<int>& all_rows) {
    std::vector<float> expected = Head(reference_, int64_t{all_rows[0]} * n_);
    for (size_t i = 0; i < expected.size(); ++i) {
      expected[i] = static_cast<float>(expected[i] / std::sqrt(squares[i / n_] / k_ + kEps));
    }
    const std::vector<float> all = Launch(launch, params, all_rows[0]);
    Report(name_ + " " + what, RelativeError(all, expected), 1e-5);
    for (const int rows : all_rows) {
      const bool same = Launch(launch, params, rows) == Head(all, int64_t{rows} * n_);
      Report(name_ + " " + what + ", rows " + std::to_string(rows) + ": bits of all rows", same ? 0.0 : 1.0, 0.0);
    }
  }

  // The prologue as a launch: the same bits of products, whichever kernel takes them.
  void NormForSmall() {
    const DeviceArray<float> weights(Normal(random_, k_, 1.0f)), stream(Normal(random_, int64_t{kMaxRows} * k_, 2.0f));
    const DeviceArray<uint16_t> normed(int64_t{kMaxRows} * k_);
    const DeviceArray<float> scales(kMaxRows);
    GemmParams params = Params();
    params.x = nullptr;
    params.norm_before = {.eps = kEps, .x = stream.get(), .weight = weights.get()};
    const std::vector<float> expected = Launch(&LaunchSmallGemm, params, kMaxRows);
    LaunchNormForSmall(params.norm_before, matrix_, normed.get(), scales.get(), kMaxRows, nullptr);
    params.x = normed.get();
    params.norm_before = {.scales = scales.get()};
    for (const int rows : {5, kMaxRows}) {
      for (const auto& [kernel, launch] : {std::pair{"small", &LaunchSmallGemm}, {"tiled", &LaunchTiledGemm}}) {
        const bool same = Launch(launch, params, rows) == Head(expected, int64_t{rows} * n_);
        Report(name_ + " " + kernel + " norm launched, rows " + std::to_string(rows) + ": bits of the prologue",
               same ? 0.0 : 1.0, 0.0);
      }
    }
  }

  // y += product, and beside it y * weight in bf16 and the sums of squares.
  void LeavesNorm(std::span<const int> all_rows) {
    const auto parts = static_cast<int>(NormParts(n_)), most = all_rows[0];
    const std::vector<float> weight = Normal(random_, n_, 1.0f);
    const std::vector<float> old = Normal(random_, int64_t{most} * n_, 1.0f);
    std::vector<float> expected, expected_squares(int64_t{most} * parts), all_squares, all_stream;
    for (int64_t i = 0; i < int64_t{most} * n_; ++i) {
      const double y = double{old[i]} + reference_[i];
      expected.push_back(static_cast<float>(y * weight[i % n_]));
      expected_squares[i / n_ * parts + i % n_ / kNormPart] += static_cast<float>(y * y);
    }
    std::vector<uint16_t> all_out;
    const DeviceArray<float> weights(weight);
    for (const int rows : all_rows) {
      const DeviceArray<float> y(old), squares(int64_t{rows} * parts);
      const DeviceArray<uint16_t> out(int64_t{rows} * n_);
      GemmParams params = Params();
      params.y = y.get();
      params.accumulate = true;
      params.norm_after = {.weight = weights.get(), .out = out.get(), .squares = squares.get()};
      LaunchWgmmaGemm(params, rows, nullptr);
      Sync();
      const std::vector<uint16_t> bits = out.Read();
      const std::vector<float> sums = squares.Read(), stream = y.Read();
      const std::string name = name_ + " wgmma norm after, rows " + std::to_string(rows);
      Report(name, RelativeError(Widen(bits), Head(expected, int64_t{rows} * n_)), 4e-3);
      Report(name + ": squares", RelativeError(sums, Head(expected_squares, int64_t{rows} * parts)), 1e-5);
      if (rows == most) all_out = bits, all_squares = sums, all_stream = stream;
      const bool same = std::equal(bits.begin(), bits.end(), all_out.begin()) &&
                        std::equal(sums.begin(), sums.end(), all_squares.begin()) &&
                        std::equal(stream.begin(), stream.begin() + int64_t{rows} * n_, all_stream.begin());
      Report(name + ": bits of all rows", same ? 0.0 : 1.0, 0.0);
    }
  }

  // w as qkv with a k and a v head for each two of q: the product that turns heads itself, against a launch behind it.
  void TurnsHeads() {
    constexpr int kDim = 128;
    const int kv_heads = n_ / kDim / 4, kv_width = 2 * kv_heads * kDim;
    const DeviceArray<float> angles(Normal(random_, kMaxRows * kDim, 0.7f)),
        squares(Normal(random_, kMaxRows * NormParts(k_), 1.0f));
    std::vector<int32_t> order(kMaxRows);
    for (int i = 0; i < kMaxRows; ++i) order[i] = i % 5 == 0 ? -1 : kMaxRows - 1 - i;
    const DeviceArray<int32_t> kv_rows(order);
    for (const int kind : {0, 1, 2, 3, 4}) {  // in place, elsewhere, elsewhere in bf16, in an order, in place in bf16
      const bool moves = kind >= 1 && kind <= 3;
      for (const int rows : {1, 9, 64, kMaxRows}) {
        std::vector<float> values[2];
        std::vector<uint8_t> kept[2];
        for (const bool apart : {false, true}) {
          Check(cudaMemset(y_.get(), 0xFF, y_.size() * sizeof(float)), "poison");
          const DeviceArray<uint8_t> kv(std::vector<uint8_t>(int64_t{kMaxRows} * kv_width * sizeof(float), 0xFF));
          const RopeRows rope{.qkv = y_.get(),
                              .angles = reinterpret_cast<const float2*>(angles.get()),
                              .num_heads = 2 * kv_heads,
                              .num_kv_heads = kv_heads,
                              .head_dim = kDim,
                              .eps = kEps,
                              .kv = moves ? kv.get() : nullptr,
                              .bf16 = kind == 2 || kind == 4,
                              .kv_rows = kind == 3 ? kv_rows.get() : nullptr};
          GemmParams params = Params();
          if (kind == 1) params.norm_before = {.eps = 100.0f, .squares = squares.get()};
          if (!apart) params.rope = rope;
          LaunchWgmmaGemm(params, rows, nullptr);
          if (apart) LaunchRopeNormalize(rope, rows, nullptr);
          Sync();
          kept[apart] = kv.Read();
          for (const float value : y_.Read()) values[apart].push_back(value);
        }
        // What moved to kv is not left in y by both.
        bool same = kept[0] == kept[1];
        for (int64_t i = 0; i < int64_t{rows} * n_; ++i) {
          const bool moved = moves && i % n_ >= 2 * kv_heads * kDim;
          same &= moved || std::bit_cast<uint32_t>(values[0][i]) == std::bit_cast<uint32_t>(values[1][i]);
        }
        for (int i = 0; i < n_; ++i) same &= std::isnan(values[0][int64_t{rows} * n_ + i]);
        Report(name_ + " wgmma turns heads, kind " + std::to_string(kind) + " rows " + std::to_string(rows) +
                   ": bits of a launch",
               same ? 0.0 : 1.0, 0.0);
      }
    }
  }

  void Cublas() {
    for (const int rows : {9, 130}) {
      Check(cudaMemset(y_.get(), 0xFF, y_.size() * sizeof(float)), "poison");
      const LinspecCudaCode code = cublas_->Launch(Params(), rows, nullptr);
      Sync();
      const double error = RelativeError(Head(y_.Read(), int64_t{rows} * n_), Head(reference_, int64_t{rows} * n_));
      // 8-bit weights times their scale are rounded to bf16 on the way.
      Report(name_ + " cublas rows " + std::to_string(rows), code == kLinspecCudaOk ? error : INFINITY,
             matrix_.type == kLinspecCudaBf16 ? 2e-5 : 3e-3);
    }
  }

  const bool quick_;
  CublasGemm* const cublas_;
};

}  // namespace
}  // namespace linspec::cuda

int main(int argc, char** argv) {
  using namespace linspec::cuda;
  print_passed = false;  // there are thousands
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  Check(cudaSetDevice(0), "no usable GPU");
  std::string why;
  const std::unique_ptr<CublasGemm> cublas = CublasGemm::Open("", &why);
  std::printf("cuBLASLt: %s\n", cublas != nullptr ? cublas->path().c_str() : why.c_str());
  int major = 0;
  Check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "compute capability");
  Report("warpgroup instructions on sm_90, and only there", WgmmaGemmRuns() == (major == 9) ? 0.0 : 1.0, 0.0);
  const DeviceArray<uint8_t> workspace(static_cast<size_t>(StreamingGemmWorkspaceBytes()));
  Check(cudaMemset(workspace.get(), 0, workspace.size()), "zero the workspace");
  for (const int32_t type : {int{kLinspecCudaBf16}, int{kLinspecCudaI8}, int{kLinspecCudaFp8}}) {
    for (const auto& [n, k] : {std::pair{16, 16},
                               {33, 48},
                               {1000, 272},
                               {264, 1040},
                               {7, 11008},
                               {3999, 528},
                               {512, 272},
                               {4096, 272},
                               {4096, kPairDepth},
                               {kTallRows, 272},
                               {4096, 4096},
                               {4096, 11008}}) {
      const bool large = int64_t{n} * k > kLarge, forms = quick && large;
      if (forms && k != kPairDepth && n != kTallRows) continue;
      GemmChecks product(n, k, type, workspace.get(), cublas.get(), quick, forms);
      if (forms) {
        product.RunForms();
      } else {
        product.Run();
      }
    }
  }
  return Summary("gemm_test");
}
