// What a client asks and what it gets. Values only; the server builds them, the engine consumes them.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "models/sampler.h"
#include "models/sampling_params.h"

namespace linspec {

using Clock = std::chrono::steady_clock;

enum class FinishReason : uint8_t { kNone, kLength, kStop, kCancelled, kDeadline, kError };
const char* FinishReasonName(FinishReason reason);  // "length", "stop", "cancelled", "deadline", "error"

enum class SpeculationMode : uint8_t { kDefault, kOff, kDraft, kMedusa, kRecurrent, kNgram, kAuto };
// By the names that users write: "off", "draft", ... kDefault has none: "". nullopt: no such mode.
std::string_view SpeculationModeName(SpeculationMode mode);
std::optional<SpeculationMode> FindSpeculationMode(std::string_view name);
std::string SpeculationModeNames();  // "off, draft, ...", for messages

// How drafted tokens are accepted (scheduler/acceptance.h).
enum class AcceptanceMode : uint8_t { kDefault, kGumbel, kRejection, kTypical };

struct RequestTimes {
  Clock::time_point arrival, scheduled, first_token, finished;
};

// One step's news for one request. Called on the engine thread: the sink must not block.
struct RequestOutput {
  uint64_t request_id = 0;
  std::vector<SampledToken> tokens;                  // new ones, possibly several in a step
  FinishReason finish_reason = FinishReason::kNone;  // other than kNone: the last output of the request
  absl::Status status;                               // why, when kError
  int32_t stop_token = -1;                           // the eos / stop token that ended it (not in tokens), -1: none
  int64_t num_prompt_tokens = 0;
  int64_t num_cached_tokens = 0;    // of the prompt: taken from the prefix cache
  int64_t num_output_tokens = 0;    // so far
  int64_t num_draft_tokens = 0;     // proposed so far (roots not counted)
  int64_t num_accepted_tokens = 0;  // of those, accepted so far
  int64_t num_verify_steps = 0;
  RequestTimes times;
};

// Receives outputs. Return false to cancel the request (the client is gone, its buffer is full, or a stop string was
// found): its slot is free at once and the sink is not called again.
using OutputSink = std::function<bool(RequestOutput&&)>;

struct Request {
  uint64_t id = 0;                     // unique among live requests; the server counts up
  std::vector<int32_t> prompt_tokens;  // at least one
  SamplingParams sampling;
  SpeculationMode speculation = SpeculationMode::kDefault;
  AcceptanceMode acceptance = AcceptanceMode::kDefault;
  std::string tenant = {};  // who asks; tenants share queue, slots and prompt tokens of a step fairly. "": everybody
  std::string cache_salt = {};  // of a tenant's requests, those of one salt share the states kept of prompts
  int32_t priority = 0;         // lower runs first, as vLLM; among the requests of one tenant
  std::optional<Clock::time_point> deadline;
  bool prompt_logprobs = false;  // deliver prompt logprobs (echo); tokens of the first output then start with
                                 // the prompt, whose first token has the logprob NaN: nothing predicts it
  OutputSink sink;
};

// RESOURCE_EXHAUSTED because of what one tenant has waiting, while the queue has room for others.
absl::Status ShareExceededError(const std::string& message);
bool IsShareExceeded(const absl::Status& status);

}  // namespace linspec
