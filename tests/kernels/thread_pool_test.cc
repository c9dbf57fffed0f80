#include "kernels/thread_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

namespace linspec {
namespace {

TEST(ThreadPoolTest, VisitsEveryIndexOnce) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    for (const int count : {0, 1, 2, 3, 100, 1001}) {
      std::vector<int> visits(count, 0);
      pool.ParallelFor(count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++visits[i];
      });
      EXPECT_EQ(std::count(visits.begin(), visits.end(), 1), count);
    }
  }
}

TEST(ThreadPoolTest, BordersAreMultiplesOfTheGrain) {
  for (const int threads : {1, 3, 4}) {
    ThreadPool pool(threads);
    for (const int64_t count : {1, 11, 12, 13, 500}) {
      std::vector<int> visits(count, 0);
      std::atomic<int> misplaced = 0;
      pool.ParallelFor(count, 12, [&](int64_t begin, int64_t end) {
        if (begin % 12 != 0 || (end != count && end % 12 != 0)) ++misplaced;
        for (int64_t i = begin; i < end; ++i) ++visits[i];
      });
      EXPECT_EQ(misplaced, 0);
      EXPECT_EQ(std::count(visits.begin(), visits.end(), 1), count);
    }
  }
}

TEST(ThreadPoolTest, WakesAfterSleeping) {
  ThreadPool pool(3);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::atomic<int64_t> sum = 0;
    pool.ParallelFor(1000, [&](int64_t begin, int64_t end) { sum += end - begin; });
    EXPECT_EQ(sum, 1000);
  }
}

}  // namespace
}  // namespace linspec
