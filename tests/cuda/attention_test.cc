// The attention kernels against the definition in double, over every phase, trees across group boundaries, grouped
// queries, head sizes, padding and every chunking; and the bit guarantees that speculation rests on. A plain program:
// prints one line per check, a summary last, and exits 0 only if all passed.
#include <cstdint>
#include <cstring>
#include <string>

#include "kernels/cuda/launch.h"
#include "tests/cuda/attention_reference.h"
#include "tests/cuda/attention_shape.h"
#include "tests/cuda/device_buffers.h"
#include "tests/cuda/report.h"

namespace linspec::cuda {
namespace {

constexpr Shape kShapes[] = {
    {2, 2, 128, 64, 32, true, 2, true},  {4, 1, 128, 64, 32, true, 1, false}, {4, 2, 64, 64, 32, true, 2, true},
    {3, 3, 64, 64, 0, true, 0, false},   {2, 1, 128, 16, 7, false, 1, true},  {1, 1, 32, 64, 32, true, 1, true},
    {2, 2, 16, 8, 4, true, 1, false},    {2, 1, 96, 64, 32, true, 2, true},   {2, 1, 40, 9, 6, false, 1, true},
    {1, 1, 100, 64, 32, true, 1, false}, {12, 1, 64, 64, 32, true, 2, true},
};

constexpr int kRequests = 3;

struct Request {
  std::vector<float> history;  // committed rows
  std::vector<float> rows;     // of this call
  std::vector<int> parents;    // of the rows, -1 at the root
};

class Fixture {
 public:
  Fixture(const Shape& shape, uint32_t seed) : random_(seed) {
    layer_ = {.heads = shape.heads,
              .kv_heads = shape.kv_heads,
              .d = shape.d,
              .group = shape.group,
              .conv = shape.conv,
              .local = shape.local,
              .global = shape.global,
              .factor = 0.37f,
              .norm_eps = 1e-6f,
              .gain = Normal(random_, shape.heads, 1.0f),
              .decay = shape.decay ? std::vector<float>(shape.kv_heads, 0.9f) : std::vector<float>(),
              .taps = Normal(random_, static_cast<size_t>(shape.heads) * shape.conv, 1.0f)};
    floats_ = int64_t{shape.kv_heads} * (shape.d * shape.d + 2 * shape.group * shape.d);
  }

  bool exact_prefill = true;

  const ReferenceLayer& layer() const { return layer_; }
  int64_t floats() const { return floats_; }
  std::vector<float> Rows(int count) {
    return Normal(random_, int64_t{count} * layer_.stride(), 1.0f / std::sqrt(static_cast<float>(layer_.d)));
  }
  Request Make(int length, int nodes, bool chain) {
    Request request{Rows(length), Rows(nodes), std::vector<int>(nodes, -1)};
    for (int i = 1; i < nodes; ++i) {
      request.parents[i] = i - 1 - (chain ? 0 : static_cast<int>(random_() % std::min(i, 4)));
    }
    return request;
  }

  TokenPath Path(const Request& request, int node) const {
    TokenPath path;
    for (int i = node; i >= 0; i = request.parents[i]) path.push_back(&request.rows[int64_t{i} * layer_.stride()]);
    const auto length = static_cast<int64_t>(request.history.size()) / layer_.stride();
    for (int64_t i = length; i-- > 0;) path.push_back(&request.history[i * layer_.stride()]);
    std::reverse(path.begin(), path.end());
    return path;
  }

  // Slots are not in request order; slot 0 belongs to nobody and must stay as it is.
  static int Slot(int request) { return request < 4 ? 4 - request : request + 1; }
  std::vector<float> States(const std::vector<Request>& requests) const {
    std::vector<float> states((std::max<size_t>(requests.size(), 4) + 1) * floats_, 0.25f);
    for (size_t r = 0; r < requests.size(); ++r) {
      const std::vector<float> state = ReferenceState(layer_, Path(requests[r], -1));
      std::copy(state.begin(), state.end(), states.begin() + Slot(static_cast<int>(r)) * floats_);
    }
    return states;
  }

  using Launcher = void (*)(const AttentionParams&, int, cudaStream_t);
  // One call over all requests and a padding task; returns the output rows and updates `states`.
  std::vector<float> Call(Launcher launch, const std::vector<Request>& requests, bool tree,
                          const std::vector<std::vector<int32_t>>& accepted, std::vector<float>& states) const {
    std::vector<Task> tasks;
    std::vector<float> qkv;
    std::vector<uint64_t> ancestors;
    std::vector<int32_t> paths;
    int32_t rows = 0, max_rows = 0;
    int64_t groups = 0;
    for (size_t r = 0; r < requests.size(); ++r) {
      const Request& request = requests[r];
      const auto count = static_cast<int32_t>(request.parents.size());
      Task task{
          static_cast<int64_t>(request.history.size()) / layer_.stride(), Slot(static_cast<int>(r)), rows, count, 0, 0};
      if (!accepted.empty()) {
        task.path_begin = static_cast<int32_t>(paths.size());
        task.path_length = static_cast<int32_t>(accepted[r].size());
        paths.insert(paths.end(), accepted[r].begin(), accepted[r].end());
      }
      tasks.push_back(task);
      groups += PrefillGroups(task.length, count, layer_.group);
      qkv.insert(qkv.end(), request.rows.begin(), request.rows.end());
      for (int i = 0; i < count; ++i) {
        const int parent = request.parents[i];
        ancestors.push_back((parent < 0 ? 0 : ancestors[rows + parent]) | uint64_t{1} << (i % 64));
      }
      rows += count;
      max_rows = std::max(max_rows, count);
    }
    tasks.push_back({0, -1, 0, 1, 0, 1});
    const DeviceArray<float> device_states(states), device_qkv(qkv), gain(layer_.gain), taps(layer_.taps),
        decay(layer_.decay), out(static_cast<size_t>(rows) * layer_.heads * layer_.d);
    const DeviceArray<uint64_t> device_ancestors(ancestors);
    const DeviceArray<int32_t> device_paths(paths);
    const DeviceArray<Task> device_tasks(tasks);
    const LayerParams layer{layer_.heads,
                            layer_.kv_heads,
                            layer_.d,
                            layer_.group,
                            layer_.conv,
                            layer_.local,
                            static_cast<Global>(layer_.global),
                            layer_.factor,
                            layer_.norm_eps,
                            gain.get(),
                            layer_.decay.empty() ? nullptr : decay.get(),
                            taps.get()};
    const DeviceArray<float> scratch(PrefillScratchFloats(layer, groups));
    launch({.layer = layer,
            .states = {device_states.get(), floats_, 0},
            .tasks = device_tasks.get(),
            .qkv = device_qkv.get(),
            .ancestors = tree ? device_ancestors.get() : nullptr,
            .paths = device_paths.get(),
            .out = out.get(),
            .out_bf16 = nullptr,
            .max_rows = max_rows,
            .scratch = scratch.get(),
            .num_groups = static_cast<int32_t>(groups),
            .exact_prefill = exact_prefill},
           static_cast<int>(tasks.size()), nullptr);
    Sync();
    states = device_states.Read();
    return out.Read();
  }

  std::vector<float> Expected(const std::vector<Request>& requests) const {
    std::vector<float> expected;
    for (const Request& request : requests) {
      for (int i = 0; i < static_cast<int>(request.parents.size()); ++i) {
        const std::vector<float> row = ReferenceOutput(layer_, Path(request, i));
        expected.insert(expected.end(), row.begin(), row.end());
      }
    }
    return expected;
  }

  // Moves rows of the path to the history.
  void Accept(Request& request, const std::vector<int32_t>& path) const {
    for (const int32_t node : path) {
      const auto row = request.rows.begin() + int64_t{node} * layer_.stride();
      request.history.insert(request.history.end(), row, row + layer_.stride());
    }
  }

 private:
  std::mt19937 random_;
  ReferenceLayer layer_;
  int64_t floats_;
};

std::vector<int32_t> PathTo(const Request& request, int node) {
  std::vector<int32_t> path;
  for (int i = node; i >= 0; i = request.parents[i]) path.insert(path.begin(), i);
  return path;
}

// Commit by way of the call for all layers.
void CommitLayer(const AttentionParams& params, int num_tasks, cudaStream_t stream) {
  const DeviceArray<AttentionParams> layers(std::vector<AttentionParams>{params});
  LaunchCommitLayers(params.layer, false, layers.get(), 1, num_tasks, stream);
  Sync();
}

double Different(const float* a, const float* b, size_t count) { return std::memcmp(a, b, count * 4) == 0 ? 0.0 : 1.0; }

// Relative error of states; where nothing may have been written yet (NaN in `expected`), a must be untouched.
double StateError(std::vector<float> a, std::vector<float> expected) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(expected[i]) && std::isnan(a[i])) a[i] = expected[i] = 0.0f;
  }
  const bool wrote = std::any_of(expected.begin(), expected.end(), [](float x) { return std::isnan(x); });
  return wrote ? INFINITY : RelativeError(a, expected);
}

struct Errors {
  double out = 0, rounded = 0, wrote = 0, state = 0, bits = 0, fused = 0;
};

// A tree verified, then its last path committed; every node of that path inside the open group must have the bits
// that decoding it alone gives.
void VerifyAndCommit(const Shape& shape, int length, uint32_t seed, Errors& errors) {
  Fixture f(shape, seed);
  std::vector<Request> requests = {f.Make(length, 1, true), f.Make(length + shape.group - 1, 64, seed % 2 == 0),
                                   f.Make(length + 2 * shape.group, 7, false)};
  std::vector<float> states = f.States(requests), before = states;
  const std::vector<float> out = f.Call(&LaunchVerify, requests, true, {}, states);
  errors.out = std::max(errors.out, RelativeError(out, f.Expected(requests)));
  errors.wrote = std::max(errors.wrote, Different(states.data(), before.data(), states.size()));

  std::vector<std::vector<int32_t>> paths;
  for (const Request& r : requests) paths.push_back(PathTo(r, static_cast<int>(r.parents.size()) - 1));
  f.Call(&LaunchCommit, requests, true, paths, states);
  std::vector<Request> after = requests;
  for (int r = 0; r < kRequests; ++r) f.Accept(after[r], paths[r]);
  errors.state = std::max(errors.state, StateError(states, f.States(after)));

  Request alone = requests[2];
  std::vector<float> walked = before;
  const int stride = f.layer().stride(), width = shape.heads * shape.d;
  const int phase = length % shape.group;
  for (size_t step = 0; step < paths[2].size() && phase + static_cast<int>(step) < shape.group; ++step) {
    const int node = paths[2][step];
    const auto row = requests[2].rows.begin() + int64_t{node} * stride;
    alone.rows.assign(row, row + stride);
    alone.parents = {-1};
    const int others = step % 2 == 0 ? 0 : 3;  // every other time the only row of the call
    std::vector<Request> call = {f.Make(1, others, true), f.Make(3, 2 * others, true), alone};
    const std::vector<float> single = f.Call(&LaunchVerify, call, true, {}, walked);
    errors.bits =
        std::max(errors.bits, Different(&single[3 * others * width], &out[int64_t{65 + node} * width], width));
    call[0] = call[1] = f.Make(1, 0, true);
    f.Call(&CommitLayer, call, true, {{}, {}, {0}}, walked);
    f.Accept(alone, {0});
  }
}

// More items than blocks: every block takes several, whose loads overlap. Each request has the bits that it has alone.
double Crowd(const Shape& shape, int nodes, int crowd) {
  Fixture f(shape, 77);
  std::vector<Request> requests;
  for (int r = 0; r < crowd; ++r)
    requests.push_back(f.Make(r * 3 % (2 * shape.group), 1 + (nodes > 1 ? r % nodes : 0), false));
  double different = 0;
  std::vector<float> states = f.States(requests);
  const std::vector<float> all = f.Call(&LaunchVerify, requests, true, {}, states);
  const int width = shape.heads * shape.d;
  int64_t row = 0;
  for (int r = 0; r < crowd; ++r) {
    std::vector<Request> alone = {requests[r]};
    const auto rows = static_cast<int64_t>(requests[r].parents.size());
    if (r % 7 == 0) {
      std::vector<float> own = f.States(alone);
      const std::vector<float> out = f.Call(&LaunchVerify, alone, true, {}, own);
      different = std::max(different, Different(&all[row * width], out.data(), rows * width));
    }
    row += rows;
  }
  return different;
}

void Prefill(const Shape& shape, int length, uint32_t seed, Errors& errors) {
  Fixture f(shape, seed);
  std::vector<Request> requests = {f.Make(length, 1, true), f.Make(length + shape.group - 1, 150, true),
                                   f.Make(length / 2, 65, true)};
  std::vector<float> states = f.States(requests), chunked = states;
  const std::vector<float> out = f.Call(&LaunchPrefill, requests, false, {}, states);
  const std::vector<float> expected = f.Expected(requests);
  errors.out = std::max(errors.out, RelativeError(out, expected));
  std::vector<float> rounded = f.States(requests);
  f.exact_prefill = false;
  errors.rounded =
      std::max(errors.rounded, RelativeError(f.Call(&LaunchPrefill, requests, false, {}, rounded), expected));
  errors.fused = std::max(errors.fused, Different(rounded.data(), states.data(), states.size()));
  f.exact_prefill = true;
  std::vector<Request> after = requests;
  for (Request& request : after) {
    for (int i = 0; i < static_cast<int>(request.parents.size()); ++i) f.Accept(request, {i});
  }
  errors.state = std::max(errors.state, StateError(states, f.States(after)));

  // The same rows in pieces of any size leave the same bits in states and outputs.
  std::vector<Request> pieces = requests;
  std::mt19937 random(seed);
  const int stride = f.layer().stride(), width = shape.heads * shape.d;
  std::vector<int> done(kRequests, 0);
  const int total[] = {1, 150, 65}, begin[] = {0, 1, 151};
  while (done[0] < total[0] || done[1] < total[1] || done[2] < total[2]) {
    std::vector<int> count(kRequests);
    for (int r = 0; r < kRequests; ++r) {
      const int left = total[r] - done[r];
      count[r] = left == 0 ? 0 : std::min<int>(left, 1 + static_cast<int>(random() % 90));
      pieces[r].rows.assign(requests[r].rows.begin() + int64_t{done[r]} * stride,
                            requests[r].rows.begin() + int64_t{done[r] + count[r]} * stride);
      pieces[r].parents.assign(count[r], -1);
      for (int i = 1; i < count[r]; ++i) pieces[r].parents[i] = i - 1;
    }
    const std::vector<float> part = f.Call(&LaunchPrefill, pieces, false, {}, chunked);
    int64_t at = 0;
    for (int r = 0; r < kRequests; ++r) {
      errors.bits = std::max(errors.bits, Different(part.data() + at * width, &out[int64_t{begin[r] + done[r]} * width],
                                                    int64_t{count[r]} * width));
      at += count[r];
      for (int i = 0; i < count[r]; ++i) f.Accept(pieces[r], {i});
      done[r] += count[r];
    }
  }
  errors.bits = std::max(errors.bits, Different(chunked.data(), states.data(), states.size()));

  // Token by token: the same bits in the state, outputs equal up to rounding.
  std::vector<Request> single = {f.Make(0, 0, true), f.Make(0, 0, true), requests[2]};
  std::vector<float> decoded = f.States(requests), outs;
  for (int i = 0; i < total[2]; ++i) {
    single[2].rows.assign(requests[2].rows.begin() + int64_t{i} * stride,
                          requests[2].rows.begin() + int64_t{i + 1} * stride);
    single[2].parents = {-1};
    const std::vector<float> part = f.Call(&LaunchVerify, single, true, {}, decoded);
    f.Call(&CommitLayer, single, true, {{}, {}, {0}}, decoded);
    outs.insert(outs.end(), part.begin(), part.end());
    f.Accept(single[2], {0});
  }
  const std::vector<float> own(out.begin() + int64_t{begin[2]} * width, out.end());
  const int64_t size = f.floats(), at = Fixture::Slot(2) * size;
  errors.fused = std::max({errors.fused, Different(&decoded[at], &states[at], size)});
  errors.out = std::max(errors.out, RelativeError(outs, own));
}

}  // namespace
}  // namespace linspec::cuda

// --quick: few sizes, for compute-sanitizer, which slows kernels by two orders of magnitude.
int main(int argc, char** argv) {
  using namespace linspec::cuda;
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  Check(cudaSetDevice(0), "no usable GPU");
  for (size_t i = 0; i < std::size(kShapes); ++i) {
    const Shape& shape = kShapes[i];
    Errors verify, prefill;
    const int step = quick ? 31 : shape.group > 16 ? 3 : 1;
    for (int phase = 0; phase < shape.group; phase += step) {
      VerifyAndCommit(shape, phase, static_cast<uint32_t>(1 + i * 1000 + phase), verify);
      if (phase % (2 * step) == 0) Prefill(shape, phase, static_cast<uint32_t>(7 + i * 1000 + phase), prefill);
    }
    const std::string name = " heads " + std::to_string(shape.heads) + "/" + std::to_string(shape.kv_heads) + " d " +
                             std::to_string(shape.d) + " group " + std::to_string(shape.group);
    Report("verify" + name, verify.out, 1e-5);
    Report("verify" + name + ": state untouched", verify.wrote, 0.0);
    Report("verify" + name + ": alone as in a tree", verify.bits, 0.0);
    Report("commit" + name, verify.state, 1e-5);
    Report("prefill" + name, prefill.rounded, 1e-3);
    Report("prefill" + name + ": exact", prefill.out, 1e-5);
    Report("prefill" + name + ": state", prefill.state, 1e-5);
    Report("prefill" + name + ": any chunking", prefill.bits, 0.0);
    Report("prefill" + name + ": state of decoding", prefill.fused, 0.0);
  }
  // 150 requests are 300 items or more, for the 264 blocks of an H200.
  for (const int nodes : {1, 8, 40})
    Report("verify many requests of up to " + std::to_string(nodes) + " nodes",
           Crowd(kShapes[0], nodes, quick ? 150 : 500), 0.0);
  return Summary("attention_test");
}
