// Every kernel against the scalar CpuOps or a sum in double, over odd sizes, every phase and trees across group
// boundaries. A plain program: prints one line per check, a summary last, and exits 0 only if all passed.
#include <cstdint>
#include <memory>
#include <string>

#include "kernels/cuda/launch.h"
#include "kernels/dtype.h"
#include "kernels/ops.h"
#include "tests/cuda/device_buffers.h"

namespace linspec::cuda {
namespace {

int checks = 0, failures = 0;

void Report(const std::string& name, double error, double tolerance) {
  ++checks;
  const bool ok = error <= tolerance;
  failures += !ok;
  std::printf("%-4s %-58s error %.2e tolerance %.0e\n", ok ? "ok" : "FAIL", name.c_str(), error, tolerance);
}

struct Shape {
  int heads, kv_heads, d, group, conv;
  bool local;
  GlobalBranch global;
  bool decay;
};

const Shape kShapes[] = {
    {2, 2, 16, 8, 4, true, GlobalBranch::kScaled, false},    {4, 2, 64, 64, 32, true, GlobalBranch::kRmsNorm, true},
    {2, 1, 128, 64, 32, true, GlobalBranch::kRmsNorm, true}, {3, 3, 24, 8, 0, true, GlobalBranch::kNone, false},
    {2, 1, 40, 9, 6, false, GlobalBranch::kScaled, true},    {1, 1, 100, 64, 32, true, GlobalBranch::kScaled, false},
    {2, 2, 128, 64, 32, true, GlobalBranch::kScaled, true},
};

// Three requests and a padding one in a call; slots are not in request order, slot 0 must stay untouched.
class AttentionCase {
 public:
  AttentionCase(CpuOps& ops, const Shape& shape, int length, uint32_t seed)
      : ops_(ops), s_(shape), random_(seed), stride_((shape.heads + 2 * shape.kv_heads) * shape.d) {
    gain_ = Normal(random_, s_.heads, 1.0f);
    taps_ = Normal(random_, s_.heads * s_.conv, 1.0f);
    decay_.assign(s_.kv_heads, 0.9f);
    floats_ = int64_t{s_.kv_heads} * (s_.d * s_.d + 2 * s_.group * s_.d);
    states_.assign(5 * floats_, 0.0f);
    layer_ = {.num_heads = s_.heads,
              .num_kv_heads = s_.kv_heads,
              .head_dim = s_.d,
              .group_size = s_.group,
              .conv_kernel = s_.conv,
              .local = s_.local,
              .global = s_.global,
              .global_factor = 0.37f,
              .global_gain = gain_.data(),
              .global_norm_eps = 1e-6f,
              .decay = s_.decay ? decay_.data() : nullptr,
              .conv_taps = taps_.data()};
    for (int r = 0; r < kRequests; ++r) lengths_[r] = length + r * (s_.group - 1);
    for (int r = 0; r < kRequests; ++r) Advance(r);
  }

  void Verify(const int (&nodes)[3], double* verify_error, double* commit_error) {
    MakeTrees(nodes);
    std::vector<float> expected(rows_ * s_.heads * s_.d);
    std::vector<WindowRequest> requests;
    for (int r = 0; r < kRequests; ++r) {
      requests.push_back({View(states_, r), lengths_[r], begins_[r], nodes[r], parents_.data() + begins_[r]});
    }
    ops_.VerifyAttention({&layer_, qkv_.data(), expected.data(), requests});
    const DeviceArray<float> states(states_), out(expected.size());
    Run(states, out, &LaunchVerify, true);
    *verify_error = states.Read() == states_ ? RelativeError(out.Read(), expected) : INFINITY;

    std::vector<float> expected_states = states_;
    std::vector<CommitRequest> commits;
    for (int r = 0; r < kRequests; ++r) {
      commits.push_back({View(expected_states, r),
                         lengths_[r],
                         begins_[r],
                         {paths_.data() + tasks_[r].path_begin, static_cast<size_t>(tasks_[r].path_length)}});
    }
    ops_.CommitAttention({&layer_, qkv_.data(), commits});
    Run(states, out, &LaunchCommit, true);
    *commit_error = RelativeError(states.Read(), expected_states);
  }

  void Prefill(const int (&tokens)[3], double* out_error, double* state_error) {
    MakeTrees(tokens);
    std::vector<float> expected(rows_ * s_.heads * s_.d), expected_states = states_;
    std::vector<WindowRequest> requests;
    for (int r = 0; r < kRequests; ++r) {
      requests.push_back({View(expected_states, r), lengths_[r], begins_[r], tokens[r], nullptr});
    }
    ops_.PrefillAttention({&layer_, qkv_.data(), expected.data(), requests});
    const DeviceArray<float> states(states_), out(expected.size());
    Run(states, out, &LaunchPrefill, false);
    *out_error = RelativeError(out.Read(), expected);
    *state_error = RelativeError(states.Read(), expected_states);
  }

 private:
  static constexpr int kRequests = 3;
  using Launcher = void (*)(const AttentionParams&, int, cudaStream_t);

  static int Slot(int request) { return 4 - request; }
  LayerState View(std::vector<float>& states, int request) const {
    float* s = states.data() + Slot(request) * floats_;
    float* ring = s + s_.kv_heads * s_.d * s_.d;
    return {s, ring, ring + s_.kv_heads * s_.group * s_.d};
  }
  float KeyScale() const { return 1.0f / std::sqrt(static_cast<float>(s_.d)); }

  void Advance(int request) {
    if (lengths_[request] == 0) return;
    const std::vector<float> qkv = Normal(random_, lengths_[request] * stride_, KeyScale());
    std::vector<float> out(lengths_[request] * s_.heads * s_.d);
    const WindowRequest window{View(states_, request), 0, 0, static_cast<int>(lengths_[request]), nullptr};
    ops_.PrefillAttention({&layer_, qkv.data(), out.data(), {&window, 1}});
  }

  void MakeTrees(const int (&nodes)[3]) {
    rows_ = 0;
    for (int r = 0; r < kRequests; ++r) {
      begins_[r] = rows_;
      const auto path_begin = static_cast<int32_t>(paths_.size());
      for (int i = 0; i < nodes[r]; ++i) {
        const int parent = i == 0 ? -1 : i - 1 - static_cast<int>(random_() % std::min(i, 3));
        parents_.push_back(parent);
        ancestors_.push_back((parent < 0 ? 0 : ancestors_[rows_ + parent]) | uint64_t{1} << (i % 64));
      }
      std::vector<int32_t> path;
      for (int node = nodes[r] - 1; node >= 0; node = parents_[rows_ + node]) path.insert(path.begin(), node);
      paths_.insert(paths_.end(), path.begin(), path.end());
      tasks_.push_back({lengths_[r], Slot(r), rows_, nodes[r], path_begin, static_cast<int32_t>(path.size())});
      rows_ += nodes[r];
    }
    tasks_.push_back({0, -1, 0, 1, 0, 1});
    qkv_ = Normal(random_, int64_t{rows_} * stride_, KeyScale());
  }

  void Run(const DeviceArray<float>& states, const DeviceArray<float>& out, Launcher launch, bool tree) {
    const DeviceArray<float> qkv(qkv_), gain(gain_), taps(taps_), decay(decay_);
    const DeviceArray<uint64_t> ancestors(ancestors_);
    const DeviceArray<int32_t> paths(paths_);
    const DeviceArray<Task> tasks(tasks_);
    launch({.layer = {.num_heads = s_.heads,
                      .num_kv_heads = s_.kv_heads,
                      .head_dim = s_.d,
                      .group_size = s_.group,
                      .conv_kernel = s_.conv,
                      .local = s_.local,
                      .global = static_cast<Global>(s_.global),
                      .global_factor = 0.37f,
                      .global_norm_eps = 1e-6f,
                      .global_gain = gain.get(),
                      .decay = s_.decay ? decay.get() : nullptr,
                      .conv_taps = taps.get()},
            .states = {states.get(), floats_, 0},
            .tasks = tasks.get(),
            .qkv = qkv.get(),
            .ancestors = tree ? ancestors.get() : nullptr,
            .paths = paths.get(),
            .out = out.get(),
            .out_bf16 = nullptr},
           static_cast<int>(tasks_.size()), nullptr);
    Sync();
  }

  CpuOps& ops_;
  const Shape s_;
  std::mt19937 random_;
  const int stride_;
  int64_t floats_ = 0, lengths_[kRequests] = {};
  int32_t rows_ = 0, begins_[kRequests] = {};
  AttentionLayer layer_;
  std::vector<float> gain_, taps_, decay_, states_, qkv_;
  std::vector<int32_t> parents_, paths_;
  std::vector<uint64_t> ancestors_;
  std::vector<Task> tasks_;
};

// quick: few sizes, for compute-sanitizer, which slows kernels by two orders of magnitude.
void TestAttention(CpuOps& ops, bool quick) {
  for (size_t i = 0; i < std::size(kShapes); ++i) {
    double verify = 0, commit = 0, prefill = 0, state = 0;
    for (int phase = 0; phase < kShapes[i].group; phase += quick ? 31 : 1) {
      const auto seed = static_cast<uint32_t>(1 + i * 1000 + phase);
      double a = 0, b = 0;
      AttentionCase(ops, kShapes[i], phase, seed).Verify({1, 64, 7}, &a, &b);
      verify = std::max(verify, a);
      commit = std::max(commit, b);
      if (phase % 7 != 0 && !quick) continue;
      AttentionCase(ops, kShapes[i], phase, seed).Prefill({1, 150, 65}, &a, &b);
      prefill = std::max(prefill, a);
      state = std::max(state, b);
    }
    const std::string shape = " shape " + std::to_string(i) + ", all phases";
    Report("verify" + shape, verify, 1e-5);
    Report("commit" + shape, commit, 1e-6);
    Report("prefill" + shape, prefill, 1e-5);
    Report("prefill state" + shape, state, 1e-5);
  }
}

void TestGemm(bool quick) {
  std::mt19937 random(3);
  for (const int type : {int{kLinspecCudaBf16}, int{kLinspecCudaI8}, int{kLinspecCudaFp8}}) {
    for (const auto& [n, k] : {std::pair{16, 64}, {33, 48}, {1000, 272}, {4096, 4096}, {7, 11008}}) {
      if (quick && n * k > 300'000) continue;
      std::vector<uint8_t> bytes(int64_t{n} * k * (type == kLinspecCudaBf16 ? 2 : 1));
      std::vector<float> w = Normal(random, int64_t{n} * k, 1.0f), scales(n, 0.013f);
      for (size_t i = 0; i < w.size(); ++i) {
        if (type == kLinspecCudaBf16) {
          const uint16_t bits = FloatToBFloat16(w[i]);
          std::memcpy(&bytes[2 * i], &bits, 2);
          w[i] = BFloat16ToFloat(bits);
        } else if (type == kLinspecCudaI8) {
          const int value = std::clamp(static_cast<int>(w[i] * 40.0f), -127, 127);
          bytes[i] = static_cast<uint8_t>(static_cast<int8_t>(value));
          w[i] = static_cast<float>(value) * scales[0];
        } else {  // e4m3 with exponents 1..14, so no NaN pattern: sign, 4 bits of exponent (bias 7), 3 of mantissa
          const unsigned code = random() % 112 + 8;
          bytes[i] = static_cast<uint8_t>(code | (w[i] < 0 ? 128u : 0u));
          w[i] = std::copysign(std::ldexp(1.0f + static_cast<float>(code % 8) / 8.0f, static_cast<int>(code / 8) - 7),
                               w[i]) *
                 scales[0];
        }
      }
      const DeviceArray<uint8_t> device_w(bytes);
      const DeviceArray<float> device_scales(scales);
      std::vector<float> alone;
      for (const int rows : {1, 5, 8, 9, 17, 32, 70}) {
        std::mt19937 same(5);
        std::vector<uint16_t> x(int64_t{rows} * k);
        for (uint16_t& value : x) value = FloatToBFloat16(Normal(same, 1, 1.0f)[0]);
        std::vector<float> y = Normal(random, int64_t{rows} * n, 1.0f), expected = y;
        if (rows == 1) y.assign(n, 0.0f), expected = y;
        for (int m = 0; m < std::min(rows, 9); ++m) {
          for (int row = 0; row < n; ++row) {
            double sum = 0;
            for (int c = 0; c < k; ++c) sum += double{BFloat16ToFloat(x[int64_t{m} * k + c])} * w[int64_t{row} * k + c];
            expected[int64_t{m} * n + row] += static_cast<float>(sum);
          }
        }
        const DeviceArray<uint16_t> device_x(x);
        const DeviceArray<float> device_y(y);
        const LinspecCudaMatrix matrix{
            device_w.get(), type == kLinspecCudaBf16 ? nullptr : device_scales.get(), n, k, type, 0};
        LaunchStreamingGemm({matrix, device_x.get(), device_y.get(), true}, rows, nullptr);
        Sync();
        std::vector<float> out = device_y.Read();
        out.resize(int64_t{std::min(rows, 9)} * n);
        expected.resize(out.size());
        const std::string name = "gemm type " + std::to_string(type) + " n " + std::to_string(n) + " k " +
                                 std::to_string(k) + " rows " + std::to_string(rows);
        Report(name, RelativeError(out, expected), 5e-5);
        LaunchStreamingGemm({matrix, device_x.get(), device_y.get(), false}, rows, nullptr);
        Sync();
        out = device_y.Read();
        out.resize(n);
        if (rows == 1) alone = out;
        Report(name + ": row 0 has its own bits", out == alone ? 0.0 : 1.0, 0.0);
      }
    }
  }
}

void TestRows(CpuOps& ops) {
  std::mt19937 random(11);
  for (const auto& [rows, dim] : {std::pair{1, 16}, {3, 1000}, {17, 4096}, {65, 176}}) {
    const std::string size = " rows " + std::to_string(rows) + " dim " + std::to_string(dim);
    const std::vector<float> x = Normal(random, int64_t{rows} * dim, 2.0f), weight = Normal(random, dim, 1.0f);
    std::vector<float> expected(x.size());
    ops.RmsNorm({x.data(), weight.data(), expected.data(), rows, dim, 1e-5f});
    const DeviceArray<float> device_x(x), device_weight(weight), out(x.size());
    LaunchRmsNorm({device_x.get(), device_weight.get(), out.get(), nullptr, dim, 1e-5f}, rows, nullptr);
    Sync();
    Report("rms_norm" + size, RelativeError(out.Read(), expected), 1e-6);

    std::vector<float> activated(x.size() / 2);
    ops.SiluMul({x.data(), activated.data(), rows, dim / 2});
    const DeviceArray<uint16_t> bits(activated.size());
    LaunchSiluMul(device_x.get(), bits.get(), dim / 2, rows, nullptr);
    Sync();
    std::vector<float> widened;
    for (const uint16_t value : bits.Read()) widened.push_back(BFloat16ToFloat(value));
    Report("silu_mul" + size, RelativeError(widened, activated), 4e-3);

    const DeviceArray<int32_t> best(rows);
    LaunchArgmax(device_x.get(), dim, best.get(), rows, nullptr);
    Sync();
    int wrong = 0;
    const std::vector<int32_t> found = best.Read();
    for (int m = 0; m < rows; ++m)
      wrong += found[m] != std::max_element(x.begin() + m * dim, x.begin() + (m + 1) * dim) - x.begin() - m * dim;
    Report("argmax" + size, wrong, 0);
  }
  for (const int d : {2, 16, 64, 100, 128}) {
    const int rows = 9, heads = 3, kv = 1, width = (heads + 2 * kv) * d;
    std::vector<float> qkv = Normal(random, int64_t{rows} * width, 1.0f);
    std::vector<int64_t> positions = {0, 1, 63, 64, 1000, 99'999, 1'000'000, 123'456'789, 7};
    const DeviceArray<float> device(qkv);
    const DeviceArray<int64_t> device_positions(positions);
    const DeviceArray<float2> angles(static_cast<size_t>(rows) * d / 2);
    ops.RopeNormalize({qkv.data(), positions.data(), rows, heads, kv, d, 10000.0f, 1e-6f});
    LaunchRopeTable(device_positions.get(), 10000.0, d, angles.get(), rows, nullptr);
    LaunchRopeNormalize({device.get(), angles.get(), heads, kv, d, 1e-6f}, rows, nullptr);
    Sync();
    Report("rope_normalize d " + std::to_string(d), RelativeError(device.Read(), qkv), 1e-6);
  }
}

void TestEmbed() {
  std::mt19937 random(13);
  const int vocab = 37, dim = 48;
  const std::vector<float> table = Normal(random, vocab * dim, 1.0f);
  const std::vector<int32_t> tokens = {0, 36, 5, 5};
  std::vector<float> expected;
  for (const int32_t token : tokens)
    expected.insert(expected.end(), table.begin() + token * dim, table.begin() + (token + 1) * dim);
  const DeviceArray<float> device(table), out(expected.size());
  const DeviceArray<int32_t> device_tokens(tokens);
  LaunchEmbed({{device.get(), nullptr, vocab, dim, kLinspecCudaF32, 0}, device_tokens.get(), out.get()}, 4, nullptr);
  Sync();
  Report("embed", RelativeError(out.Read(), expected), 0.0);
}

}  // namespace
}  // namespace linspec::cuda

int main(int argc, char** argv) {
  using namespace linspec;
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  cudaDeviceProp device;
  cuda::Check(cudaGetDeviceProperties(&device, 0), "no usable GPU");
  std::printf("device: %s, compute capability %d.%d\n", device.name, device.major, device.minor);
  auto ops = std::move(*CpuOps::Create({.isa = Isa::kScalar, .num_threads = 8}));
  cuda::TestEmbed();
  cuda::TestRows(*ops);
  cuda::TestGemm(quick);
  cuda::TestAttention(*ops, quick);
  std::printf("device_test: %d checks, %d failed\n", cuda::checks, cuda::failures);
  return cuda::failures == 0 ? 0 : 1;
}
