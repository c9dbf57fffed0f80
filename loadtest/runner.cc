#include "loadtest/runner.h"

#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <deque>
#include <thread>

#include "loadtest/statistics.h"

namespace linspec::loadtest {
namespace {

namespace asio = boost::asio;
using Clock = std::chrono::steady_clock;
using ErrorCode = boost::system::error_code;

constexpr auto kLagPeriod = std::chrono::milliseconds(10);
constexpr auto kProgressPeriod = std::chrono::seconds(1);

Clock::duration Seconds(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}
double ProcessorSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

double ToSeconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

// One thread, one event loop, one client; nothing is shared with the others.
class Worker {
 public:
  explicit Worker(const ClientFactory& factory) : client_(factory(&loop_)) {}
  void Launch() {
    thread_ = std::thread([this] {
      MeasureLag(Clock::now() + kLagPeriod);
      loop_.run();
    });
  }
  void Stop() {
    asio::post(loop_, [this] {
      stopping_ = true;  // a timer that has fired already, but not run, cannot be cancelled any more
      lag_timer_.cancel();
      work_.reset();
    });
    thread_.join();
  }
  asio::io_context& loop() { return loop_; }
  Client* client() { return client_.get(); }
  const std::vector<double>& lags() const { return lags_; }  // after Stop

 private:
  // How late a timer fires is how late every other event of this loop was handled.
  void MeasureLag(Clock::time_point due) {
    lag_timer_.expires_at(due);
    lag_timer_.async_wait([this, due](ErrorCode error) {
      if (error || stopping_) return;
      const Clock::time_point now = Clock::now();
      lags_.push_back(ToSeconds(now - due));
      MeasureLag(now + kLagPeriod);
    });
  }

  asio::io_context loop_{1};
  asio::executor_work_guard<asio::io_context::executor_type> work_{loop_.get_executor()};
  asio::steady_timer lag_timer_{loop_};
  std::vector<double> lags_;
  bool stopping_ = false;
  std::unique_ptr<Client> client_;
  std::thread thread_;
};

// Lives on the calling thread's loop; workers post to it.
class Coordinator {
 public:
  Coordinator(const std::vector<PlannedRequest>& workload, const Options& options, const ClientFactory& factory)
      : workload_(workload), options_(options) {
    for (int i = 0; i < options.threads; ++i) workers_.push_back(std::make_unique<Worker>(factory));
    result_.records.resize(workload.size());
    sent_.resize(workload.size());
  }

  RunResult Run() {
    signals_.async_wait([this](ErrorCode error, int) {
      if (error) return;
      result_.interrupted = true;  // a second SIGINT ends the process as usual
      signals_.clear();
      StopArrivals();
      FinishIfIdle();
    });
    for (auto& worker : workers_) worker->Launch();
    start_ = Clock::now();
    cpu_start_ = ProcessorSeconds();
    Arrive();
    if (!options_.quiet) Progress();
    loop_.run();
    cpu_used_ = ProcessorSeconds() - cpu_start_;
    run_time_ = ToSeconds(Clock::now() - start_);
    for (auto& worker : workers_) worker->Stop();
    return Collect();
  }

 private:
  void Arrive() {
    const double now = ToSeconds(Clock::now() - start_);
    if (options_.duration > 0 && now >= options_.duration) StopArrivals();
    while (next_ < workload_.size() && workload_[next_].arrival <= now) ready_.push_back(next_++);
    Dispatch();
    if (next_ >= workload_.size()) return FinishIfIdle();
    double due = workload_[next_].arrival;
    if (options_.duration > 0) due = std::min(due, options_.duration);
    arrival_timer_.expires_at(start_ + Seconds(due));
    arrival_timer_.async_wait([this](ErrorCode error) {
      if (!error) Arrive();
    });
  }

  void Dispatch() {
    while (!ready_.empty() && (options_.max_concurrency == 0 || in_flight_ < options_.max_concurrency)) {
      const size_t index = ready_.front();
      ready_.pop_front();
      sent_[index] = true;
      result_.max_in_flight = std::max(result_.max_in_flight, ++in_flight_);
      Worker* worker = workers_[index % workers_.size()].get();
      // In a closed loop a request is due when a place is free, not when it arrived.
      const double due = options_.max_concurrency == 0 ? workload_[index].arrival : ToSeconds(Clock::now() - start_);
      asio::post(worker->loop(), [this, worker, index, due] {
        const double start = ToSeconds(Clock::now() - start_);
        worker->client()->Start(workload_[index], [this, index, due, start](RequestRecord record) {
          record.scheduled = due;
          record.start = start;
          record.slow = workload_[index].read_delay_ms > 0;
          asio::post(loop_, [this, index, record = std::move(record)]() mutable { OnDone(index, std::move(record)); });
        });
      });
    }
  }

  void OnDone(size_t index, RequestRecord record) {
    last_end_ = ToSeconds(Clock::now() - start_);
    ++finished_;
    if (!record.ok && !record.cancelled) ++failed_;
    if (record.ok) recent_ttft_.push_back(record.ttft);
    output_tokens_ += record.output_tokens;
    result_.records[index] = std::move(record);
    --in_flight_;
    if (options_.duration > 0 && last_end_ >= options_.duration) StopArrivals();
    Dispatch();
    FinishIfIdle();
  }

  void StopArrivals() {
    next_ = workload_.size();
    ready_.clear();
    arrival_timer_.cancel();
  }

  void FinishIfIdle() {
    if (done_ || in_flight_ > 0 || next_ < workload_.size() || !ready_.empty()) return;
    done_ = true;
    arrival_timer_.cancel();
    progress_timer_.cancel();
    signals_.cancel();
    if (!options_.quiet) PrintProgress('\n');
  }

  void Progress() {
    progress_timer_.expires_after(kProgressPeriod);
    progress_timer_.async_wait([this](ErrorCode error) {
      if (error || done_) return;
      PrintProgress('\r');
      Progress();
    });
  }
  void PrintProgress(char end) {
    const double now = std::max(1e-9, ToSeconds(Clock::now() - start_));
    std::sort(recent_ttft_.begin(), recent_ttft_.end());
    const std::string ttft = recent_ttft_.empty() ? "-" : fmt::format("{:.0f} ms", Percentile(recent_ttft_, 50) * 1e3);
    recent_ttft_.clear();
    fmt::print(
        stderr, "  {:6.1f} s  sent {}/{}  in flight {}  finished {}  failed {}  {:.0f} tokens/s  TTFT now {}      {}",
        now, finished_ + in_flight_, workload_.size(), in_flight_, finished_, failed_, output_tokens_ / now, ttft, end);
    std::fflush(stderr);
  }

  RunResult Collect() {
    std::vector<RequestRecord> records;
    std::vector<double> lateness, lags;
    for (size_t i = 0; i < workload_.size(); ++i) {
      if (!sent_[i]) continue;
      lateness.push_back(result_.records[i].start - result_.records[i].scheduled);
      records.push_back(std::move(result_.records[i]));
    }
    result_.records = std::move(records);
    for (const auto& worker : workers_) lags.insert(lags.end(), worker->lags().begin(), worker->lags().end());
    std::sort(lags.begin(), lags.end());
    std::sort(lateness.begin(), lateness.end());
    result_.duration = last_end_;
    double threads = static_cast<double>(workers_.size());
    if (options_.backend == "grpc") threads = std::max<double>(threads, std::thread::hardware_concurrency());
    result_.cpu_per_thread = cpu_used_ / std::max(run_time_, 1e-9) / threads;
    result_.loop_lag_p99 = Percentile(lags, 99);
    result_.loop_lag_max = lags.empty() ? 0 : lags.back();
    result_.start_lateness_p99 = Percentile(lateness, 99);
    return std::move(result_);
  }

  const std::vector<PlannedRequest>& workload_;
  const Options& options_;
  asio::io_context loop_{1};
  asio::steady_timer arrival_timer_{loop_}, progress_timer_{loop_};
  asio::signal_set signals_{loop_, SIGINT};
  std::vector<std::unique_ptr<Worker>> workers_;
  Clock::time_point start_;
  std::deque<size_t> ready_;  // arrived, waiting for a place
  std::vector<bool> sent_;
  size_t next_ = 0;  // first request that has not arrived
  int in_flight_ = 0, finished_ = 0, failed_ = 0;
  bool done_ = false;  // timers that fired already still run their handlers
  double last_end_ = 0, cpu_start_ = 0, cpu_used_ = 0, run_time_ = 0;
  std::vector<double> recent_ttft_;  // of requests that finished since the last line of progress
  int64_t output_tokens_ = 0;
  RunResult result_;
};

}  // namespace

RunResult RunWorkload(const std::vector<PlannedRequest>& workload, const Options& options,
                      const ClientFactory& factory) {
  return Coordinator(workload, options, factory).Run();
}

}  // namespace linspec::loadtest
