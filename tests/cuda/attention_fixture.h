// Requests of one layer shape for the tests of the attention kernels: random rows and trees, what the definition says
// of them, and one call of a kernel over all of them. One thread each; several fixtures may call at the same time, but
// the device works for one after the other: how much shared memory a kernel may take is a setting of the process, which
// each launch makes for its own shape.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <mutex>
#include <random>
#include <vector>

#include "kernels/cuda/launch.h"
#include "tests/cuda/attention_reference.h"
#include "tests/cuda/attention_shape.h"
#include "tests/cuda/device_buffers.h"

namespace linspec::cuda {

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
    static std::mutex device;
    const std::lock_guard<std::mutex> lock(device);
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

}  // namespace linspec::cuda
