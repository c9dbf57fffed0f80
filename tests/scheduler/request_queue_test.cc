// How the queue and the slots are shared between tenants.
#include "scheduler/request_queue.h"

#include <deque>
#include <map>
#include <string>

#include "gtest/gtest.h"

namespace linspec {
namespace {

const Clock::time_point kNow = Clock::now();

// A queue and the slots behind it.
class Slots {
 public:
  explicit Slots(int slots, int max_requests = 1000, int64_t max_tokens = 1000000)
      : queue(max_requests, max_tokens), free_(slots) {}

  absl::Status Push(const std::string& tenant, int32_t priority = 0, int tokens = 1) {
    Request request;
    request.id = ++last_id_;
    request.tenant = tenant;
    request.priority = priority;
    request.prompt_tokens.resize(tokens);
    return queue.Push(std::move(request), kNow);
  }

  // One step: admits; returns whose requests began, in order.
  std::string Step() {
    std::string began;
    RequestQueue::News news = queue.Take(free_, kNow);
    for (const QueuedRequest& queued : news.admitted) {
      began += queued.request.tenant;
      running_.push_back(queued.request.id);
      tenants_[queued.request.id] = queued.request.tenant;
      --free_;
    }
    return began;
  }

  void EndOldest() {
    queue.MarkEnded({running_.front()});
    running_.pop_front();
    ++free_;
  }

  int CountRunning(const std::string& tenant) const {
    return static_cast<int>(
        std::count_if(running_.begin(), running_.end(), [&](uint64_t id) { return tenants_.at(id) == tenant; }));
  }
  int free() const { return free_; }
  size_t running() const { return running_.size(); }

  RequestQueue queue;

 private:
  int free_;
  uint64_t last_id_ = 0;
  std::deque<uint64_t> running_;
  std::map<uint64_t, std::string> tenants_;
};

TEST(RequestQueueTest, AFreeSlotGoesToTheTenantThatRunsLeast) {
  Slots slots(3);
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(slots.Push("a").ok());
  EXPECT_EQ(slots.Step(), "aaa");
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(slots.Push("b").ok());
  slots.EndOldest();
  EXPECT_EQ(slots.Step(), "b");  // though two of a came first
  slots.EndOldest();
  EXPECT_EQ(slots.Step(), "a");  // one each: a was served longer ago
  slots.EndOldest();
  EXPECT_EQ(slots.Step(), "b");
}

TEST(RequestQueueTest, ManyTenantsTakeTurnsOnOneSlot) {
  Slots slots(1);
  for (const std::string tenant : {"a", "a", "a", "b", "b", "b", "c", "c", "c"}) ASSERT_TRUE(slots.Push(tenant).ok());
  std::string order;
  for (int i = 0; i < 9; ++i) {
    order += slots.Step();
    slots.EndOldest();
  }
  EXPECT_EQ(order, "abcabcabc");
}

TEST(RequestQueueTest, PriorityOrdersTheRequestsOfOneTenantOnly) {
  Slots slots(1);
  ASSERT_TRUE(slots.Push("a", -100000, 1).ok());
  EXPECT_EQ(slots.Step(), "a");
  ASSERT_TRUE(slots.Push("a", -100000, 2).ok());
  ASSERT_TRUE(slots.Push("b", 100000, 3).ok());
  ASSERT_TRUE(slots.Push("b", 7, 4).ok());
  slots.EndOldest();
  const RequestQueue::News first = slots.queue.Take(1, kNow);
  ASSERT_EQ(first.admitted.size(), 1u);
  EXPECT_EQ(first.admitted[0].request.tenant, "b");  // whatever a says of its own
  EXPECT_EQ(first.admitted[0].request.priority, 7);  // b's own order
}

// The flood has a hundred requests waiting at all times, with the best priority; the trickle has one, with the worst.
TEST(RequestQueueTest, ATrickleWaitsForOneSlotBesideAFlood) {
  for (const int capacity : {1, 2, 8, 64}) {
    Slots slots(capacity);
    slots.queue.SetMaxRunningPerTenant(0);
    int served = 0;
    for (int step = 0; step < 400; ++step) {
      while (slots.queue.waiting().requests < 100) ASSERT_TRUE(slots.Push("flood", -100000).ok());
      if (step % 4 == 0) {
        ASSERT_TRUE(slots.Push("trickle", 100000).ok());
        const int before = slots.CountRunning("trickle");
        slots.Step();
        // At once where a slot was kept free, else with the next that is given back, unless its last one still runs.
        if (slots.CountRunning("trickle") == before && slots.running() > 0) {
          slots.EndOldest();
          slots.Step();
        }
        served += slots.CountRunning("trickle") > before ? 1 : 0;
      }
      slots.Step();
      if (slots.running() > 0) slots.EndOldest();
    }
    EXPECT_GE(served, capacity == 1 ? 50 : 99) << capacity;
  }
}

TEST(RequestQueueTest, AFloodLeavesSlotsForWhoComesLater) {
  Slots slots(64);
  slots.queue.SetMaxRunningPerTenant(0);
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(slots.Push("a").ok());
  slots.Step();
  EXPECT_EQ(slots.CountRunning("a"), 56);
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(slots.Push("b").ok());
  slots.Step();
  EXPECT_EQ(slots.CountRunning("b"), 7);
  ASSERT_TRUE(slots.Push("c").ok());
  EXPECT_EQ(slots.Step(), "c");
  EXPECT_EQ(slots.free(), 0);

  slots.queue.SetMaxRunningPerTenant(3);
  for (int i = 0; i < 64; ++i) slots.EndOldest();
  slots.Step();
  EXPECT_EQ(slots.CountRunning("a"), 3);
  EXPECT_EQ(slots.CountRunning("b"), 3);

  slots.queue.SetMaxRunningPerTenant(-1);
  slots.Step();
  EXPECT_EQ(slots.free(), 0);
}

TEST(RequestQueueTest, WithoutNamesNobodyIsLimited) {
  Slots slots(8, 100);
  slots.queue.SetMaxRunningPerTenant(0);
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(slots.Push("").ok());
  EXPECT_EQ(slots.Push("").code(), absl::StatusCode::kResourceExhausted);
  EXPECT_FALSE(IsShareExceeded(slots.Push("")));
  EXPECT_TRUE(slots.queue.CheckShare("").ok());
  EXPECT_EQ(slots.Step().size(), 0u);  // "" eight times
  EXPECT_EQ(slots.running(), 8u);
}

TEST(RequestQueueTest, AFloodLeavesRoomInTheQueue) {
  Slots slots(1, 100);
  int accepted = 0;
  absl::Status status;
  while ((status = slots.Push("a")).ok()) ++accepted;
  EXPECT_EQ(accepted, 75);
  EXPECT_TRUE(IsShareExceeded(status));
  EXPECT_TRUE(IsShareExceeded(slots.queue.CheckShare("a")));
  EXPECT_TRUE(slots.queue.CheckShare("b").ok());
  for (accepted = 0; slots.Push("b").ok();) ++accepted;
  EXPECT_EQ(accepted, 18);
  EXPECT_TRUE(slots.Push("c").ok());
  // What leaves makes room again.
  slots.Step();
  slots.EndOldest();
  for (int i = 0; i < 30; ++i) {
    slots.Step();
    slots.EndOldest();
  }
  EXPECT_TRUE(slots.Push("a").ok());
}

TEST(RequestQueueTest, AFloodOfLongPromptsLeavesRoomInTheQueue) {
  Slots slots(1, 1000, 1000);
  int accepted = 0;
  absl::Status status;
  while ((status = slots.Push("a", 0, 100)).ok()) ++accepted;
  EXPECT_EQ(accepted, 7);
  EXPECT_TRUE(IsShareExceeded(status));
  EXPECT_TRUE(slots.Push("b", 0, 300).ok());  // one request needs no share, only room
  EXPECT_FALSE(IsShareExceeded(slots.Push("c", 0, 100)));
  EXPECT_EQ(slots.queue.waiting().tokens, 1000);
}

TEST(RequestQueueTest, EndingInTheQueueGivesTheShareBack) {
  Slots slots(1, 100);
  while (slots.Push("a").ok()) {
  }
  for (uint64_t id = 1; id <= 75; ++id) slots.queue.Cancel(id);
  const RequestQueue::News news = slots.queue.Take(0, kNow);
  EXPECT_EQ(news.ended.size(), 75u);
  std::vector<uint64_t> ids;
  for (const RequestQueue::Ended& ended : news.ended) ids.push_back(ended.request.request.id);
  slots.queue.MarkEnded(ids);
  EXPECT_TRUE(slots.queue.idle());
  EXPECT_EQ(slots.queue.waiting().requests, 0);
  EXPECT_TRUE(slots.Push("a").ok());
}

}  // namespace
}  // namespace linspec
