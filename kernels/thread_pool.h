// A fixed set of workers that run one parallel loop at a time; the caller works along.
//
// Loops are microseconds apart while a model runs, so workers spin a little, then yield, before they sleep. A loop is
// cut into one contiguous share per thread and each share into a few pieces. Threads claim pieces of their own share
// first, which keeps what an index reads and writes in the same cache from loop to loop, then of the others': a worker
// that the system has not scheduled costs nothing. Which thread runs an index is therefore not fixed; what the index
// computes must not depend on it.
// Threads: ParallelFor is called by one thread at a time and returns when all indices are done; the body must not
// throw.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace linspec {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);  // caller included; at least 1
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // body(thread, begin, end) for a partition of [0, count) whose inner borders are multiples of `grain`; thread is that
  // of the caller, 0 to num_threads() - 1.
  template <typename Body>
  void ParallelForThreads(int64_t count, int64_t grain, Body&& body) {
    Run(
        count, grain,
        [](void* context, int thread, int64_t begin, int64_t end) {
          (*static_cast<std::remove_reference_t<Body>*>(context))(thread, begin, end);
        },
        &body);
  }
  // body(begin, end)
  template <typename Body>
  void ParallelFor(int64_t count, int64_t grain, Body&& body) {
    ParallelForThreads(count, grain, [&body](int, int64_t begin, int64_t end) { body(begin, end); });
  }
  template <typename Body>
  void ParallelFor(int64_t count, Body&& body) {
    ParallelFor(count, 1, body);
  }

 private:
  using Function = void (*)(void* context, int thread, int64_t begin, int64_t end);
  void Run(int64_t count, int64_t grain, Function function, void* context);
  void Work(int thread);
  // Claims and runs pieces of loop `epoch` until none is left, beginning with the share of `thread`.
  void RunPieces(uint32_t epoch, int thread);
  int64_t ShareBegin(int64_t share) const { return num_pieces_ * share / num_threads(); }  // first piece
  int RunShare(uint32_t epoch, int share, int thread);  // returns how many pieces it ran

  // Written by the caller before the loop's first ticket. A claimed piece keeps the loop open, so whoever holds one may
  // read them.
  Function function_ = nullptr;
  void* context_ = nullptr;
  int64_t num_grains_ = 0, grain_ = 1, count_ = 0;
  int64_t num_pieces_ = 0;  // all shares together

  // Loop number in the high half, pieces of the share not yet claimed in the low half: a late worker cannot take a
  // piece of a loop that it has not seen.
  struct alignas(64) Tickets {
    std::atomic<uint64_t> left{0};
  };
  std::vector<Tickets> shares_;  // [num_threads]
  alignas(64) std::atomic<int> unfinished_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};  // of the newest loop; workers sleep on it
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace linspec
