#include "scheduler/request_queue.h"

#include "fmt/format.h"

namespace linspec {

namespace {

// A named tenant may hold at most this many times as much as stays free: three quarters of the queue and seven eighths
// of the slots for one that floods, and of what it left the same for the next.
constexpr int64_t kQueueShare = 3, kSlotShare = 7;

}  // namespace

absl::Status RequestQueue::CheckShareLocked(const Tenant& tenant, int64_t tokens) const {
  if (tenant.waiting.empty()) return absl::OkStatus();
  const int64_t requests = std::ssize(tenant.waiting) + 1;
  const int64_t left = max_requests_ - waiting_requests_ - 1, left_tokens = max_tokens_ - waiting_tokens_ - tokens;
  if (requests <= kQueueShare * left && tenant.waiting_tokens + tokens <= kQueueShare * left_tokens) {
    return absl::OkStatus();
  }
  return ShareExceededError(
      fmt::format("{} requests and {} prompt tokens of this API key are waiting, its share of the queue",
                  tenant.waiting.size(), tenant.waiting_tokens));
}

absl::Status RequestQueue::CheckShare(const std::string& tenant) const {
  std::lock_guard lock(mutex_);
  const auto found = tenants_.find(tenant);
  if (tenant.empty() || found == tenants_.end()) return absl::OkStatus();
  return CheckShareLocked(found->second, 1);
}

void RequestQueue::SetMaxRunningPerTenant(int limit) {
  std::lock_guard lock(mutex_);
  max_running_per_tenant_ = limit;
}

absl::Status RequestQueue::Push(Request request, Clock::time_point arrival) {
  const int64_t tokens = static_cast<int64_t>(request.prompt_tokens.size());
  {
    std::lock_guard lock(mutex_);
    if (closed_) return absl::UnavailableError("the server is shutting down");
    if (waiting_requests_ >= max_requests_) {
      return absl::ResourceExhaustedError(fmt::format("the queue is full: {} requests wait", waiting_requests_));
    }
    if (waiting_tokens_ + tokens > max_tokens_) {
      return absl::ResourceExhaustedError(fmt::format(
          "the queue is full: {} prompt tokens wait, {} more would exceed {}", waiting_tokens_, tokens, max_tokens_));
    }
    if (live_.contains(request.id)) {
      return absl::InvalidArgumentError(fmt::format("request id {} is in use", request.id));
    }
    if (const auto known = tenants_.find(request.tenant); known != tenants_.end() && !request.tenant.empty()) {
      if (absl::Status status = CheckShareLocked(known->second, tokens); !status.ok()) return status;
    }
    const Tenants::iterator owner = tenants_.try_emplace(request.tenant).first;
    Tenant& tenant = owner->second;
    const Place place{request.priority, next_order_++};
    live_[request.id] = {owner, place};
    ++tenant.live;
    ++waiting_requests_;
    waiting_tokens_ += tokens;
    tenant.waiting_tokens += tokens;
    if (request.deadline) deadlines_.emplace(*request.deadline, request.id);
    tenant.waiting.emplace(place, QueuedRequest{std::move(request), arrival});
  }
  work_.notify_one();
  return absl::OkStatus();
}

void RequestQueue::Cancel(uint64_t id) {
  {
    std::lock_guard lock(mutex_);
    if (!live_.contains(id)) return;
    cancelled_.insert(id);
  }
  work_.notify_one();
}

void RequestQueue::Close() {
  std::lock_guard lock(mutex_);
  closed_ = true;
}

void RequestQueue::Abort() {
  {
    std::lock_guard lock(mutex_);
    abort_ = true;
  }
  work_.notify_one();
}

void RequestQueue::Stop() {
  {
    std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  work_.notify_one();
}

bool RequestQueue::WaitUntilIdle(Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  return idle_.wait_until(lock, deadline, [&] { return live_.empty(); });
}

bool RequestQueue::idle() const {
  std::lock_guard lock(mutex_);
  return live_.empty();
}

bool RequestQueue::stopped() const {
  std::lock_guard lock(mutex_);
  return stopped_;
}

RequestQueue::Counts RequestQueue::waiting() const {
  std::lock_guard lock(mutex_);
  return {waiting_requests_, waiting_tokens_};
}

QueuedRequest RequestQueue::Remove(uint64_t id) {
  Live& live = live_.at(id);
  Tenant& tenant = live.tenant->second;
  const auto it = tenant.waiting.find(*live.place);
  live.place.reset();
  QueuedRequest queued = std::move(it->second);
  tenant.waiting.erase(it);
  if (queued.request.deadline) deadlines_.erase({*queued.request.deadline, id});
  const int64_t tokens = static_cast<int64_t>(queued.request.prompt_tokens.size());
  tenant.waiting_tokens -= tokens;
  waiting_tokens_ -= tokens;
  --waiting_requests_;
  return queued;
}

bool RequestQueue::MayRun(const std::string& name, const Tenant& tenant, int free_slots) const {
  if (name.empty() || tenant.running == 0 || max_running_per_tenant_ < 0) return true;
  if (max_running_per_tenant_ > 0) return tenant.running < max_running_per_tenant_;
  return tenant.running + 1 <= kSlotShare * (free_slots - 1);
}

// Looks at every tenant with live requests: as many as there are keys, at most, and only while slots are free.
RequestQueue::Tenant* RequestQueue::NextTenant(int free_slots) {
  Tenant* next = nullptr;
  for (auto& [name, tenant] : tenants_) {
    if (tenant.waiting.empty() || !MayRun(name, tenant, free_slots)) continue;
    const auto turn = [](const Tenant& t) { return std::pair(t.running, t.last_turn); };
    if (next == nullptr || turn(tenant) < turn(*next)) next = &tenant;
  }
  return next;
}

RequestQueue::News RequestQueue::Take(int num_slots, Clock::time_point now) {
  std::lock_guard lock(mutex_);
  News news;
  news.abort = std::exchange(abort_, false);
  for (const uint64_t id : cancelled_) {
    if (live_.at(id).place) {
      news.ended.push_back({Remove(id), FinishReason::kCancelled});
    } else {
      news.cancelled.insert(id);
    }
  }
  cancelled_.clear();
  if (news.abort) {
    for (const auto& [id, live] : live_) {
      if (live.place) news.ended.push_back({Remove(id), FinishReason::kCancelled});
    }
  }
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
    news.ended.push_back({Remove(deadlines_.begin()->second), FinishReason::kDeadline});
  }
  for (int left = num_slots; left > 0 && waiting_requests_ > 0; --left) {
    Tenant* tenant = NextTenant(left);
    if (tenant == nullptr) break;
    const uint64_t id = tenant->waiting.begin()->second.request.id;
    news.admitted.push_back(Remove(id));
    live_.at(id).running = true;
    ++tenant->running;
    tenant->last_turn = next_turn_++;
  }
  return news;
}

bool RequestQueue::WaitForWork() {
  std::unique_lock lock(mutex_);
  // Deadlines need no timer: the engine sleeps only while every slot is free, and then nothing waits.
  const auto has_work = [&] { return stopped_ || abort_ || waiting_requests_ > 0 || !cancelled_.empty(); };
  work_.wait(lock, has_work);
  return !stopped_;
}

void RequestQueue::MarkEnded(const std::vector<uint64_t>& ids) {
  bool idle = false;
  {
    std::lock_guard lock(mutex_);
    for (const uint64_t id : ids) {
      const auto ended = live_.find(id);
      const Tenants::iterator tenant = ended->second.tenant;
      tenant->second.running -= ended->second.running ? 1 : 0;
      if (--tenant->second.live == 0) tenants_.erase(tenant);
      live_.erase(ended);
      cancelled_.erase(id);
    }
    idle = live_.empty();
  }
  if (idle) idle_.notify_all();
}

}  // namespace linspec
