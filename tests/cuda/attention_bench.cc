// Attention at LLaMA-2-7B layer shape (32 heads of 128, groups of 64, 32 taps, fp32 state): every time beside its
// floor, from the read bandwidth measured in this run. Buffers rotate so that nothing is served from the L2; the ops
// of a measurement are replayed as one CUDA graph, so that a time is what a step of a captured model pays.
#include <cstdint>
#include <memory>

#include "kernels/cuda/launch.h"
#include "tests/cuda/device_buffers.h"
#include "tests/cuda/per_node.h"

namespace linspec::cuda {
namespace {

constexpr int kHeads = 32, kDim = 128, kGroup = 64, kConv = 32;
constexpr int kLength = 64 * 15 + 31;  // half a group in the ring
constexpr int64_t kStateFloats = int64_t{kHeads} * (kDim * kDim + 2 * kGroup * kDim);
constexpr int64_t kRotatedBytes = int64_t{1} << 29;

// Median time of one of `count` calls of `work`, captured into a graph.
double GraphMicroseconds(const std::function<void(int, cudaStream_t)>& work, int count = 16) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  Check(cudaStreamCreate(&stream), "stream");
  work(0, stream);
  Check(cudaGetLastError(), "launch");
  Check(cudaStreamSynchronize(stream), "first run");
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (int i = 0; i < count; ++i) work(i, stream);
  Check(cudaStreamEndCapture(stream, &graph), "capture");
  Check(cudaGraphInstantiate(&exec, graph, 0), "graph");
  const double us = MedianMicroseconds([&](int) { Check(cudaGraphLaunch(exec, nullptr), "replay"); }, 9, 2);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return us / count;
}

double ReadBandwidth() {
  const int blocks = 132 * 8;
  const int64_t floats = int64_t{1} << 29;
  const DeviceArray<float> data(floats), out(blocks);
  Check(cudaMemset(data.get(), 0x3D, floats * 4), "fill");
  const double us = MedianMicroseconds([&](int) { LaunchRead(data.get(), floats, out.get(), blocks, nullptr); });
  return static_cast<double>(floats * 4) / us * 1e-6;
}

struct Layer {
  DeviceArray<float> gain{std::vector<float>(kHeads, 0.5f)}, decay{std::vector<float>(kHeads, 0.9f)}, taps;
  LayerParams params;

  explicit Layer(std::mt19937& random) : taps(Normal(random, kHeads * kConv, 0.3f)) {
    params = {kHeads,           kHeads, kDim,  kGroup,     kConv,       1,
              Global::kRmsNorm, 1.0f,   1e-6f, gain.get(), decay.get(), taps.get()};
  }
};

DeviceArray<float>* States(std::mt19937& random, int count) {
  const std::vector<float> one = Normal(random, kStateFloats, 0.05f);
  auto* states = new DeviceArray<float>(count * kStateFloats);
  Check(cudaMemcpy(states->get(), one.data(), kStateFloats * 4, cudaMemcpyHostToDevice), "upload");
  for (int i = 1; i < count; ++i) {
    Check(cudaMemcpy(states->get() + i * kStateFloats, states->get(), kStateFloats * 4, cudaMemcpyDeviceToDevice),
          "copy");
  }
  return states;
}

// A verify of binary trees. Rotates over copies of the states.
class VerifyBench {
 public:
  VerifyBench(int requests, int nodes, bool bf16)
      : requests_(requests), nodes_(nodes), bf16_(bf16), random_(1), layer_(random_) {
    copies_ = std::max<int>(2, static_cast<int>(kRotatedBytes / (requests * kStateFloats * ElementBytes())));
    // As bf16 a float's halves are values of which one has its size: good enough to be read.
    states_.reset(States(random_, copies_ * requests / (bf16 ? 2 : 1)));
    std::vector<uint64_t> ancestors;
    std::vector<Task> tasks;
    for (int r = 0; r < requests; ++r) {
      tasks.push_back({kLength, r, r * nodes, nodes, 0, 0});
      for (int i = 0; i < nodes; ++i) {
        ancestors.push_back((i == 0 ? 0 : ancestors[r * nodes + (i - 1) / 2]) | uint64_t{1} << i);
      }
    }
    ancestors_ = std::make_unique<DeviceArray<uint64_t>>(ancestors);
    tasks_ = std::make_unique<DeviceArray<Task>>(tasks);
    qkv_ = std::make_unique<DeviceArray<float>>(Normal(random_, int64_t{rows()} * 3 * kHeads * kDim, 0.088f));
    kv_ = std::make_unique<DeviceArray<float>>(Normal(random_, int64_t{rows()} * 2 * kHeads * kDim, 0.088f));
    out_ = std::make_unique<DeviceArray<float>>(int64_t{rows()} * kHeads * kDim);
  }

  int rows() const { return requests_ * nodes_; }
  double Microseconds() const {
    return GraphMicroseconds([&](int i, cudaStream_t stream) {
      LaunchVerify({.layer = layer_.params,
                    .states = {StatesOf(i), kStateFloats, 0, bf16_},
                    .tasks = tasks_->get(),
                    .qkv = qkv_->get(),
                    .kv = kv_->get(),
                    .ancestors = ancestors_->get(),
                    .paths = nullptr,
                    .out = out_->get(),
                    .out_bf16 = nullptr,
                    .max_rows = nodes_},
                   requests_, stream);
    });
  }
  // S, the ring part needed, and the rows, once each.
  double Bytes() const {
    const double state = requests_ * (kDim * kDim + 2.0 * (kLength % kGroup) * kDim) + rows() * 2.0 * kDim;
    return kHeads * (state * static_cast<double>(ElementBytes()) + rows() * 2.0 * kDim * sizeof(float));
  }
  double PerNodeMicroseconds() const {
    const DeviceArray<float> node_states(int64_t{rows()} * kHeads * kDim * kDim);
    return GraphMicroseconds([&](int i, cudaStream_t stream) {
      LaunchPerNodeVerify(static_cast<const float*>(StatesOf(i)), node_states.get(), qkv_->get(), out_->get(),
                          requests_, nodes_, kHeads, stream);
    });
  }

 private:
  int64_t ElementBytes() const { return bf16_ ? 2 : 4; }
  void* StatesOf(int i) const {
    return reinterpret_cast<char*>(states_->get()) + i % copies_ * requests_ * kStateFloats * ElementBytes();
  }

  const int requests_, nodes_;
  const bool bf16_;
  std::mt19937 random_;
  const Layer layer_;
  int copies_;
  std::unique_ptr<DeviceArray<float>> states_, qkv_, kv_, out_;
  std::unique_ptr<DeviceArray<uint64_t>> ancestors_;
  std::unique_ptr<DeviceArray<Task>> tasks_;
};

void BenchVerify(int requests, int nodes, double bandwidth) {
  const VerifyBench bench(requests, nodes, /*bf16=*/false), narrow(requests, nodes, /*bf16=*/true);
  const double us = bench.Microseconds(), floor = bench.Bytes() / bandwidth * 1e-6;
  const double narrow_us = narrow.Microseconds(), narrow_floor = narrow.Bytes() / bandwidth * 1e-6;
  const double node_bytes = static_cast<double>(bench.rows() + requests) * kHeads * kDim * kDim * 4;
  std::printf(
      "verify (%3d,%2d): %8.2f us, floor %7.2f us, %5.1f %%; bf16 states: %8.2f us, floor %7.2f us, %5.1f %%; "
      "a state per node: %8.2f us, %4.1f x the bytes\n",
      requests, nodes, us, floor, 100.0 * floor / us, narrow_us, narrow_floor, 100.0 * narrow_floor / narrow_us,
      bench.PerNodeMicroseconds(), node_bytes / bench.Bytes());
}

// 64 tokens of one request taken one by one into S, and appended and folded once: the same S.
void CheckEagerCommit() {
  std::mt19937 random(4);
  Layer layer(random);
  layer.params.decay = nullptr;
  const std::unique_ptr<DeviceArray<float>> states(States(random, 2));
  const DeviceArray<float> qkv(Normal(random, int64_t{kGroup} * 3 * kHeads * kDim, 0.088f));
  std::vector<int32_t> path(kGroup);
  for (int i = 0; i < kGroup; ++i) path[i] = i;
  const DeviceArray<int32_t> paths(path);
  const DeviceArray<Task> tasks(std::vector<Task>{{int64_t{kGroup} * 15, 0, 0, kGroup, 0, kGroup}});
  LaunchCommit({.layer = layer.params,
                .states = {states->get(), kStateFloats, 0},
                .tasks = tasks.get(),
                .qkv = qkv.get(),
                .ancestors = nullptr,
                .paths = paths.get(),
                .out = nullptr,
                .out_bf16 = nullptr},
               1, nullptr);
  LaunchEagerCommit(states->get() + kStateFloats, kStateFloats, qkv.get(), 1, kGroup, kHeads, nullptr);
  Sync();
  const std::vector<float> both = states->Read();
  const std::vector<float> lazy(both.begin(), both.begin() + kHeads * kDim * kDim);
  const std::vector<float> eager(both.begin() + kStateFloats, both.begin() + kStateFloats + kHeads * kDim * kDim);
  const double error = RelativeError(lazy, eager);
  std::printf("eager and lazy commit of %d tokens: S differs by %.1e\n", kGroup, error);
  if (error > 1e-5) std::exit(1);
}

// Requests at all phases of their groups, so that the mean share of folds is in it.
void BenchLazyCommit(int requests, int tokens) {
  constexpr int kLayers = 8;
  std::mt19937 random(5);
  const Layer layer(random);
  const DeviceArray<float> states(int64_t{requests} * kLayers * kStateFloats);
  Check(cudaMemset(states.get(), 0x3D, states.size() * sizeof(float)), "fill");
  const int64_t rows = int64_t{requests} * tokens;
  const DeviceArray<float> qkv(Normal(random, rows * 3 * kHeads * kDim, 0.088f));
  std::vector<Task> tasks;
  std::vector<int32_t> path;
  for (int r = 0; r < requests; ++r) {
    tasks.push_back({64 * 15 + r % kGroup, r, r * tokens, tokens, r * tokens, tokens});
    for (int i = 0; i < tokens; ++i) path.push_back(i);
  }
  const DeviceArray<Task> device_tasks(tasks);
  const DeviceArray<int32_t> paths(path);
  std::vector<AttentionParams> layers;
  for (int i = 0; i < kLayers; ++i) {
    layers.push_back({.layer = layer.params,
                      .states = {states.get(), kLayers * kStateFloats, i * kStateFloats},
                      .tasks = device_tasks.get(),
                      .qkv = qkv.get(),
                      .ancestors = nullptr,
                      .paths = paths.get(),
                      .out = nullptr,
                      .out_bf16 = nullptr});
  }
  const DeviceArray<AttentionParams> device_layers(layers);
  const double lazy = GraphMicroseconds([&](int, cudaStream_t stream) {
    LaunchCommitLayers(layer.params, false, device_layers.get(), kLayers, requests, stream);
  });
  const double eager = GraphMicroseconds([&](int i, cudaStream_t stream) {
    LaunchEagerCommit(states.get() + i % kLayers * kStateFloats, kLayers * kStateFloats, qkv.get(), requests, tokens,
                      kHeads, stream);
  });
  std::printf("commit (%3d) of %d tokens, a layer: lazy %8.2f us, eager %8.2f us\n", requests, tokens, lazy / kLayers,
              eager);
}

void BenchCommit(int requests, int phase, double bandwidth) {
  std::mt19937 random(2);
  const int copies = std::max<int>(2, static_cast<int>(kRotatedBytes / (requests * kStateFloats * 4)));
  const Layer layer(random);
  const std::unique_ptr<DeviceArray<float>> states(States(random, copies * requests));
  std::vector<Task> tasks;
  for (int r = 0; r < requests; ++r) {
    tasks.push_back({64 * 15 + (phase < 0 ? r % kGroup : phase), r, r, 1, r, 1});
  }
  const DeviceArray<float> qkv(Normal(random, int64_t{requests} * 3 * kHeads * kDim, 0.088f));
  const DeviceArray<int32_t> paths(std::vector<int32_t>(requests, 0));
  const DeviceArray<Task> device_tasks(tasks);
  const double us = GraphMicroseconds([&](int i, cudaStream_t stream) {
    LaunchCommit({.layer = layer.params,
                  .states = {states->get() + i % copies * requests * kStateFloats, kStateFloats, 0},
                  .tasks = device_tasks.get(),
                  .qkv = qkv.get(),
                  .ancestors = nullptr,
                  .paths = paths.get(),
                  .out = nullptr,
                  .out_bf16 = nullptr},
                 requests, stream);
  });
  double bytes = 0;
  for (const Task& task : tasks) {
    bytes += 4.0 * kHeads * (4.0 * kDim + (task.length % kGroup == kGroup - 1 ? 2.0 * kDim * (kDim + kGroup) : 0.0));
  }
  std::printf("commit (%3d) phase %2d: %8.2f us, floor %7.2f us\n", requests, phase, us, bytes / bandwidth * 1e-6);
}

// Host time matters too: a million random values, repeated.
std::vector<float> Tiled(std::mt19937& random, int64_t size, float scale) {
  const std::vector<float> some = Normal(random, std::min<int64_t>(size, 1'000'003), scale);
  std::vector<float> values(size);
  for (int64_t i = 0; i < size; ++i) values[i] = some[i % some.size()];
  return values;
}

void BenchPrefill(int requests, int tokens, bool exact, double bandwidth) {
  std::mt19937 random(3);
  const Layer layer(random);
  const int copies = 2;
  const std::unique_ptr<DeviceArray<float>> states(States(random, copies * requests));
  std::vector<Task> tasks;
  for (int r = 0; r < requests; ++r) tasks.push_back({64 * 15, r, r * tokens, tokens, 0, 0});
  const int64_t rows = int64_t{requests} * tokens;
  const DeviceArray<float> qkv(Tiled(random, rows * 3 * kHeads * kDim, 0.088f)), out(rows * kHeads * kDim);
  const DeviceArray<Task> device_tasks(tasks);
  const int64_t groups = requests * PrefillGroups(64 * 15, tokens, kGroup);
  const DeviceArray<float> scratch(PrefillScratchFloats(layer.params, groups));
  const double us = GraphMicroseconds(
      [&](int i, cudaStream_t stream) {
        LaunchPrefill({.layer = layer.params,
                       .states = {states->get() + i % copies * requests * kStateFloats, kStateFloats, 0},
                       .tasks = device_tasks.get(),
                       .qkv = qkv.get(),
                       .ancestors = nullptr,
                       .paths = nullptr,
                       .out = out.get(),
                       .out_bf16 = nullptr,
                       .scratch = scratch.get(),
                       .num_groups = static_cast<int32_t>(groups),
                       .exact_prefill = exact},
                      requests, stream);
      },
      2);
  const double floor = 16.0 * static_cast<double>(rows) * kHeads * kDim / bandwidth * 1e-6;
  std::printf("prefill%s (%2d x %5d): %9.1f us, %7.1f ns/token, floor of q,k,v,out %7.1f us\n", exact ? ", exact" : "",
              requests, tokens, us, us * 1e3 / static_cast<double>(rows), floor);
}

}  // namespace
}  // namespace linspec::cuda

// With arguments, one measurement for a profiler: verify REQUESTS NODES or prefill REQUESTS TOKENS.
int main(int argc, char** argv) {
  using namespace linspec::cuda;
  Check(cudaSetDevice(0), "no usable GPU");
  if (argc == 4) {
    const int requests = std::atoi(argv[2]), rows = std::atoi(argv[3]);
    if (std::strcmp(argv[1], "verify") == 0) BenchVerify(requests, rows, 1.0);
    if (std::strcmp(argv[1], "prefill") == 0) BenchPrefill(requests, rows, false, 1.0);
    return 0;
  }
  const double bandwidth = ReadBandwidth();
  std::printf("read %.2f TB/s\n", bandwidth);
  for (const auto& [requests, nodes] :
       {std::pair{1, 1}, {1, 8}, {1, 64}, {4, 32}, {16, 8}, {64, 4}, {64, 1}, {256, 1}}) {
    BenchVerify(requests, nodes, bandwidth);
  }
  for (const int phase : {0, kGroup - 1, -1}) {
    for (const int requests : {1, 64, 256}) BenchCommit(requests, phase, bandwidth);
  }
  CheckEagerCommit();
  for (const auto& [requests, tokens] : {std::pair{1, 1}, {16, 4}, {64, 1}, {64, 4}, {256, 1}}) {
    BenchLazyCommit(requests, tokens);
  }
  for (const auto& [requests, tokens] : {std::pair{1, 512}, {1, 2048}, {1, 8192}, {8, 512}, {64, 64}}) {
    BenchPrefill(requests, tokens, false, bandwidth);
  }
  BenchPrefill(1, 2048, true, bandwidth);
  return 0;
}
