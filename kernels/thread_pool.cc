#include "kernels/thread_pool.h"

#include <algorithm>

#include "kernels/check.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace linspec {
namespace {

// About 10 us of spinning, the usual gap between two ops of a step. Then the processor is offered to others: when two
// threads share one, the thread that spins keeps the other from the very work it waits for.
constexpr int kSpins = 500;
constexpr int kYields = 100;
constexpr int kPiecesPerThread = 4;  // a thread that lags by half its share costs an eighth of it

void Relax(int spin) {
#if defined(__x86_64__)
  if (spin < kSpins) return _mm_pause();
#endif
  std::this_thread::yield();
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : shares_(num_threads) {
  LINSPEC_CHECK(num_threads >= 1);
  for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { Work(i); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(int64_t count, int64_t grain, Function function, void* context) {
  if (count <= 0) return;
  if (workers_.empty() || count <= grain) return function(context, 0, 0, count);
  function_ = function;
  context_ = context;
  count_ = count;
  grain_ = grain;
  num_grains_ = (count + grain - 1) / grain;
  const int64_t shares = num_threads();
  num_pieces_ = std::min<int64_t>(num_grains_, shares * kPiecesPerThread);
  unfinished_.store(static_cast<int>(num_pieces_), std::memory_order_relaxed);
  const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
  for (int64_t share = 0; share < shares; ++share) {
    const auto pieces = static_cast<uint32_t>(ShareBegin(share + 1) - ShareBegin(share));
    shares_[share].left.store(uint64_t{epoch} << 32 | pieces, std::memory_order_release);
  }
  epoch_.store(epoch, std::memory_order_release);
  epoch_.notify_all();
  RunPieces(epoch, 0);
  for (int spin = 0; unfinished_.load(std::memory_order_acquire) != 0; ++spin) Relax(spin);
}

void ThreadPool::RunPieces(uint32_t epoch, int thread) {
  for (int i = 0; i < num_threads(); ++i) {
    const int done = RunShare(epoch, (thread + i) % num_threads(), thread);
    if (done > 0) unfinished_.fetch_sub(done, std::memory_order_acq_rel);
  }
}

int ThreadPool::RunShare(uint32_t epoch, int share, int thread) {
  int done = 0;
  std::atomic<uint64_t>& left = shares_[share].left;
  uint64_t ticket = left.load(std::memory_order_acquire);
  while (ticket >> 32 == epoch && static_cast<uint32_t>(ticket) != 0) {
    if (!left.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
    const int64_t piece = ShareBegin(share + 1) - static_cast<int64_t>(static_cast<uint32_t>(ticket));
    const int64_t begin = num_grains_ * piece / num_pieces_ * grain_;
    const int64_t end = num_grains_ * (piece + 1) / num_pieces_ * grain_;
    function_(context_, thread, begin, std::min(end, count_));
    ++done;
    ticket = left.load(std::memory_order_acquire);
  }
  return done;
}

void ThreadPool::Work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    uint32_t epoch = epoch_.load(std::memory_order_acquire);
    for (int spin = 0; epoch == seen; ++spin) {
      if (spin < kSpins + kYields) {
        Relax(spin);
      } else {
        epoch_.wait(seen, std::memory_order_acquire);
      }
      epoch = epoch_.load(std::memory_order_acquire);
    }
    seen = epoch;
    if (stop_.load(std::memory_order_relaxed)) return;
    RunPieces(epoch, thread);
  }
}

}  // namespace linspec
