// The engine: one thread that owns models, state pool, drafter and scheduler, and turns the crank:
// admit, plan, prefill, draft, verify, accept, commit, deliver.
//
// Threads: Submit, Cancel, Drain, stats() from any thread; everything else is the engine thread's.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "models/device_stats.h"
#include "models/drafter.h"
#include "models/model.h"
#include "models/state_pool.h"
#include "scheduler/request.h"

namespace linspec {

struct EngineOptions {
  int max_requests = 64;               // state slots: how many requests run at once
  int prefix_cache_entries = 0;        // states kept of earlier prompts, a slot each beside those of max_requests
  int max_queue_requests = 1024;       // waiting beyond that: RESOURCE_EXHAUSTED at Submit
  int64_t max_queue_tokens = 4 << 20;  // prompt tokens waiting
  int max_step_tokens = 512;           // token budget of one step: prefill chunk tokens + verify rows
  int max_prompt_tokens = 1 << 20;
  int max_output_tokens = 1 << 20;
  SpeculationMode speculation = SpeculationMode::kAuto;  // default for requests that say kDefault
  AcceptanceMode acceptance = AcceptanceMode::kGumbel;   // default for requests that say kDefault
  int max_draft_nodes = 8;                               // tree nodes per request and step, root included
  double max_draft_slowdown = 2;  // of a step of several requests beside a plain one, by their drafts; 0: any
  int spec_max_batch = 0;         // 0: decided from measured step costs; n: no drafting above n decoding requests
  bool calibrate = true;          // measure step costs at Create and adapt; false: always max_draft_nodes, whatever
                                  // it costs, kAuto with the first drafter (deterministic, for tests and figures)
  bool run_ahead = true;          // a device starts plain steps before the tokens of those ahead of them are read
  double warm_up_s = 10;  // most seconds that Create spends on capturing CUDA graphs; 0: captured when they are needed
};

// What was made ready before the first request; all 0 on a CPU, where nothing has to be.
struct WarmUpReport {
  int sizes = 0;     // of steps and drafts that are ready
  int left_out = 0;  // for want of time or memory: the first requests that need them wait
  double seconds = 0;
  int64_t bytes = 0;  // of the device's memory
};

// One step, for the metrics. Plain values; called on the engine thread after delivery.
struct StepStats {
  double queue_s = 0, prefill_s = 0, draft_s = 0, verify_s = 0, accept_s = 0, commit_s = 0, deliver_s = 0;
  int num_running = 0, num_waiting = 0, num_prefill_tokens = 0, num_decode_requests = 0, num_verify_rows = 0;
  bool ahead = false;  // started before the step ahead of it was read
  int num_drafts = 0;  // requests that brought a tree of more than one node
  int num_draft_tokens = 0, num_accepted_tokens = 0, num_output_tokens = 0;
  std::array<int, 16> accepted_per_depth{};  // [depth - 1] drafts accepted at least that deep
  std::array<int, 16> drafted_per_depth{};   // [depth - 1] drafts at least that deep
  std::string_view drafter;                  // "" when nothing was drafted, "mixed" when requests used different ones
  int64_t num_prefix_queries = 0;            // prompt tokens that were looked up in the prefix cache
  int64_t num_prefix_hits = 0;               // of them, found there
  int num_drafter_errors = 0;                // proposals that failed or were malformed, and so not used
  // What the speculation controller expected of this step, beside what came; 0 where it expected nothing. Tokens are
  // those of all decoding requests together.
  double expected_draft_s = 0, expected_verify_s = 0, expected_tokens = 0;
  double speculation_saved_s = 0;  // beside what plain steps would have taken for the same tokens
};

struct EngineStats {  // a consistent snapshot
  int64_t slots_total = 0, slots_free = 0, num_running = 0, num_waiting = 0, waiting_tokens = 0;
  int64_t prefix_cache_entries = 0, prefix_cache_capacity = 0;
  int64_t bytes_per_slot = 0, draft_bytes_per_slot = 0;  // the target's state, all drafters' together
  DType state_dtype = DType::kF32;                       // the target's
  int64_t weight_bytes = 0;                              // the target's
  int64_t requests_finished = 0, output_tokens = 0, steps = 0;
  bool speculation_on = false;
  double speculation_saved_s = 0;    // since the start; negative: lost
  double recent_requests_per_s = 0;  // drain rate, for Retry-After
  int64_t drafter_errors = 0;
};

class Engine {
 public:
  // drafters may be empty. The observer may be null. Errors: INVALID_ARGUMENT names the option (a default speculation
  // mode whose drafter is missing, too), RESOURCE_EXHAUSTED when the states do not fit in memory.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(std::unique_ptr<Model> model,
                                                        std::vector<std::unique_ptr<Drafter>> drafters,
                                                        EngineOptions options,
                                                        std::function<void(const StepStats&)> observer);
  ~Engine();  // stops the thread; live requests end with kCancelled

  // Called on the engine thread each time that sinks were called, after the last of them: consumers that are woken by
  // it, and not by their sinks, are woken once a step, and do not take the processor from an engine that is not yet
  // done telling. Before Start.
  void SetAfterDelivery(std::function<void()> run);
  void Start();  // launches the engine thread (tests may call Step() themselves instead)
  bool Step();   // one turn; false when there was nothing to do. Engine thread only.

  // Errors: INVALID_ARGUMENT (bad sampling, empty or too long prompt, token out of range, id in use, no sink, a
  // speculation mode whose drafter is not loaded), RESOURCE_EXHAUSTED (queue full), UNAVAILABLE (draining). On OK the
  // sink hears of this request until an output with a finish reason, or until it returns false: then never again.
  absl::Status Submit(Request request);
  // Whether the tenant's share of the queue has room for one more small request; RESOURCE_EXHAUSTED if not.
  absl::Status CheckShare(const std::string& tenant) const;
  void SetMaxRunningPerTenant(int limit);  // as RequestQueue's
  void Cancel(uint64_t request_id);        // idempotent; unknown ids are ignored
  void StopAdmitting();                    // Submit answers UNAVAILABLE from now on
  // Waits until all requests ended, at most `timeout`; then aborts what is left with kCancelled. True if none was left.
  // Without Start the calling thread turns the crank itself.
  bool Drain(std::chrono::milliseconds timeout);

  EngineStats stats() const;
  absl::Status health() const;  // not OK once the model's device has failed: Submit then answers UNAVAILABLE
  std::vector<DeviceStats> device_stats() const;  // the model's; empty on a CPU
  const ModelConfig& model_config() const;
  const EngineOptions& options() const;
  const WarmUpReport& warm_up() const;
  std::string Describe() const;  // model, pool and capacity, for the start-up print

 private:
  class Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace linspec
