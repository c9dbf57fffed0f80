// Connections with news from the engine, on their way to the I/O threads. The engine appends all of a step, then wakes
// the I/O threads, once each; tasks there take connections in batches. Were they woken by the first, they would catch
// up with the engine before the second, take its processor, and sleep again: with two cores and 500 streams, ten to
// twenty times a step. Of a long step one thread gets a head start. A private part of http_server.cc; it includes Asio.
//
// Threads: every method from any. After Close nothing reaches the io_context, which may then end.
#pragma once

#include <algorithm>
#include <array>
#include <boost/asio.hpp>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>

namespace linspec::http_internal {

class ConnectionBase {
 public:
  virtual ~ConnectionBase() = default;
  virtual void Shutdown(bool at_once) = 0;  // any thread
  virtual void OnNews() = 0;                // any I/O thread
};

class NewsQueue : public std::enable_shared_from_this<NewsQueue> {
 public:
  NewsQueue(boost::asio::io_context* context, int num_threads) : context_(context), max_tasks_(num_threads) {}

  // Heard at the next Wake, or when enough wait.
  void Push(std::weak_ptr<ConnectionBase> connection) {
    std::lock_guard lock(mutex_);
    if (closed_) return;
    waiting_.push_back(std::move(connection));
    if (tasks_ == 0 && waiting_.size() == kHeadStart) tasks_ = 1, PostTask();
  }

  void Wake() {
    std::lock_guard lock(mutex_);
    for (; tasks_ < max_tasks_ && waiting_.size() > tasks_ * kBatch; ++tasks_) PostTask();
  }

  void Close() {
    std::lock_guard lock(mutex_);
    closed_ = true;
    waiting_.clear();
  }

 private:
  static constexpr size_t kBatch = 16, kGrab = 2;
  static constexpr size_t kHeadStart = 64;  // enough that one thread does not catch up with the engine

  // REQUIRES: mutex_ held.
  void PostTask() {
    boost::asio::post(*context_, [self = shared_from_this()] { self->RunBatch(); });
  }

  // One batch, then back into the line: reads and timers get their turn. Taken a few at a time: those that a thread has
  // taken wait for it if it loses its processor, while the others are served by the next.
  void RunBatch() {
    for (size_t done = 0; done < kBatch; done += kGrab) {
      std::array<std::weak_ptr<ConnectionBase>, kGrab> batch;
      {
        std::lock_guard lock(mutex_);
        if (waiting_.empty()) break;
        for (size_t i = 0; i < kGrab && !waiting_.empty(); ++i) {
          batch[i] = std::move(waiting_.front());
          waiting_.pop_front();
        }
      }
      for (const auto& weak : batch) {
        if (const auto connection = weak.lock()) connection->OnNews();
      }
    }
    std::lock_guard lock(mutex_);
    if (waiting_.empty() || closed_)
      --tasks_;
    else
      PostTask();
  }

  boost::asio::io_context* const context_;
  const size_t max_tasks_;
  std::mutex mutex_;  // guards the rest
  std::deque<std::weak_ptr<ConnectionBase>> waiting_;
  size_t tasks_ = 0;  // posted or running
  bool closed_ = false;
};

}  // namespace linspec::http_internal
