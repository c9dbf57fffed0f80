#include "scheduler/request_queue.h"

#include "fmt/format.h"

namespace linspec {

absl::Status RequestQueue::Push(Request request, Clock::time_point arrival) {
  const int64_t tokens = static_cast<int64_t>(request.prompt_tokens.size());
  {
    std::lock_guard lock(mutex_);
    if (closed_) return absl::UnavailableError("the server is shutting down");
    if (static_cast<int64_t>(waiting_.size()) >= max_requests_) {
      return absl::ResourceExhaustedError(fmt::format("the queue is full: {} requests wait", waiting_.size()));
    }
    if (waiting_tokens_ + tokens > max_tokens_) {
      return absl::ResourceExhaustedError(fmt::format(
          "the queue is full: {} prompt tokens wait, {} more would exceed {}", waiting_tokens_, tokens, max_tokens_));
    }
    if (!live_.insert(request.id).second) {
      return absl::InvalidArgumentError(fmt::format("request id {} is in use", request.id));
    }
    const Key key{request.priority, next_order_++};
    waiting_tokens_ += tokens;
    keys_[request.id] = key;
    if (request.deadline) deadlines_.emplace(*request.deadline, key);
    waiting_.emplace(key, QueuedRequest{std::move(request), arrival});
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
  return {static_cast<int64_t>(waiting_.size()), waiting_tokens_};
}

QueuedRequest RequestQueue::Remove(std::map<Key, QueuedRequest>::iterator it) {
  const Key key = it->first;
  QueuedRequest queued = std::move(it->second);
  waiting_.erase(it);
  keys_.erase(queued.request.id);
  if (queued.request.deadline) deadlines_.erase({*queued.request.deadline, key});
  waiting_tokens_ -= static_cast<int64_t>(queued.request.prompt_tokens.size());
  return queued;
}

RequestQueue::News RequestQueue::Take(int num_slots, Clock::time_point now) {
  std::lock_guard lock(mutex_);
  News news;
  news.abort = std::exchange(abort_, false);
  for (const uint64_t id : cancelled_) {
    if (const auto key = keys_.find(id); key != keys_.end()) {
      news.ended.push_back({Remove(waiting_.find(key->second)), FinishReason::kCancelled});
    } else {
      news.cancelled.insert(id);
    }
  }
  cancelled_.clear();
  while (news.abort && !waiting_.empty()) {
    news.ended.push_back({Remove(waiting_.begin()), FinishReason::kCancelled});
  }
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
    news.ended.push_back({Remove(waiting_.find(deadlines_.begin()->second)), FinishReason::kDeadline});
  }
  while (!waiting_.empty() && static_cast<int>(news.admitted.size()) < num_slots) {
    news.admitted.push_back(Remove(waiting_.begin()));
  }
  return news;
}

bool RequestQueue::WaitForWork() {
  std::unique_lock lock(mutex_);
  // Deadlines need no timer: the engine sleeps only while every slot is free, and then nothing waits.
  const auto has_work = [&] { return stopped_ || abort_ || !waiting_.empty() || !cancelled_.empty(); };
  work_.wait(lock, has_work);
  return !stopped_;
}

void RequestQueue::MarkEnded(const std::vector<uint64_t>& ids) {
  bool idle = false;
  {
    std::lock_guard lock(mutex_);
    for (const uint64_t id : ids) {
      live_.erase(id);
      cancelled_.erase(id);
    }
    idle = live_.empty();
  }
  if (idle) idle_.notify_all();
}

}  // namespace linspec
