// The inbox between RPC threads and the engine: bounded, ordered by priority, then first come first served. It also
// knows which requests are live, so that ids stay unique and draining can wait for the last one.
//
// Threads: any; the engine's only lock besides that of its statistics. Take, WaitForWork and Ended: engine thread only.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "scheduler/request.h"

namespace linspec {

struct QueuedRequest {
  Request request;
  Clock::time_point arrival;
};

class RequestQueue {
 public:
  struct Ended {  // left the queue without ever running
    QueuedRequest request;
    FinishReason reason;
  };
  struct News {
    std::vector<QueuedRequest> admitted;  // at most as many as there were slots, best priority first
    std::vector<Ended> ended;
    std::unordered_set<uint64_t> cancelled;  // ids of requests that run
    bool abort = false;                      // end everything that runs
  };
  struct Counts {
    int64_t requests = 0, tokens = 0;
  };

  RequestQueue(int max_requests, int64_t max_tokens) : max_requests_(max_requests), max_tokens_(max_tokens) {}

  // RESOURCE_EXHAUSTED (full), UNAVAILABLE (closed), INVALID_ARGUMENT (id is live already).
  absl::Status Push(Request request, Clock::time_point arrival);
  void Cancel(uint64_t id);
  void Close();  // Push answers UNAVAILABLE from now on
  void Abort();  // everything live shall end with kCancelled
  void Stop();   // WaitForWork returns false from now on
  // True when no request is live; waits for that at most until `deadline`.
  bool WaitUntilIdle(Clock::time_point deadline);
  bool idle() const;
  bool stopped() const;
  Counts waiting() const;

  News Take(int num_slots, Clock::time_point now);
  bool WaitForWork();  // sleeps until there is something to Take or Stop; false: stopped
  void MarkEnded(const std::vector<uint64_t>& ids);

 private:
  using Key = std::pair<int32_t, uint64_t>;  // priority, order of arrival
  QueuedRequest Remove(std::map<Key, QueuedRequest>::iterator it);

  const int max_requests_;
  const int64_t max_tokens_;

  mutable std::mutex mutex_;  // guards everything below
  std::condition_variable work_, idle_;
  std::map<Key, QueuedRequest> waiting_;
  std::unordered_map<uint64_t, Key> keys_;  // id of a waiting request -> where it waits
  std::set<std::pair<Clock::time_point, Key>> deadlines_;
  std::unordered_set<uint64_t> live_;  // waiting or running
  std::unordered_set<uint64_t> cancelled_;
  int64_t waiting_tokens_ = 0;
  uint64_t next_order_ = 0;
  bool closed_ = false, abort_ = false, stopped_ = false;
};

}  // namespace linspec
