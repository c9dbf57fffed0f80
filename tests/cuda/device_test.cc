// Row operations against the scalar CpuOps, over odd sizes, and the choice of tokens against the host's (attention:
// attention_test.cc, matrix products: gemm_test.cc); the levels of a recurrent head. A plain program: prints one line
// per check, a summary last, and exits 0 only if all passed. --quick: fewer sizes, for the sanitizers.
#include <cstdint>
#include <memory>
#include <string>

#include "kernels/cuda/launch.h"
#include "kernels/dtype.h"
#include "kernels/ops.h"
#include "tests/cuda/choice_checks.h"
#include "tests/cuda/device_buffers.h"
#include "tests/cuda/follow_checks.h"
#include "tests/cuda/recurrent_checks.h"
#include "tests/cuda/report.h"

namespace linspec::cuda {
namespace {

void TestRows(CpuOps& ops) {
  std::mt19937 random(11);
  for (const auto& [rows, dim] : {std::pair{1, 16}, {3, 1008}, {17, 4096}, {65, 176}}) {
    const std::string size = " rows " + std::to_string(rows) + " dim " + std::to_string(dim);
    const std::vector<float> x = Normal(random, int64_t{rows} * dim, 2.0f), weight = Normal(random, dim, 1.0f);
    std::vector<float> expected(x.size());
    ops.RmsNorm({x.data(), weight.data(), expected.data(), rows, dim, 1e-5f});
    const DeviceArray<float> device_x(x), device_weight(weight), out(x.size());
    LaunchRmsNorm({device_x.get(), device_weight.get(), out.get(), nullptr, dim, 1e-5f}, rows, nullptr);
    Sync();
    Report("rms_norm" + size, RelativeError(out.Read(), expected), 1e-6);

    std::vector<float> activated(x.size() / 2), rounded(x.size());
    for (int64_t i = 0; i < std::ssize(x); ++i) rounded[i] = BFloat16ToFloat(RoundToBf16(x[i]));
    ops.SiluMul({rounded.data(), activated.data(), rows, dim / 2});
    std::vector<uint16_t> in_turn(x.size());  // 8 of gate, 8 of up
    for (int64_t i = 0; i < std::ssize(x); ++i) {
      in_turn[i] = RoundToBf16(x[i / dim * dim + PackedGateUpRow(i % dim, dim / 2)]);
    }
    const DeviceArray<uint16_t> device_in_turn(in_turn);
    const DeviceArray<uint16_t> bits(activated.size());
    LaunchSiluMul(device_in_turn.get(), bits.get(), dim / 2, rows, nullptr);
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
    const std::vector<float> unturned = qkv;
    std::vector<int64_t> positions = {0, 1, 63, 64, 1000, 99'999, 1'000'000, 123'456'789, 7};
    const DeviceArray<float> device(qkv);
    const DeviceArray<int64_t> device_positions(positions);
    const DeviceArray<float2> angles(static_cast<size_t>(rows) * d / 2);
    ops.RopeNormalize({qkv.data(), positions.data(), rows, heads, kv, d, 10000.0f, 1e-6f});
    LaunchRopeTable(device_positions.get(), 10000.0, d, angles.get(), rows, nullptr);
    const DeviceArray<float> moved(device.Read()), kept(static_cast<size_t>(rows) * 2 * kv * d);
    LaunchRopeNormalize({device.get(), angles.get(), heads, kv, d, 1e-6f}, rows, nullptr);
    Sync();
    Report("rope_normalize d " + std::to_string(d), RelativeError(device.Read(), qkv), 1e-6);
    LaunchRopeNormalize({moved.get(), angles.get(), heads, kv, d, 1e-6f, kept.get()}, rows, nullptr);
    Sync();
    const std::vector<float> in_place = device.Read(), queries = moved.Read(), keys_and_values = kept.Read();
    int wrong = 0;  // the same bits, queries where they were, the rest apart
    for (int i = 0; i < rows * width; ++i) {
      const int row = i / width, column = i % width - heads * d;
      wrong += in_place[i] != (column < 0 ? queries[i] : keys_and_values[row * 2 * kv * d + column]);
    }
    Report("rope_normalize with k and v apart d " + std::to_string(d), wrong, 0);

    wrong = 0;  // rows that are computed in few, by another instance
    const DeviceArray<float> alone(unturned);
    for (int m = 0; m < rows; ++m) {
      LaunchRopeNormalize({alone.get() + m * width, angles.get() + m * d / 2, heads, kv, d, 1e-6f}, 1, nullptr);
    }
    Sync();
    const std::vector<float> one_by_one = alone.Read();
    for (int i = 0; i < rows * width; ++i) wrong += one_by_one[i] != in_place[i];
    Report("rope_normalize of a row alone d " + std::to_string(d), wrong, 0);
  }
}

// Verification of rows as the product left them: outputs, and k and v that are kept, have the bits of RoPE's own
// launch.
void TestRawRows(int d, int length, int num_tasks, bool bf16) {
  const int heads = 3, group = 16, conv = 5, width = 3 * heads * d;
  std::mt19937 random(17);
  const int64_t elements = int64_t{heads} * (d * d + 2 * group * d);
  std::vector<float> values = Normal(random, 2 * elements, 0.1f);
  if (bf16) {
    std::vector<uint16_t> rounded(values.size());
    std::transform(values.begin(), values.end(), rounded.begin(), [](float x) { return RoundToBf16(x); });
    std::memcpy(values.data(), rounded.data(), rounded.size() * sizeof(uint16_t));
  }
  const DeviceArray<float> states(values), taps(Normal(random, heads * conv, 0.3f)), gain(Normal(random, heads, 1.0f)),
      decay(std::vector<float>(heads, 0.9f));
  const DeviceArray<float> qkv(Normal(random, num_tasks * width, 1.0f));
  const DeviceArray<float2> angles(static_cast<size_t>(num_tasks) * d / 2);
  const DeviceArray<int64_t> positions(std::vector<int64_t>(num_tasks, length));
  LaunchRopeTable(positions.get(), 10000.0, d, angles.get(), num_tasks, nullptr);
  std::vector<Task> tasks;
  for (int i = 0; i < num_tasks; ++i) tasks.push_back({length + i, 1 - i, i, 1, 0, 0});
  const DeviceArray<Task> device_tasks(tasks);
  const size_t out_size = size_t{1} * num_tasks * heads * d;
  const DeviceArray<float> out(out_size), raw_out(out_size), kept(2 * out_size), raw_kept(2 * out_size);
  AttentionParams params = {
      .layer = {heads, heads, d, group, conv, 1, Global::kRmsNorm, 1.0f, 1e-6f, gain.get(), decay.get(), taps.get()},
      .states = {states.get(), elements, 0, bf16},
      .tasks = device_tasks.get(),
      .qkv = qkv.get(),
      .kv = raw_kept.get(),
      .ancestors = nullptr,
      .paths = nullptr,
      .out = raw_out.get(),
      .out_bf16 = nullptr,
      .max_rows = 1,
      .raw = {.angles = reinterpret_cast<const float*>(angles.get()), .eps = 1e-6f, .kv = raw_kept.get()}};
  const std::string name = "verify of raw rows d " + std::to_string(d) + " length " + std::to_string(length) + ", " +
                           std::to_string(num_tasks) + (bf16 ? " bf16" : " fp32");
  if (!VerifyTakesRawRows(params.layer, num_tasks, 1)) {
    std::printf("skip %s: not on this chip\n", name.c_str());
    return;
  }
  LaunchVerify(params, num_tasks, nullptr);
  LaunchRopeNormalize({qkv.get(), angles.get(), heads, heads, d, 1e-6f, kept.get(), bf16}, num_tasks, nullptr);
  params.raw = {};
  params.kv = kept.get();
  params.out = out.get();
  LaunchVerify(params, num_tasks, nullptr);
  Sync();
  const auto different = [](const DeviceArray<float>& a, const DeviceArray<float>& b) {
    const std::vector<float> left = a.Read(), right = b.Read();
    return std::memcmp(left.data(), right.data(), left.size() * sizeof(float)) != 0;
  };
  Report(name, different(out, raw_out) + 2 * different(kept, raw_kept) + 4 * std::isnan(out.Read()[0]), 0);
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
  cudaDeviceProp device;
  cuda::Check(cudaGetDeviceProperties(&device, 0), "no usable GPU");
  std::printf("device: %s, compute capability %d.%d\n", device.name, device.major, device.minor);
  auto ops = std::move(*CpuOps::Create({.isa = Isa::kScalar, .num_threads = 8}));
  cuda::TestEmbed();
  cuda::TestRows(*ops);
  for (const int d : {64, 128}) {
    for (const int length : {0, 3, 45}) {
      for (const int tasks : {1, 2}) {
        for (const bool bf16 : {false, true}) cuda::TestRawRows(d, length, tasks, bf16);
      }
    }
  }
  cuda::TestChoices();
  cuda::TestFollow();
  cuda::TestRecurrentLevels(argc > 1 && std::string(argv[1]) == "--quick");
  return cuda::Summary("device_test");
}
