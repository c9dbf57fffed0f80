#include "scheduler/engine.h"

#include <deque>
#include <mutex>
#include <utility>

#include "fmt/format.h"
#include "models/self_check.h"
#include "scheduler/engine_core.h"
#include "scheduler/request_queue.h"
#include "scheduler/speculator.h"
#include "scheduler/warm_up.h"

namespace linspec {
namespace {

constexpr size_t kDrainRateWindow = 64;  // finished requests

absl::Status CheckOption(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(fmt::format("{} = {} is invalid: must be in [{}, {}]", name, value, low, high));
}

absl::Status CheckOptions(const EngineOptions& options) {
  const absl::Status checks[] = {
      CheckOption("max_requests", options.max_requests, 1, 1 << 20),
      CheckOption("prefix_cache_entries", options.prefix_cache_entries, 0, 1 << 20),
      CheckOption("max_queue_requests", options.max_queue_requests, 1, INT32_MAX),
      CheckOption("max_queue_tokens", options.max_queue_tokens, 1, INT64_MAX),
      CheckOption("max_step_tokens", options.max_step_tokens, 1, 1 << 20),
      CheckOption("max_prompt_tokens", options.max_prompt_tokens, 1, INT32_MAX),
      CheckOption("max_output_tokens", options.max_output_tokens, 1, INT32_MAX),
      CheckOption("max_draft_nodes", options.max_draft_nodes, 1, kMaxTreeNodes),
      CheckOption("spec_max_batch", options.spec_max_batch, 0, INT32_MAX),
  };
  for (const absl::Status& check : checks) {
    if (!check.ok()) return check;
  }
  const double slowdown = options.max_draft_slowdown;
  if (slowdown != 0 && !(slowdown >= 1)) {
    return absl::InvalidArgumentError(
        fmt::format("max_draft_slowdown = {} is invalid: must be 0 or at least 1", slowdown));
  }
  return absl::OkStatus();
}

int64_t BytesPerRequest(const std::vector<std::unique_ptr<Drafter>>& drafters) {
  int64_t bytes = 0;
  for (const auto& drafter : drafters) bytes += drafter->bytes_per_request();
  return bytes;
}

}  // namespace

class Engine::Impl {
 public:
  Impl(std::unique_ptr<Model> model, std::unique_ptr<StatePool> pool, std::vector<std::unique_ptr<Drafter>> drafters,
       EngineOptions options, std::function<void(const StepStats&)> observer)
      : options_(options),
        draft_bytes_per_slot_(BytesPerRequest(drafters)),
        observer_(std::move(observer)),
        model_(std::move(model)),
        pool_(std::move(pool)),
        speculator_(std::move(drafters), options_, model_->config().vocab_size),
        queue_(options_.max_queue_requests, options_.max_queue_tokens),
        core_(model_.get(), pool_.get(), &speculator_, options_) {
    snapshot_.slots_total = options_.max_requests;
    snapshot_.slots_free = core_.num_free_slots();
    snapshot_.prefix_cache_capacity = options_.prefix_cache_entries;
    snapshot_.bytes_per_slot = pool_->bytes_per_slot();
    snapshot_.state_dtype = pool_->dtype();
    snapshot_.draft_bytes_per_slot = draft_bytes_per_slot_;
    snapshot_.weight_bytes = model_->weight_bytes();
  }

  ~Impl() {
    queue_.Close();
    queue_.Stop();
    if (thread_.joinable()) thread_.join();
    queue_.Abort();
    while (Step()) {
    }
  }

  absl::Status Prepare() {
    if (absl::Status status = speculator_.CheckMode(options_.speculation); !status.ok()) return status;
    if (model_->cuda().model != nullptr) {  // the CPU's kernels run in the tests, with these bits on every machine
      if (absl::Status status = CheckSelf(model_.get(), pool_.get()); !status.ok()) {
        return absl::Status(status.code(), std::string(status.message()) + "; --device cpu serves without this GPU");
      }
    }
    EngineOptions expected = options_;
    if (speculator_.empty()) expected.max_draft_nodes = 1;
    auto warm = WarmUp(model_.get(), pool_.get(), speculator_.drafters(), expected);
    if (!warm.ok()) return warm.status();
    warm_up_ = *warm;
    if (options_.calibrate && !speculator_.empty() && options_.max_draft_nodes > 1) {
      return speculator_.Calibrate(model_.get(), pool_.get());
    }
    return absl::OkStatus();
  }

  void SetAfterDelivery(std::function<void()> run) { core_.SetAfterDelivery(std::move(run)); }

  void Start() {
    thread_ = std::thread([this] {
      while (queue_.WaitForWork()) {
        while (!queue_.stopped() && Step()) {
        }
      }
    });
  }

  bool Step() {
    StepStats stats;
    const Clock::time_point start = Clock::now();
    RequestQueue::News news = queue_.Take(core_.num_free_slots(), start);
    stats.queue_s = std::chrono::duration<double>(Clock::now() - start).count();
    std::vector<uint64_t> ended;
    const bool worked = core_.Step(std::move(news), &stats, &ended);
    const RequestQueue::Counts waiting = queue_.waiting();
    stats.num_waiting = static_cast<int>(waiting.requests);
    TakeSnapshot(stats, waiting, static_cast<int64_t>(ended.size()));
    if (worked && observer_) observer_(stats);
    queue_.MarkEnded(ended);
    return worked;
  }

  absl::Status Submit(Request request) {
    if (absl::Status health = model_->health(); !health.ok()) return absl::UnavailableError(health.message());
    if (absl::Status status = CheckRequest(request); !status.ok()) return status;
    if (request.acceptance == AcceptanceMode::kDefault) request.acceptance = options_.acceptance;
    return queue_.Push(std::move(request), Clock::now());
  }

  absl::Status CheckShare(const std::string& tenant) const { return queue_.CheckShare(tenant); }
  void SetMaxRunningPerTenant(int limit) { queue_.SetMaxRunningPerTenant(limit); }
  void Cancel(uint64_t request_id) { queue_.Cancel(request_id); }
  void StopAdmitting() { queue_.Close(); }

  bool Drain(std::chrono::milliseconds timeout) {
    queue_.Close();
    const Clock::time_point deadline = Clock::now() + timeout;
    if (!thread_.joinable()) {
      while (!queue_.idle() && Clock::now() < deadline) Step();
    }
    if (queue_.WaitUntilIdle(deadline)) return true;
    queue_.Abort();
    if (!thread_.joinable()) {
      Step();
    } else {
      queue_.WaitUntilIdle(Clock::time_point::max());
    }
    return false;
  }

  EngineStats stats() const {
    const RequestQueue::Counts waiting = queue_.waiting();
    std::lock_guard lock(stats_mutex_);
    EngineStats stats = snapshot_;
    stats.num_waiting = waiting.requests;
    stats.waiting_tokens = waiting.tokens;
    if (!finish_times_.empty()) {
      const double seconds = std::chrono::duration<double>(Clock::now() - finish_times_.front()).count();
      stats.recent_requests_per_s = static_cast<double>(finish_times_.size()) / std::max(seconds, 1e-3);
    }
    return stats;
  }

  const Model& model() const { return *model_; }
  const WarmUpReport& warm_up() const { return warm_up_; }
  const EngineOptions& options() const { return options_; }

  std::string Describe() const {
    return fmt::format("{}; {} requests at once, {} bytes of {} state each at any context length, {:.1f} MiB in all",
                       model_->Describe(), options_.max_requests, pool_->bytes_per_slot(), DTypeName(pool_->dtype()),
                       static_cast<double>(pool_->total_bytes()) / (1 << 20));
  }

 private:
  absl::Status CheckRequest(const Request& request) const {
    const int64_t vocab_size = model_->config().vocab_size;
    if (!request.sink) return absl::InvalidArgumentError("the request has no sink");
    const int64_t prompt_tokens = std::ssize(request.prompt_tokens);
    if (prompt_tokens == 0) return absl::InvalidArgumentError("the prompt is empty: at least one token is needed");
    if (prompt_tokens > options_.max_prompt_tokens) {
      return absl::InvalidArgumentError(
          fmt::format("the prompt has {} tokens: at most {} are allowed", prompt_tokens, options_.max_prompt_tokens));
    }
    for (int64_t i = 0; i < prompt_tokens; ++i) {
      const int32_t token = request.prompt_tokens[i];
      if (token < 0 || token >= vocab_size) {
        return absl::InvalidArgumentError(
            fmt::format("prompt token {} = {} is outside the vocabulary of {}", i, token, vocab_size));
      }
    }
    if (absl::Status status = request.sampling.Validate(vocab_size); !status.ok()) return status;
    if (request.sampling.max_tokens > options_.max_output_tokens) {
      return absl::InvalidArgumentError(fmt::format("max_tokens = {} is invalid: at most {} are allowed",
                                                    request.sampling.max_tokens, options_.max_output_tokens));
    }
    return speculator_.CheckMode(request.speculation);
  }

  void TakeSnapshot(const StepStats& step, const RequestQueue::Counts& waiting, int64_t num_ended) {
    std::lock_guard lock(stats_mutex_);
    snapshot_.slots_free = core_.num_free_slots();
    snapshot_.prefix_cache_entries = core_.num_kept_prefixes();
    snapshot_.num_running = core_.num_running();
    snapshot_.num_waiting = waiting.requests;
    snapshot_.waiting_tokens = waiting.tokens;
    snapshot_.requests_finished += num_ended;
    snapshot_.output_tokens += step.num_output_tokens;
    snapshot_.steps += step.num_running > 0;
    snapshot_.drafter_errors += step.num_drafter_errors;
    if (step.num_decode_requests > 0) snapshot_.speculation_on = step.num_drafts > 0;
    snapshot_.speculation_saved_s += step.speculation_saved_s;
    for (int64_t i = 0; i < num_ended; ++i) finish_times_.push_back(Clock::now());
    while (finish_times_.size() > kDrainRateWindow) finish_times_.pop_front();
  }

  const EngineOptions options_;
  const int64_t draft_bytes_per_slot_;  // before the drafters move into the speculator
  const std::function<void(const StepStats&)> observer_;
  const std::unique_ptr<Model> model_;  // this and the next: engine thread, but for what is constant
  const std::unique_ptr<StatePool> pool_;
  Speculator speculator_;
  RequestQueue queue_;  // locks itself
  EngineCore core_;     // engine thread
  std::thread thread_;
  WarmUpReport warm_up_;  // constant once Create is through

  mutable std::mutex stats_mutex_;  // guards what follows
  EngineStats snapshot_;
  std::deque<Clock::time_point> finish_times_;
};

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(std::unique_ptr<Model> model,
                                                       std::vector<std::unique_ptr<Drafter>> drafters,
                                                       EngineOptions options,
                                                       std::function<void(const StepStats&)> observer) {
  if (absl::Status status = CheckOptions(options); !status.ok()) return status;
  auto pool = model->CreatePool(options.max_requests + options.prefix_cache_entries);
  if (!pool.ok()) return pool.status();
  auto impl =
      std::make_unique<Impl>(std::move(model), *std::move(pool), std::move(drafters), options, std::move(observer));
  if (absl::Status status = impl->Prepare(); !status.ok()) return status;
  return std::unique_ptr<Engine>(new Engine(std::move(impl)));
}

void Engine::SetAfterDelivery(std::function<void()> run) { impl_->SetAfterDelivery(std::move(run)); }
void Engine::Start() { impl_->Start(); }
bool Engine::Step() { return impl_->Step(); }
absl::Status Engine::Submit(Request request) { return impl_->Submit(std::move(request)); }
absl::Status Engine::CheckShare(const std::string& tenant) const { return impl_->CheckShare(tenant); }
void Engine::SetMaxRunningPerTenant(int limit) { impl_->SetMaxRunningPerTenant(limit); }
void Engine::Cancel(uint64_t request_id) { impl_->Cancel(request_id); }
void Engine::StopAdmitting() { impl_->StopAdmitting(); }
bool Engine::Drain(std::chrono::milliseconds timeout) { return impl_->Drain(timeout); }
EngineStats Engine::stats() const { return impl_->stats(); }
absl::Status Engine::health() const { return impl_->model().health(); }
std::vector<DeviceStats> Engine::device_stats() const { return impl_->model().device_stats(); }
const ModelConfig& Engine::model_config() const { return impl_->model().config(); }
const EngineOptions& Engine::options() const { return impl_->options(); }
const WarmUpReport& Engine::warm_up() const { return impl_->warm_up(); }
std::string Engine::Describe() const { return impl_->Describe(); }

}  // namespace linspec
