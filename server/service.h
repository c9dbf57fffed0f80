// What both front ends share: prompt to tokens, admission, live requests, names. Knows no protocol.
//
// Threads: every method from any thread. RunningRequest belongs to one consumer.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "models/chat_template.h"
#include "models/generation_config.h"
#include "models/tokenizer.h"
#include "scheduler/engine.h"
#include "server/config.h"
#include "server/generate_call.h"
#include "server/log.h"
#include "server/metrics.h"
#include "server/response_stream.h"

namespace linspec {

inline constexpr char kVersion[] = "0.1.0";

struct GenerateSpec {
  SamplingParams sampling = {};
  SpeculationMode speculation = SpeculationMode::kDefault;
  AcceptanceMode acceptance = AcceptanceMode::kDefault;
  int32_t priority = 0;         // among the requests of the same key
  std::string cache_salt = {};  // as Request::cache_salt
  bool prompt_logprobs = false;
  bool detokenize = true;
  bool skip_special_tokens = true;
  std::optional<Clock::time_point> deadline = {};
  std::string tenant = {};  // which API key asks; "" without keys
  std::string name = {};    // the claimed request id it belongs to, for Abort; "" for none
  std::string log_id = {};  // what the log calls the request; "": its number
  int n = 1;                // answers asked for in the same call, for the metrics
};

std::string NewRequestId();  // 32 random hex digits

class Service;

// A client's request id while its call lives. Destroying it frees the id.
class CallName {
 public:
  CallName() = default;
  CallName(Service* service, std::string name) : service_(service), name_(std::move(name)) {}
  CallName(CallName&& other) noexcept : service_(std::exchange(other.service_, nullptr)), name_(other.name_) {}
  CallName& operator=(CallName&& other) noexcept {
    std::swap(service_, other.service_);
    std::swap(name_, other.name_);
    return *this;
  }
  ~CallName();

 private:
  Service* service_ = nullptr;
  std::string name_;
};

// One request in the engine. Destroying it before its end cancels it and gives back what it held.
class RunningRequest {
 public:
  RunningRequest(Service* service, uint64_t id, std::shared_ptr<ResponseStream> stream, GenerateSpec spec);
  ~RunningRequest();
  RunningRequest(const RunningRequest&) = delete;

  void SetNotify(std::function<void()> notify) { stream_->SetNotify(std::move(notify)); }
  StreamDelta Take();  // and reports to metrics and log
  bool finished() const { return stream_->finished(); }
  bool overflowed() const { return stream_->overflowed(); }
  const StreamUsage& usage() const { return stream_->usage(); }
  uint64_t id() const { return id_; }

 private:
  void Report(FinishReason reason);

  Service* const service_;
  const uint64_t id_;
  const std::shared_ptr<ResponseStream> stream_;
  const GenerateSpec spec_;
  friend class Service;
  bool submitted_ = false, first_seen_ = false, reported_ = false;
};

class Service {
 public:
  struct Parts {
    std::unique_ptr<Engine> engine;
    std::unique_ptr<Tokenizer> tokenizer;
    std::unique_ptr<ChatTemplate> chat_template;  // null: the model has none
    std::string chat_template_source;
    GenerationConfig generation;
    std::vector<std::string> drafters;
    std::string model_name;
  };
  // metrics and log must outlive the service.
  Service(ServerConfig config, Parts parts, Metrics* metrics, Log* log);
  ~Service();  // all RunningRequests must be gone

  // Overload and drain, from counters alone: asked before anything else is done for a request.
  absl::Status CheckAdmission(const std::string& tenant);
  // A text too long for --max-prompt-tokens whatever its tokens is refused before it is tokenized.
  absl::StatusOr<std::vector<int32_t>> ToTokens(const PromptInput& prompt, const PromptOptions& options = {}) const;
  // "" claims nothing. ALREADY_EXISTS for an id that another live call, of anybody, goes by.
  absl::StatusOr<CallName> Claim(const std::string& name, const std::string& tenant);
  // Submits. Errors as Engine::Submit; overload and a key's limit with a retry time.
  absl::StatusOr<std::unique_ptr<RunningRequest>> Start(std::vector<int32_t> prompt, GenerateSpec spec);
  absl::Status Abort(const std::string& name, const std::string& tenant);

  absl::Status CheckModelName(const std::string& name) const;  // "" is fine
  void StopAdmitting();                                        // readiness off
  bool draining() const { return draining_; }
  // The probe's latest finding (generation_probe.h): whether tokens come out, as far as is known.
  bool can_generate() const { return can_generate_; }
  void SetCanGenerate(bool can) { can_generate_ = can; }
  uint64_t NextId() { return next_id_++; }  // for the engine; never used twice
  std::string MetricsText();

  const ServerConfig& config() const { return config_; }
  CallLimits call_limits() const;
  const Tokenizer& tokenizer() const { return *parts_.tokenizer; }
  Engine& engine() { return *parts_.engine; }
  Metrics& metrics() { return *metrics_; }
  Log& log() { return *log_; }
  const std::string& model_name() const { return parts_.model_name; }
  const std::string& chat_template_source() const { return parts_.chat_template_source; }  // "": the model has none
  std::string BosToken() const { return Spelling(parts_.engine->model_config().bos_token_id); }  // "": none
  std::string EosToken() const;
  const std::vector<std::string>& drafters() const { return parts_.drafters; }
  const GenerationConfig& generation() const { return parts_.generation; }  // what requests get that do not say
  int64_t started_at() const { return started_at_; }                        // seconds since 1970

 private:
  friend class RunningRequest;
  friend class CallName;
  std::string Spelling(int32_t id) const { return id < 0 ? "" : parts_.tokenizer->IdToToken(id); }
  absl::Status CheckBytes(size_t bytes, const char* field) const;
  absl::StatusOr<std::vector<int32_t>> Tokenize(const PromptInput& prompt, const PromptOptions& options) const;
  absl::StatusOr<std::vector<int32_t>> ChatTokens(const std::vector<ChatMessage>& messages) const;
  std::string QuoteSpecialTokens(std::string text) const;
  absl::Status Overloaded(absl::Status status, const char* reason);
  absl::Status KeyLimit(int open);  // OK when a key with so many open requests may have one more
  void LogPrompt(const GenerateSpec& spec, uint64_t id, const std::vector<int32_t>& prompt);
  void Forget(uint64_t id, const GenerateSpec& spec);
  void FreeName(const std::string& name);

  const ServerConfig config_;
  Parts parts_;
  Metrics* const metrics_;
  Log* const log_;
  const int64_t started_at_;
  std::vector<std::string> special_spellings_;  // longest first
  std::array<bool, 256> starts_special_{};      // by first byte
  std::atomic<uint64_t> next_id_ = 1;
  std::atomic<bool> draining_ = false, can_generate_ = true;

  std::mutex mutex_;  // guards both maps
  struct Named {
    std::string tenant;
    std::vector<uint64_t> ids;
  };
  std::unordered_map<std::string, Named> names_;
  std::unordered_map<std::string, int> live_per_tenant_;
};

}  // namespace linspec
