// A fixed set of workers that run one parallel loop at a time; the caller works along.
//
// Loops are microseconds apart while a model runs, so workers spin a little before they sleep. Work is split into static
// contiguous ranges: what an index computes never depends on the number of threads.
// Threads: ParallelFor is called by one thread at a time and returns when all indices are done; the body must not throw.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace linspec {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);  // caller included; at least 1
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // body(begin, end) for a partition of [0, count).
  template <typename Body>
  void ParallelFor(int64_t count, Body&& body) {
    Run(count, [](void* context, int64_t begin, int64_t end) { (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end); },
        &body);
  }

 private:
  using Function = void (*)(void* context, int64_t begin, int64_t end);
  void Run(int64_t count, Function function, void* context);
  void Work(int index);
  std::pair<int64_t, int64_t> Range(int index) const;

  // Written by the caller before the epoch is raised, read by workers after they saw it.
  Function function_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;

  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> running_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace linspec
