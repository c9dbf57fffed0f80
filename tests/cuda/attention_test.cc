// The attention kernels against the definition in double, over every phase, trees across group boundaries, grouped
// queries, head sizes, padding and every chunking; and the bit guarantees that speculation rests on. A plain program:
// prints one line per check, a summary last, and exits 0 only if all passed.
#include <cstdint>
#include <cstring>
#include <future>
#include <string>

#include "kernels/cuda/launch.h"
#include "tests/cuda/attention_fixture.h"
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

// Two layers in one launch, the second in the slots behind those of the first.
void CommitTwoLayers(const AttentionParams& params, int num_tasks, cudaStream_t stream) {
  std::vector<AttentionParams> both(2, params);
  both[1].states.layer_offset = num_tasks * params.states.per_slot;
  const DeviceArray<AttentionParams> layers(both);
  LaunchCommitLayers(params.layer, false, layers.get(), 2, num_tasks, stream);
  Sync();
}

// More requests than a block has threads, of which some fill a group: each ends as it does alone, in both layers.
double CommitCrowd(const Shape& shape, int crowd) {
  Fixture f(shape, 78);
  std::vector<Request> requests;
  std::vector<std::vector<int32_t>> paths;
  for (int r = 0; r < crowd; ++r) {
    requests.push_back(f.Make(r * 5 % (3 * shape.group), r % 11 == 0 ? 0 : 1 + r % 6, false));
    paths.push_back(PathTo(requests.back(), static_cast<int>(requests.back().parents.size()) - 1));
  }
  const std::vector<float> before = f.States(requests);
  std::vector<float> states = before;
  states.insert(states.end(), before.begin(), before.end());
  f.Call(&CommitTwoLayers, requests, true, paths, states);
  double different = Different(states.data(), &states[before.size()], before.size());
  for (int r = 0; r < crowd; r += 7) {
    const std::vector<Request> alone = {requests[r]};
    std::vector<float> own = f.States(alone);
    f.Call(&LaunchCommit, alone, true, {paths[r]}, own);
    different = std::max(
        different, Different(&states[Fixture::Slot(r) * f.floats()], &own[Fixture::Slot(0) * f.floats()], f.floats()));
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

struct ShapeErrors {
  Errors verify, prefill;
};

// Every phase of a group, or with `quick` some.
ShapeErrors CheckShape(size_t index, bool quick) {
  const Shape& shape = kShapes[index];
  ShapeErrors errors;
  const int step = quick ? 31 : shape.group > 16 ? 3 : 1;
  for (int phase = 0; phase < shape.group; phase += step) {
    const auto seed = static_cast<uint32_t>(index * 1000 + phase);
    VerifyAndCommit(shape, phase, 1 + seed, errors.verify);
    if (phase % (2 * step) == 0) Prefill(shape, phase, 7 + seed, errors.prefill);
  }
  return errors;
}

}  // namespace
}  // namespace linspec::cuda

// --quick: few sizes, for compute-sanitizer, which slows kernels by two orders of magnitude.
int main(int argc, char** argv) {
  using namespace linspec::cuda;
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  Check(cudaSetDevice(0), "no usable GPU");
  // The definition takes longer than the kernels: a thread for each shape.
  std::vector<std::future<ShapeErrors>> shapes;
  for (size_t i = 0; i < std::size(kShapes); ++i)
    shapes.push_back(std::async(std::launch::async, CheckShape, i, quick));
  for (size_t i = 0; i < std::size(kShapes); ++i) {
    const Shape& shape = kShapes[i];
    const auto [verify, prefill] = shapes[i].get();
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
  Report("commit of many requests and layers", CommitCrowd(kShapes[2], 300), 0.0);
  return Summary("attention_test");
}
