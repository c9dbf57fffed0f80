// The inbox between RPC threads and the engine: bounded, and shared fairly between tenants (API keys). A free slot goes
// to the tenant with the fewest running requests, of several to the one that was served longest ago; priority, then
// arrival, orders the requests of one tenant only. So that a flood leaves room for others, a named tenant may hold at
// most three times as much of the queue, and seven times as many slots, as stay free. It also knows which requests are
// live, so that ids stay unique and draining can wait for the last one.
//
// Threads: any; the engine's only lock besides that of its statistics. Take, WaitForWork and Ended: engine thread only.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
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
    std::vector<QueuedRequest> admitted;  // at most as many as there were slots, in the order of their turns
    std::vector<Ended> ended;
    std::unordered_set<uint64_t> cancelled;  // ids of requests that run
    bool abort = false;                      // end everything that runs
  };
  struct Counts {
    int64_t requests = 0, tokens = 0;
  };

  RequestQueue(int max_requests, int64_t max_tokens) : max_requests_(max_requests), max_tokens_(max_tokens) {}

  // RESOURCE_EXHAUSTED (full, or, told apart by IsShareExceeded, full for this tenant), UNAVAILABLE (closed),
  // INVALID_ARGUMENT (id is live already).
  absl::Status Push(Request request, Clock::time_point arrival);
  // Whether the tenant could have one more small request waiting; errors as Push.
  absl::Status CheckShare(const std::string& tenant) const;
  // Running requests of one named tenant. -1: no limit (at first); 0: seven times as many as slots stay free.
  void SetMaxRunningPerTenant(int limit);
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
  using Place = std::pair<int32_t, uint64_t>;  // priority, order of arrival
  struct Tenant {
    std::map<Place, QueuedRequest> waiting;
    int64_t waiting_tokens = 0;
    int live = 0, running = 0;
    uint64_t last_turn = 0;  // when a request of it was last admitted
  };
  using Tenants = std::map<std::string, Tenant>;  // those with live requests; iterators stay valid
  struct Live {
    Tenants::iterator tenant;
    std::optional<Place> place;  // where it waits; none: it left the queue
    bool running = false;
  };
  absl::Status CheckShareLocked(const Tenant& tenant, int64_t tokens) const;
  bool MayRun(const std::string& name, const Tenant& tenant, int free_slots) const;
  Tenant* NextTenant(int free_slots);  // whose turn it is; null: nobody who waits may have a slot
  QueuedRequest Remove(uint64_t id);   // a waiting one

  const int max_requests_;
  const int64_t max_tokens_;

  mutable std::mutex mutex_;  // guards everything below
  std::condition_variable work_, idle_;
  Tenants tenants_;
  std::unordered_map<uint64_t, Live> live_;  // waiting or running, by id
  std::set<std::pair<Clock::time_point, uint64_t>> deadlines_;
  std::unordered_set<uint64_t> cancelled_;
  int64_t waiting_requests_ = 0, waiting_tokens_ = 0;
  int max_running_per_tenant_ = -1;
  uint64_t next_order_ = 0, next_turn_ = 1;
  bool closed_ = false, abort_ = false, stopped_ = false;
};

}  // namespace linspec
