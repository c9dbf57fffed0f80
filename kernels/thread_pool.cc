#include "kernels/thread_pool.h"

#include "kernels/check.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace linspec {
namespace {

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Long enough to bridge the gap between two ops of a step, short enough that an idle server costs nothing.
constexpr int kSpins = 4000;

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  LINSPEC_CHECK(num_threads >= 1);
  for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { Work(i); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

std::pair<int64_t, int64_t> ThreadPool::Range(int index) const {
  const int64_t threads = num_threads();
  return {count_ * index / threads, count_ * (index + 1) / threads};
}

void ThreadPool::Run(int64_t count, Function function, void* context) {
  if (count <= 0) return;
  if (workers_.empty() || count == 1) return function(context, 0, count);
  function_ = function;
  context_ = context;
  count_ = count;
  running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  const auto [begin, end] = Range(0);
  if (begin < end) function(context, begin, end);
  for (int spin = 0; running_.load(std::memory_order_acquire) != 0; ++spin) {
    if (spin < kSpins) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::Work(int index) {
  uint32_t seen = 0;
  for (;;) {
    uint32_t epoch = epoch_.load(std::memory_order_acquire);
    for (int spin = 0; epoch == seen; ++spin) {
      if (spin < kSpins) {
        Pause();
      } else {
        epoch_.wait(seen, std::memory_order_acquire);
      }
      epoch = epoch_.load(std::memory_order_acquire);
    }
    seen = epoch;
    if (stop_.load(std::memory_order_relaxed)) return;
    const auto [begin, end] = Range(index);
    if (begin < end) function_(context_, begin, end);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace linspec
