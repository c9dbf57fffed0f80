// Speed of the CPU ops at the shape of a 30 M parameter model (8 layers, width 512, 8 heads of 64, FFN 1,408,
// vocabulary 8,192), beside the read bandwidth of the same memory size.
//
//   build/cpu/bench_ops                                 everything, all hardware threads
//   build/cpu/bench_ops --benchmark_filter=Step/avx512_i8
//
// Shared machines are noisy, so a matmul iteration measures bandwidth and op in turn, a few times each. "floor_%" is
// median time to read the weights' bytes / median time of the op; "best_ms" is the fastest of all repetitions.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fmt/core.h"
#include "kernels/check.h"
#include "kernels/ops.h"
#include "kernels/thread_pool.h"

namespace linspec {
namespace {

constexpr int kLayers = 8, kWidth = 512, kHeads = 8, kHeadDim = 64, kInner = 1408, kVocabulary = 8192, kGroup = 64,
              kTaps = 32;
constexpr int kQkv = 3 * kWidth;

std::vector<float> Random(int64_t n) {
  static std::mt19937 generator(1);
  std::uniform_real_distribution<float> uniform(-0.1f, 0.1f);
  std::vector<float> out(n);
  for (float& x : out) x = uniform(generator);
  return out;
}

std::unique_ptr<CpuOps> MakeOps(Isa isa) {
  auto ops = CpuOps::Create({.isa = isa, .num_threads = 0});
  LINSPEC_CHECK(ops.ok());
  return std::move(*ops);
}

template <typename Body>
double Milliseconds(Body body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}

double Median(std::vector<double> times) {
  std::nth_element(times.begin(), times.begin() + static_cast<int64_t>(times.size()) / 2, times.end());
  return times[times.size() / 2];
}

// Reads a buffer with every hardware thread: the floor of anything that streams as many bytes.
class Reader {
 public:
  explicit Reader(int64_t bytes)
      : pool_(static_cast<int>(std::max(1u, std::thread::hardware_concurrency()))), words_(bytes / sizeof(Word)) {}

  void Read() {
    pool_.ParallelFor(static_cast<int64_t>(words_.size()) / 8, [this](int64_t begin, int64_t end) {
      Word sum[8] = {};
      for (int64_t i = begin; i < end; ++i) {
        for (int j = 0; j < 8; ++j) sum[j] += words_[i * 8 + j];
      }
      for (Word& word : sum) benchmark::DoNotOptimize(word);
    });
  }

 private:
  using Word = uint64_t __attribute__((vector_size(16)));
  ThreadPool pool_;
  std::vector<Word> words_;
};

// The matrices that one step of the model multiplies with.
class Weights {
 public:
  Weights(CpuOps& ops, DType dtype) {
    const auto add = [&](int64_t rows, int64_t cols) {
      matrices_.push_back(ops.Pack(Random(rows * cols).data(), DType::kF32, nullptr, rows, cols, dtype));
    };
    for (int i = 0; i < kLayers; ++i) {
      add(kQkv, kWidth);
      add(kWidth, kWidth);
      add(2 * kInner, kWidth);
      add(kWidth, kInner);
    }
    add(kVocabulary, kWidth);
  }

  void Multiply(CpuOps& ops, const float* x, float* y, int64_t num_rows) const {
    for (const auto& w : matrices_) ops.Matmul({.x = x, .w = w.get(), .y = y, .num_rows = num_rows});
  }
  int64_t bytes() const {
    int64_t sum = 0;
    for (const auto& w : matrices_) sum += w->bytes();
    return sum;
  }
  int64_t parameters() const {
    int64_t sum = 0;
    for (const auto& w : matrices_) sum += w->rows() * w->cols();
    return sum;
  }

 private:
  std::vector<std::unique_ptr<PackedWeight>> matrices_;
};

// Every matmul of one step with num_rows rows.
void BM_Step(benchmark::State& state, Isa isa, DType dtype, int64_t num_rows) {
  const auto ops = MakeOps(isa);
  const Weights weights(*ops, dtype);
  const auto x = Random(num_rows * kInner);
  std::vector<float> y(num_rows * kVocabulary);
  Reader reader(weights.bytes());
  std::vector<double> reads, steps;
  for (auto _ : state) {
    reader.Read();  // the first of each kind only fills the caches
    for (int i = 0; i < 3; ++i) reads.push_back(Milliseconds([&] { reader.Read(); }));
    weights.Multiply(*ops, x.data(), y.data(), num_rows);
    for (int i = 0; i < 3; ++i)
      steps.push_back(Milliseconds([&] { weights.Multiply(*ops, x.data(), y.data(), num_rows); }));
    state.SetIterationTime(steps.back() * 1e-3);
  }
  const double read = Median(reads), step = Median(steps), best = *std::min_element(steps.begin(), steps.end());
  const double bytes = static_cast<double>(weights.bytes()), rows = static_cast<double>(num_rows);
  state.counters["read_GB/s"] = bytes / read * 1e-6;
  state.counters["GB/s"] = bytes / step * 1e-6;
  state.counters["floor_%"] = 100 * read / step;
  state.counters["rows/s"] = rows / step * 1e3;
  state.counters["best_ms"] = best;
  state.counters["best_rows/s"] = rows / best * 1e3;
  state.counters["best_GOP/s"] = 2e-6 * static_cast<double>(weights.parameters()) * rows / best;
}

std::vector<std::byte> RandomOf(DType dtype, int64_t size) {
  std::vector<std::byte> bytes(size * DTypeSize(dtype));
  const std::vector<float> values = Random(size);
  for (int64_t i = 0; i < size; ++i) {
    const uint16_t bits = FloatToBFloat16(values[i]);
    if (dtype == DType::kF32) std::memcpy(&bytes[i * 4], &values[i], 4);
    if (dtype == DType::kBF16) std::memcpy(&bytes[i * 2], &bits, 2);
  }
  return bytes;
}

// One layer's state and rows of one request.
struct Attention {
  Attention(int num_rows, DType dtype)
      : qkv(Random(int64_t{num_rows} * kQkv)),
        out(int64_t{num_rows} * kWidth),
        s(RandomOf(dtype, kHeads * kHeadDim * kHeadDim)),
        ring_k(RandomOf(dtype, kHeads * kGroup * kHeadDim)),
        ring_v(ring_k) {
    layer = {.num_heads = kHeads,
             .num_kv_heads = kHeads,
             .head_dim = kHeadDim,
             .group_size = kGroup,
             .conv_kernel = kTaps,
             .local = true,
             .global = GlobalBranch::kRmsNorm,
             .global_factor = 1.0f,
             .global_gain = gain.data(),
             .global_norm_eps = 1e-6f,
             .decay = gain.data(),
             .conv_taps = taps.data()};
    state = {s.data(), ring_k.data(), ring_v.data(), dtype};
  }
  std::vector<float> qkv, out;
  std::vector<float> gain = std::vector<float>(kHeads, 0.9f), taps = Random(kHeads * kTaps);
  std::vector<std::byte> s, ring_k, ring_v;
  AttentionLayer layer;
  LayerState state;
};

// A chain of num_rows rows in one layer, from the middle of a group.
void BM_Verify(benchmark::State& state, Isa isa, DType dtype, int num_rows) {
  const auto ops = MakeOps(isa);
  Attention a(num_rows, dtype);
  const WindowRequest request{a.state, 64 * kGroup + kGroup / 2, 0, num_rows, nullptr};
  for (auto _ : state) ops->VerifyAttention({&a.layer, a.qkv.data(), a.out.data(), {&request, 1}});
  state.SetItemsProcessed(state.iterations() * num_rows);
}

// A commit that completes a group: one fold of every head.
void BM_Fold(benchmark::State& state, Isa isa, DType dtype) {
  const auto ops = MakeOps(isa);
  Attention a(1, dtype);
  const std::vector<int32_t> path = {0};
  const CommitRequest request{a.state, kGroup - 1, 0, path};
  const CommitAttentionParams params{&a.layer, a.qkv.data(), {&request, 1}};
  for (auto _ : state) ops->CommitAttention({&params, 1});
}

void BM_Prefill(benchmark::State& state, Isa isa, DType dtype, int num_rows) {
  const auto ops = MakeOps(isa);
  Attention a(num_rows, dtype);
  const WindowRequest request{a.state, 64 * kGroup, 0, num_rows, nullptr};
  for (auto _ : state) ops->PrefillAttention({&a.layer, a.qkv.data(), a.out.data(), {&request, 1}});
  state.SetItemsProcessed(state.iterations() * num_rows);
}

// The ops between the matmuls of one layer.
void BM_RowOps(benchmark::State& state, Isa isa, int num_rows) {
  const auto ops = MakeOps(isa);
  auto qkv = Random(int64_t{num_rows} * kQkv), gate_up = Random(int64_t{num_rows} * 2 * kInner),
       weight = Random(kWidth);
  std::vector<float> out(int64_t{num_rows} * kInner);
  std::vector<int64_t> positions(num_rows, 12345);
  for (auto _ : state) {
    ops->RmsNorm({qkv.data(), weight.data(), out.data(), num_rows, kWidth, 1e-5f});
    ops->RopeNormalize({qkv.data(), positions.data(), num_rows, kHeads, kHeads, kHeadDim, 10000.0f, 1e-6f});
    ops->SiluMul({gate_up.data(), out.data(), num_rows, kInner});
  }
  state.SetItemsProcessed(state.iterations() * num_rows);
}

void RegisterIsa(Isa isa) {
  const auto name = [isa](const char* op, const char* dtype, int rows) {
    return fmt::format("{}/{}{}/rows:{}", op, IsaName(isa), dtype, rows);
  };
  const bool scalar = isa == Isa::kScalar;  // hundreds of times slower: a single small case
  for (const auto& [dtype, suffix] : {std::pair{DType::kI8, "_i8"}, {DType::kBF16, "_bf16"}, {DType::kF32, "_f32"}}) {
    for (const int rows : scalar ? std::vector{1} : std::vector{1, 4, 8, 16, 64, 512}) {
      benchmark::RegisterBenchmark(name("Step", suffix, rows).c_str(), BM_Step, isa, dtype, rows)
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond)
          ->MinTime(scalar ? 0.01 : 0.2);
    }
  }
  for (const auto& [dtype, suffix] : {std::pair{DType::kF32, ""}, {DType::kBF16, "_bf16_state"}}) {
    for (const int rows : {1, 16})
      benchmark::RegisterBenchmark(name("Verify", suffix, rows).c_str(), BM_Verify, isa, dtype, rows)->UseRealTime();
    benchmark::RegisterBenchmark(name("Fold", suffix, 1).c_str(), BM_Fold, isa, dtype)->UseRealTime();
    benchmark::RegisterBenchmark(name("Prefill", suffix, 512).c_str(), BM_Prefill, isa, dtype, 512)->UseRealTime();
  }
  for (const int rows : {1, 512})
    benchmark::RegisterBenchmark(name("RowOps", "", rows).c_str(), BM_RowOps, isa, rows)->UseRealTime();
}

}  // namespace
}  // namespace linspec

int main(int argc, char** argv) {
  using linspec::Isa;
  for (const Isa isa : {Isa::kAmx, Isa::kAvx512, Isa::kAvx2, Isa::kScalar}) {
    if (isa <= linspec::DetectIsa()) linspec::RegisterIsa(isa);
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
