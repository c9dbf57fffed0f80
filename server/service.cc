#include "server/service.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <utility>

#include "server/errors.h"

namespace linspec {
namespace {

// U+FDD0 is a Unicode noncharacter: it brackets special tokens that a client spelled in a message, so that the rendered
// prompt tells them from the template's own.
constexpr char kQuote[] = "\xEF\xB7\x90";
constexpr char kReplacement[] = "\xEF\xBF\xBD";

// The engine's INVALID_ARGUMENT messages begin with the field, "top_p = 2 is invalid: ..."; clients get it by name too.
absl::Status NameField(const absl::Status& status) {
  const std::string message(status.message());
  const size_t end = message.find_first_not_of("abcdefghijklmnopqrstuvwxyz_");
  const bool names_field = end != std::string::npos && end > 0 && message.find(" = ") < 64;
  if (status.code() != absl::StatusCode::kInvalidArgument || !names_field) return status;
  const size_t rest = message.compare(end, 3, " = ") == 0 ? end + 3 : message.find_first_not_of(' ', end);
  return FieldError(message.substr(0, end), message.substr(rest));
}

void Truncate(const PromptOptions& options, int64_t limit, std::vector<int32_t>* tokens) {
  if (options.truncate_tokens == 0) return;
  const int64_t keep = options.truncate_tokens < 0 ? limit : options.truncate_tokens;
  const int64_t excess = std::ssize(*tokens) - keep;
  if (excess <= 0) return;
  const auto begin = options.truncate_end ? tokens->end() - excess : tokens->begin();
  tokens->erase(begin, begin + excess);
}

void ReplaceAll(const std::string& from, const std::string& to, std::string* text) {
  for (size_t at = 0; (at = text->find(from, at)) != std::string::npos; at += to.size())
    text->replace(at, from.size(), to);
}

}  // namespace

std::string NewRequestId() {
  thread_local std::mt19937_64 generator{std::random_device{}()};
  return fmt::format("{:016x}{:016x}", generator(), generator());
}

RunningRequest::RunningRequest(Service* service, uint64_t id, std::shared_ptr<ResponseStream> stream, GenerateSpec spec)
    : service_(service), id_(id), stream_(std::move(stream)), spec_(std::move(spec)) {}

RunningRequest::~RunningRequest() {
  stream_->Cancel();
  if (submitted_ && !reported_) Report(FinishReason::kCancelled);
  if (submitted_) service_->engine().Cancel(id_);  // ids that ended are ignored
  service_->Forget(id_, spec_);
}

void RunningRequest::Report(FinishReason reason) {
  reported_ = true;
  const StreamUsage& usage = stream_->usage();
  const StreamTimes& times = stream_->times();
  service_->metrics().OnFinished(reason, usage, times);
  const auto ms = [&](Clock::time_point from, Clock::time_point to) {
    const bool known = from != Clock::time_point() && to != Clock::time_point();
    return known ? std::chrono::duration<double, std::milli>(to - from).count()
                 : std::numeric_limits<double>::quiet_NaN();
  };
  const std::string id = spec_.log_id.empty() ? std::to_string(id_) : spec_.log_id;
  // With seed, sampling parameters and prompt a request can be repeated, token for token.
  service_->log().Write(LogLevel::kInfo, "request finished",
                        {{"request_id", id},
                         {"finish_reason", FinishReasonName(reason)},
                         {"prompt_tokens", usage.prompt_tokens},
                         {"cached_tokens", usage.cached_tokens},
                         {"output_tokens", usage.completion_tokens},
                         {"draft_tokens", usage.draft_tokens},
                         {"accepted_tokens", usage.accepted_tokens},
                         {"queue_ms", ms(times.engine.arrival, times.engine.scheduled)},
                         {"ttft_ms", ms(times.engine.arrival, times.engine.first_token)},
                         {"e2e_ms", ms(times.engine.arrival, times.last_output)},
                         {"seed", std::to_string(spec_.sampling.seed)},
                         {"temperature", static_cast<double>(spec_.sampling.temperature)},
                         {"max_tokens", static_cast<int64_t>(spec_.sampling.max_tokens)}});
}

StreamDelta RunningRequest::Take() {
  const Clock::time_point start = Clock::now();
  StreamDelta delta = stream_->Take();
  Metrics& metrics = service_->metrics();
  if (!delta.empty()) metrics.OnDetokenize(std::chrono::duration<double>(Clock::now() - start).count());
  if (!first_seen_ && !delta.tokens.empty()) {
    first_seen_ = true;
    metrics.OnFirstToken(stream_->times());
  }
  metrics.OnGaps(stream_->times().gaps);
  stream_->ClearGaps();
  if (stream_->finished() && !reported_) {
    Report(delta.finish_reason);
    if (!delta.stop_string.empty()) service_->engine().Cancel(id_);
  }
  return delta;
}

Service::Service(ServerConfig config, Parts parts, Metrics* metrics, Log* log)
    : config_(std::move(config)),
      parts_(std::move(parts)),
      metrics_(metrics),
      log_(log),
      started_at_(std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch())
                      .count()) {
  for (int32_t id = 0; id < parts_.tokenizer->vocab_size(); ++id) {
    const std::string spelling = parts_.tokenizer->IsSpecial(id) ? parts_.tokenizer->IdToToken(id) : "";
    if (spelling.empty()) continue;
    special_spellings_.push_back(spelling);
    starts_special_[static_cast<uint8_t>(spelling[0])] = true;
  }
  metrics_->AddCollector([this]() -> std::vector<MetricSample> {
    return {{"linspec_can_generate",
             "1 unless a token that the probe asked for did not come",
             false,
             {},
             can_generate_ ? 1.0 : 0.0}};
  });
  // Longest first: a token that contains another is quoted whole.
  std::ranges::sort(special_spellings_, [](const auto& a, const auto& b) { return a.size() > b.size(); });
}

Service::~Service() = default;

absl::Status Service::Overloaded(absl::Status status, const char* reason) {
  metrics_->OnRejected(reason);
  const EngineStats stats = parts_.engine->stats();
  double seconds = 1;  // time until what waits has left the queue, at the recent rate
  if (stats.recent_requests_per_s > 0)
    seconds = static_cast<double>(stats.num_waiting + 1) / stats.recent_requests_per_s;
  return WithRetryAfter(std::move(status), static_cast<int>(std::clamp(std::ceil(seconds), 1.0, 60.0)));
}

absl::Status Service::CheckAdmission(const std::string& tenant) {
  if (draining_) return Overloaded(absl::UnavailableError("the server is shutting down"), "draining");
  const EngineStats stats = parts_.engine->stats();
  const auto& limits = config_.engine;
  if (stats.num_waiting >= limits.max_queue_requests && stats.slots_free == 0) {
    return Overloaded(absl::ResourceExhaustedError(fmt::format("{} requests are waiting, the most this server queues "
                                                               "(--max-queue-requests)",
                                                               stats.num_waiting)),
                      "queue_requests");
  }
  if (stats.waiting_tokens >= limits.max_queue_tokens) {
    return Overloaded(
        absl::ResourceExhaustedError(fmt::format("{} prompt tokens are waiting, the most this server queues "
                                                 "(--max-queue-tokens)",
                                                 stats.waiting_tokens)),
        "queue_tokens");
  }
  int open = 0;
  if (!tenant.empty()) {
    std::lock_guard lock(mutex_);
    const auto found = live_per_tenant_.find(tenant);
    if (found != live_per_tenant_.end()) open = found->second;
  }
  if (absl::Status share = parts_.engine->CheckShare(tenant); !share.ok()) {
    return Overloaded(TenantLimit(std::string(share.message())), "key_share");
  }
  return KeyLimit(open);
}

absl::Status Service::KeyLimit(int open) {
  const int limit = config_.engine.max_requests_per_key;
  if (limit == 0 || open < limit) return absl::OkStatus();
  return Overloaded(
      TenantLimit(fmt::format("this API key has {} requests open, its limit (--max-requests-per-key)", open)),
      "key_limit");
}

CallLimits Service::call_limits() const {
  constexpr int kChatTokens = 1024;
  const auto& limits = config_.engine;
  int chat_tokens = limits.default_chat_tokens;
  if (chat_tokens == 0) chat_tokens = generation().max_new_tokens > 0 ? generation().max_new_tokens : kChatTokens;
  return {.max_n = limits.max_n,
          .max_prompt_tokens = limits.max_prompt_tokens,
          .max_output_tokens = limits.max_output_tokens,
          .default_chat_tokens = std::min(chat_tokens, limits.max_output_tokens),
          .max_stop_strings = limits.max_stop_strings,
          .max_stop_bytes = limits.max_stop_bytes,
          .max_logit_bias = limits.max_logit_bias,
          .max_messages = limits.max_messages,
          .defaults = generation().sampling};
}

absl::Status Service::CheckBytes(size_t bytes, const char* field) const {
  // A token of a byte-level vocabulary can stand for many bytes, but hardly for more than this many on average.
  constexpr size_t kMaxBytesPerToken = 64;
  const int64_t limit = config_.engine.max_prompt_tokens;
  if (static_cast<int64_t>(bytes / kMaxBytesPerToken) <= limit) return absl::OkStatus();
  return FieldError(field, fmt::format("{} bytes are more than {} tokens (--max-prompt-tokens) can be", bytes, limit));
}

absl::StatusOr<std::vector<int32_t>> Service::Tokenize(const PromptInput& prompt, const PromptOptions& options) const {
  if (const auto* ids = std::get_if<std::vector<int32_t>>(&prompt)) return *ids;
  if (const auto* messages = std::get_if<std::vector<ChatMessage>>(&prompt)) return ChatTokens(*messages);
  return parts_.tokenizer->Encode(std::get<std::string>(prompt),
                                  {.add_special_tokens = options.add_special_tokens, .parse_special = true});
}

absl::StatusOr<std::vector<int32_t>> Service::ToTokens(const PromptInput& prompt, const PromptOptions& options) const {
  size_t bytes = 0;
  if (const auto* text = std::get_if<std::string>(&prompt)) bytes = text->size();
  if (const auto* messages = std::get_if<std::vector<ChatMessage>>(&prompt)) {
    for (const ChatMessage& message : *messages) bytes += message.content.size();
  }
  const char* field = std::holds_alternative<std::vector<ChatMessage>>(prompt) ? "messages" : "prompt";
  if (absl::Status status = CheckBytes(bytes, field); !status.ok()) return status;
  absl::StatusOr<std::vector<int32_t>> tokens = Tokenize(prompt, options);
  if (!tokens.ok()) {
    return tokens.status().code() == absl::StatusCode::kInvalidArgument && ErrorField(tokens.status()).empty()
               ? FieldError(field, std::string(tokens.status().message()))
               : tokens.status();
  }
  if (tokens->empty()) return FieldError(field, "is empty: there is nothing to continue");
  const int64_t limit = config_.engine.max_prompt_tokens;
  Truncate(options, limit, &*tokens);
  if (static_cast<int64_t>(tokens->size()) > limit) {
    return FieldError(field, fmt::format("{} tokens; at most {} (--max-prompt-tokens)", tokens->size(), limit));
  }
  const int64_t vocab = parts_.engine->model_config().vocab_size;
  for (const int32_t token : *tokens) {
    if (token < 0 || token >= vocab)
      return FieldError(field, fmt::format("token id {} is not in [0, {})", token, vocab));
  }
  return tokens;
}

std::string Service::QuoteSpecialTokens(std::string text) const {
  ReplaceAll(kQuote, kReplacement, &text);
  std::string quoted;
  for (size_t i = 0; i < text.size();) {
    if (!starts_special_[static_cast<uint8_t>(text[i])]) {
      quoted += text[i++];
      continue;
    }
    const auto hit = std::ranges::find_if(
        special_spellings_, [&](const std::string& special) { return text.compare(i, special.size(), special) == 0; });
    if (hit == special_spellings_.end()) {
      quoted += text[i++];
    } else {
      quoted += kQuote + *hit + kQuote;
      i += hit->size();
    }
  }
  return quoted;
}

std::string Service::EosToken() const {
  const ModelConfig& model = parts_.engine->model_config();
  return model.eos_token_ids.empty() ? "" : Spelling(model.eos_token_ids.front());
}

absl::StatusOr<std::vector<int32_t>> Service::ChatTokens(const std::vector<ChatMessage>& messages) const {
  if (parts_.chat_template == nullptr) {
    return FieldError("messages", fmt::format("model {} has no chat template; use /v1/completions", parts_.model_name));
  }
  nlohmann::json list = nlohmann::json::array();
  for (const ChatMessage& message : messages) {
    list.push_back({{"role", message.role}, {"content", QuoteSpecialTokens(message.content)}});
  }
  const nlohmann::json context = {{"messages", std::move(list)},
                                  {"add_generation_prompt", true},
                                  {"bos_token", BosToken()},
                                  {"eos_token", EosToken()}};
  auto rendered = parts_.chat_template->Render(context.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  if (!rendered.ok()) return rendered.status();
  std::vector<int32_t> tokens;
  bool from_client = false;  // even pieces are the template's, odd ones are quoted special tokens
  for (size_t begin = 0; begin <= rendered->size(); from_client = !from_client) {
    const size_t end = std::min(rendered->find(kQuote, begin), rendered->size());
    if (end > begin) {
      auto piece = parts_.tokenizer->Encode(rendered->substr(begin, end - begin),
                                            {.add_special_tokens = false, .parse_special = !from_client});
      if (!piece.ok()) return piece.status();
      tokens.insert(tokens.end(), piece->begin(), piece->end());
    }
    begin = end + sizeof(kQuote) - 1;
  }
  return tokens;
}

absl::StatusOr<std::unique_ptr<RunningRequest>> Service::Start(std::vector<int32_t> prompt, GenerateSpec spec) {
  const uint64_t id = NextId();
  auto stream = ResponseStream::Create(
      parts_.tokenizer.get(), {.stop = spec.sampling.stop,
                               .include_stop = spec.sampling.include_stop_in_output,
                               .skip_special_tokens = spec.skip_special_tokens,
                               .detokenize = spec.detokenize,
                               .num_prompt_tokens = spec.prompt_logprobs ? static_cast<int64_t>(prompt.size()) : 0,
                               .last_prompt_token = prompt.back(),
                               .max_buffer_bytes = config_.network.stream_buffer_bytes});
  Request request{.id = id,
                  .prompt_tokens = std::move(prompt),
                  .sampling = spec.sampling,
                  .speculation = spec.speculation,
                  .acceptance = spec.acceptance,
                  .tenant = spec.tenant,
                  .cache_salt = spec.cache_salt,
                  .priority = spec.priority,
                  .deadline = spec.deadline,
                  .prompt_logprobs = spec.prompt_logprobs,
                  .sink = stream->MakeSink()};
  int open = 0;  // of this key, before this one
  {
    std::lock_guard lock(mutex_);
    open = live_per_tenant_[spec.tenant]++;
    if (const auto name = names_.find(spec.name); name != names_.end()) name->second.ids.push_back(id);
  }
  const bool has_key = !spec.tenant.empty();
  metrics_->OnSubmitted(spec.sampling.max_tokens, spec.n);
  if (config_.operations.log_prompts) LogPrompt(spec, id, request.prompt_tokens);
  // From here on the destructor gives the count back.
  auto running = std::make_unique<RunningRequest>(this, id, std::move(stream), std::move(spec));
  // Counted first, then checked: a burst cannot slip in between.
  if (absl::Status status = has_key ? KeyLimit(open) : absl::OkStatus(); !status.ok()) return status;
  absl::Status status = parts_.engine->Submit(std::move(request));
  if (IsShareExceeded(status)) return Overloaded(TenantLimit(std::string(status.message())), "key_share");
  if (status.code() == absl::StatusCode::kResourceExhausted) return Overloaded(std::move(status), "queue_full");
  if (status.code() == absl::StatusCode::kUnavailable) return Overloaded(std::move(status), "draining");
  if (!status.ok()) return NameField(status);
  running->submitted_ = true;
  return running;
}

void Service::LogPrompt(const GenerateSpec& spec, uint64_t id, const std::vector<int32_t>& prompt) {
  const auto text = parts_.tokenizer->Decode(prompt, /*skip_special_tokens=*/false);
  log_->Write(LogLevel::kInfo, "prompt",
              {{"request_id", spec.log_id.empty() ? std::to_string(id) : spec.log_id},
               {"text", text.ok() ? std::string_view(*text) : std::string_view("(not decodable)")}});
}

void Service::Forget(uint64_t id, const GenerateSpec& spec) {
  std::lock_guard lock(mutex_);
  if (const auto name = names_.find(spec.name); name != names_.end()) std::erase(name->second.ids, id);
  if (const auto live = live_per_tenant_.find(spec.tenant); live != live_per_tenant_.end() && --live->second <= 0) {
    live_per_tenant_.erase(live);
  }
}

absl::StatusOr<CallName> Service::Claim(const std::string& name, const std::string& tenant) {
  if (name.empty()) return CallName();
  std::lock_guard lock(mutex_);
  if (!names_.try_emplace(name, Named{tenant, {}}).second) {
    return absl::AlreadyExistsError(fmt::format("request_id: '{}' is in use by a live request", name));
  }
  return CallName(this, name);
}

CallName::~CallName() {
  if (service_ != nullptr) service_->FreeName(name_);
}

void Service::FreeName(const std::string& name) {
  std::lock_guard lock(mutex_);
  names_.erase(name);
}

absl::Status Service::Abort(const std::string& name, const std::string& tenant) {
  std::vector<uint64_t> ids;
  {
    std::lock_guard lock(mutex_);
    const auto found = names_.find(name);
    // Somebody else's request is as unknown as one that does not exist.
    if (name.empty() || found == names_.end() || found->second.tenant != tenant) {
      return absl::NotFoundError(fmt::format("request_id: no live request '{}'", name.substr(0, 128)));
    }
    ids = found->second.ids;
  }
  for (const uint64_t id : ids) parts_.engine->Cancel(id);
  return absl::OkStatus();
}

absl::Status Service::CheckModelName(const std::string& name) const {
  if (name.empty() || name == parts_.model_name) return absl::OkStatus();
  return ModelNotFound(
      fmt::format("'{}' is not served here; this server has '{}'", name.substr(0, 200), parts_.model_name));
}

void Service::StopAdmitting() {
  draining_ = true;
  parts_.engine->StopAdmitting();
}

std::string Service::MetricsText() { return metrics_->Serialize(parts_.engine->stats()); }

}  // namespace linspec
