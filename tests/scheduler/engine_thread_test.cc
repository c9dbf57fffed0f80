// The engine with its own thread, and clients on theirs. Meaningful under ThreadSanitizer.
#include <condition_variable>
#include <mutex>
#include <thread>

#include "gtest/gtest.h"
#include "models/ngram_drafter.h"
#include "scheduler/engine.h"
#include "tests/scheduler/run_ahead_model.h"
#include "tests/scheduler/test_engine.h"

namespace linspec {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// Counts the requests that ended, and waits for them.
class Latch {
 public:
  OutputSink Sink(int refuse_after = -1) {
    return [this, refuse_after, outputs = 0](RequestOutput&& output) mutable {
      std::lock_guard lock(mutex_);
      if (output.finish_reason != FinishReason::kNone) reasons_.push_back(output.finish_reason);
      const bool refuse = ++outputs == refuse_after && output.finish_reason == FinishReason::kNone;
      if (refuse) reasons_.push_back(FinishReason::kCancelled);
      changed_.notify_all();
      return !refuse;
    };
  }
  bool WaitFor(size_t count) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, seconds(60), [&] { return reasons_.size() >= count; });
  }
  std::vector<FinishReason> reasons() {
    std::lock_guard lock(mutex_);
    return reasons_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<FinishReason> reasons_;
};

std::unique_ptr<Engine> StartEngine(int max_requests, std::function<void(const StepStats&)> observer = nullptr,
                                    std::unique_ptr<Model> model = std::make_unique<FakeModel>()) {
  EngineOptions options = TestEngine::StaticOptions();
  if (model->CanRunAhead()) options.speculation = SpeculationMode::kOff;
  options.max_requests = max_requests;
  options.max_step_tokens = 32;
  std::vector<std::unique_ptr<Drafter>> drafters;
  drafters.push_back(std::make_unique<NgramDrafter>());
  auto engine = *Engine::Create(std::move(model), std::move(drafters), options, std::move(observer));
  engine->Start();
  return engine;
}

void SubmitAndCancelConcurrently(std::unique_ptr<Model> model) {
  Latch latch;
  std::atomic<int> steps = 0;
  auto engine = StartEngine(4, [&](const StepStats&) { ++steps; }, std::move(model));
  constexpr int kClients = 4, kRequests = 50;
  std::vector<std::thread> clients;
  for (int c = 0; c < kClients; ++c) {
    clients.emplace_back([&, c] {
      for (int i = 0; i < kRequests; ++i) {
        Request request = TestEngine::MakeRequest(c * 1000 + i + 1, {1, 2, 3, 4, 5}, 20, 1.0f);
        request.sink = latch.Sink(i % 5 == 0 ? 3 : -1);
        if (i % 7 == 0) request.deadline = Clock::now() + milliseconds(1);
        const uint64_t id = request.id;
        EXPECT_TRUE(engine->Submit(std::move(request)).ok());
        if (i % 3 == 0) engine->Cancel(id);
        (void)engine->stats();
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_TRUE(latch.WaitFor(kClients * kRequests));
  EXPECT_TRUE(engine->Drain(seconds(30)));
  const EngineStats stats = engine->stats();
  EXPECT_EQ(stats.slots_free, stats.slots_total);
  EXPECT_EQ(stats.requests_finished, kClients * kRequests);
  EXPECT_EQ(latch.reasons().size(), static_cast<size_t>(kClients * kRequests));
  EXPECT_GT(steps.load(), 0);
}

TEST(EngineThreadTest, ConcurrentSubmitAndCancelLeakNothing) {
  SubmitAndCancelConcurrently(std::make_unique<FakeModel>());
  SubmitAndCancelConcurrently(std::make_unique<RunAheadModel>());
}

TEST(EngineThreadTest, DrainTimesOutAndAborts) {
  Latch latch;
  auto engine = StartEngine(1);
  for (uint64_t id = 1; id <= 3; ++id) {
    Request request = TestEngine::MakeRequest(id, {1, 2}, 1000000);
    request.sink = latch.Sink();
    ASSERT_TRUE(engine->Submit(std::move(request)).ok());
  }
  EXPECT_FALSE(engine->Drain(milliseconds(30)));
  ASSERT_TRUE(latch.WaitFor(3));
  for (const FinishReason reason : latch.reasons()) EXPECT_EQ(reason, FinishReason::kCancelled);
  EXPECT_EQ(engine->stats().slots_free, 1);
}

TEST(EngineThreadTest, DeadlineOfAWaitingRequestFires) {
  Latch running, waiting;
  auto engine = StartEngine(1);
  Request first = TestEngine::MakeRequest(1, {1, 2}, 1000000);
  first.sink = running.Sink();
  Request second = TestEngine::MakeRequest(2, {1, 2}, 5);
  second.deadline = Clock::now() + milliseconds(20);
  second.sink = waiting.Sink();
  ASSERT_TRUE(engine->Submit(std::move(first)).ok());
  ASSERT_TRUE(engine->Submit(std::move(second)).ok());
  ASSERT_TRUE(waiting.WaitFor(1));
  EXPECT_EQ(waiting.reasons()[0], FinishReason::kDeadline);
  engine->Cancel(1);
  EXPECT_TRUE(running.WaitFor(1));
}

TEST(EngineThreadTest, DestructionEndsEverything) {
  Latch latch;
  {
    auto engine = StartEngine(2);
    for (uint64_t id = 1; id <= 5; ++id) {
      Request request = TestEngine::MakeRequest(id, {1, 2}, 1000000);
      request.sink = latch.Sink();
      ASSERT_TRUE(engine->Submit(std::move(request)).ok());
    }
  }
  EXPECT_EQ(latch.reasons().size(), 5u);
}

}  // namespace
}  // namespace linspec
