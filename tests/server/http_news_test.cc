#include "server/http_news.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

namespace linspec::http_internal {
namespace {

class FakeConnection : public ConnectionBase {
 public:
  void Shutdown(bool) override {}
  void OnNews() override { ++news; }
  std::atomic<int> news = 0;
};

TEST(NewsQueue, EveryConnectionHearsOfEachPush) {
  boost::asio::io_context context;
  auto work = boost::asio::make_work_guard(context);
  auto queue = std::make_shared<NewsQueue>(&context, 2);
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) threads.emplace_back([&] { context.run(); });
  std::vector<std::shared_ptr<FakeConnection>> connections(200);
  for (auto& connection : connections) connection = std::make_shared<FakeConnection>();
  constexpr int kSteps = 100;
  for (int step = 0; step < kSteps; ++step) {
    for (const auto& connection : connections) queue->Push(connection);
    queue->Wake();
  }
  work.reset();
  for (std::thread& thread : threads) thread.join();  // run() returns when nothing is left to do
  for (const auto& connection : connections) EXPECT_EQ(connection->news, kSteps);
}

TEST(NewsQueue, ConnectionsThatAreGoneAreSkipped) {
  boost::asio::io_context context;
  auto queue = std::make_shared<NewsQueue>(&context, 1);
  auto stays = std::make_shared<FakeConnection>(), goes = std::make_shared<FakeConnection>();
  queue->Push(goes);
  queue->Push(stays);
  goes.reset();
  queue->Wake();
  context.run();
  EXPECT_EQ(stays->news, 1);
}

TEST(NewsQueue, AFewHearAtTheWakeUpAndManyBefore) {
  boost::asio::io_context context;
  auto queue = std::make_shared<NewsQueue>(&context, 1);
  auto connection = std::make_shared<FakeConnection>();
  for (int i = 0; i < 20; ++i) queue->Push(connection);
  context.run();
  EXPECT_EQ(connection->news, 0);
  queue->Wake();
  context.restart();
  context.run();
  EXPECT_EQ(connection->news, 20);
  for (int i = 0; i < 100; ++i) queue->Push(connection);
  context.restart();
  context.run();
  EXPECT_EQ(connection->news, 120);
}

TEST(NewsQueue, NothingReachesTheContextAfterClose) {
  auto connection = std::make_shared<FakeConnection>();
  std::shared_ptr<NewsQueue> queue;
  {
    boost::asio::io_context context;
    queue = std::make_shared<NewsQueue>(&context, 1);
    queue->Push(connection);
    queue->Wake();
    queue->Close();
    context.run();
  }
  queue->Push(connection);  // the context is gone
  queue->Wake();
  EXPECT_EQ(connection->news, 0);
}

}  // namespace
}  // namespace linspec::http_internal
