#include "server/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <map>
#include <mutex>
#include <tuple>

#include "server/response_stream.h"
#include "server/service.h"

namespace linspec {
namespace {

using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;
using Buckets = Histogram::BucketBoundaries;

// vLLM's edges, and finer ones below 10 ms, where small models live.
const Buckets kFirstToken = {.001, .002, .003, .005, .0075, .01, .02, .04, .06, .08, .1,  .25, .5,
                             .75,  1,    2.5,  5,    7.5,   10,  20,  40,  80,  160, 640, 2560};
const Buckets kPerToken = {.001, .002, .003, .005, .0075, .01, .025, .05, .075, .1, .15, .2,
                           .3,   .4,   .5,   .75,  1,     2.5, 5,    7.5, 10,   20, 40,  80};
const Buckets kRequest = {.001, .005, .01, .05, .1, .3, .5, .8,  1,   1.5, 2,   2.5,  5,
                          10,   15,   20,  30,  40, 50, 60, 120, 240, 480, 960, 1920, 7680};
const Buckets kStage = {.00001, .00003, .0001, .0003, .001, .002, .003, .005, .01, .02, .03, .05, .1, .3, 1, 3};
const Buckets kTokens = {1,    2,    5,     10,    20,    50,     100,    200,    500, 1000,
                         2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1e6};
const Buckets kIteration = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};
const Buckets kChoices = {1, 2, 5, 10, 20};
const Buckets kHttp = {.001, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60};

constexpr std::array kStages = {"queue", "prefill", "draft", "verify", "accept", "commit", "deliver"};
constexpr std::array kFinishReasons = {"stop", "length", "abort", "error"};
constexpr std::array kRejectReasons = {"queue_requests", "queue_tokens", "queue_full", "prompt_too_long",
                                       "key_limit",      "key_share",    "draining"};
constexpr size_t kDepths = std::tuple_size_v<decltype(StepStats::drafted_per_depth)>;

// What vLLM's dashboards, autoscalers and `vllm bench serve` read, by its name there.
const std::map<std::string, std::string> kVllmNames = {
    {"linspec_num_requests_running", "vllm:num_requests_running"},
    {"linspec_num_requests_waiting", "vllm:num_requests_waiting"},
    {"linspec_state_usage_ratio", "vllm:kv_cache_usage_perc"},
    {"linspec_num_preemptions_total", "vllm:num_preemptions_total"},
    {"linspec_prompt_tokens_total", "vllm:prompt_tokens_total"},
    {"linspec_generation_tokens_total", "vllm:generation_tokens_total"},
    {"linspec_prefix_cache_queries_total", "vllm:prefix_cache_queries_total"},
    {"linspec_prefix_cache_hits_total", "vllm:prefix_cache_hits_total"},
    {"linspec_request_success_total", "vllm:request_success_total"},
    {"linspec_iteration_tokens_total", "vllm:iteration_tokens_total"},
    {"linspec_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"},
    {"linspec_inter_token_latency_seconds", "vllm:inter_token_latency_seconds"},
    {"linspec_request_time_per_output_token_seconds", "vllm:request_time_per_output_token_seconds"},
    {"linspec_e2e_request_latency_seconds", "vllm:e2e_request_latency_seconds"},
    {"linspec_request_queue_time_seconds", "vllm:request_queue_time_seconds"},
    {"linspec_request_prefill_time_seconds", "vllm:request_prefill_time_seconds"},
    {"linspec_request_decode_time_seconds", "vllm:request_decode_time_seconds"},
    {"linspec_request_inference_time_seconds", "vllm:request_inference_time_seconds"},
    {"linspec_request_prompt_tokens", "vllm:request_prompt_tokens"},
    {"linspec_request_generation_tokens", "vllm:request_generation_tokens"},
    {"linspec_request_max_num_generation_tokens", "vllm:request_max_num_generation_tokens"},
    {"linspec_request_params_max_tokens", "vllm:request_params_max_tokens"},
    {"linspec_request_params_n", "vllm:request_params_n"},
    {"linspec_spec_decode_num_drafts_total", "vllm:spec_decode_num_drafts_total"},
    {"linspec_spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_draft_tokens_total"},
    {"linspec_spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_accepted_tokens_total"},
    {"linspec_spec_decode_num_accepted_tokens_per_pos_total", "vllm:spec_decode_num_accepted_tokens_per_pos_total"},
};

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

// The counters of one drafter, looked up once.
struct DrafterCounters {
  Counter *drafts, *tokens, *accepted, *nodes;
  std::array<Counter*, kDepths> drafted_at, accepted_at;
};

}  // namespace

struct Metrics::Impl {
  explicit Impl(const MetricsOptions& options)
      : labels{{"model_name", options.model_name}, {"engine", "0"}}, alias_vllm(options.alias_vllm) {
    for (size_t i = 0; i < kStages.size(); ++i) stage[i] = &stage_family.Add({{"stage", kStages[i]}}, kStage);
    // A counter that first appears with its first event shows no rate for that event: make them all now, at zero.
    for (const char* reason : kFinishReasons) success.Add({{"finished_reason", reason}});
    for (const char* reason : kRejectReasons) rejected.Add({{"reason", reason}});
    for (const std::string& name : options.drafters) AddDrafter(name);
    if (options.drafters.size() > 1) AddDrafter("mixed");  // a step in which requests used different ones
    prometheus::BuildGauge()
        .Name("linspec_build_info")
        .Help("Constant 1; version and compiler are labels")
        .Register(registry)
        .Add({{"version", kVersion}, {"compiler", __VERSION__}})
        .Set(1);
  }

  DrafterCounters& AddDrafter(const std::string& name) {
    DrafterCounters counters{&drafts.Add({{"drafter", name}}),
                             &draft_tokens.Add({{"drafter", name}}),
                             &accepted.Add({{"drafter", name}}),
                             &tree_nodes.Add({{"drafter", name}}),
                             {},
                             {}};
    for (size_t depth = 0; depth < kDepths; ++depth) {
      const prometheus::Labels at = {{"drafter", name}, {"position", std::to_string(depth)}};
      counters.drafted_at[depth] = &drafted_at.Add(at);
      counters.accepted_at[depth] = &accepted_at.Add(at);
    }
    return drafters.insert_or_assign(name, counters).first->second;
  }

  Gauge& MakeGauge(const char* name, const char* help) {
    return prometheus::BuildGauge().Name(name).Help(help).Labels(labels).Register(registry).Add({});
  }
  Counter& MakeCounter(const char* name, const char* help) { return CounterFamily(name, help).Add({}); }
  Histogram& MakeHistogram(const char* name, const char* help, const Buckets& buckets) {
    return HistogramFamily(name, help).Add({}, buckets);
  }
  Family<Counter>& CounterFamily(const char* name, const char* help) {
    return prometheus::BuildCounter().Name(name).Help(help).Labels(labels).Register(registry);
  }
  Family<Histogram>& HistogramFamily(const char* name, const char* help) {
    return prometheus::BuildHistogram().Name(name).Help(help).Labels(labels).Register(registry);
  }

  const prometheus::Labels labels;
  const bool alias_vllm;
  prometheus::Registry registry;

  Gauge& running = MakeGauge("linspec_num_requests_running", "Requests that hold a state slot");
  Gauge& waiting = MakeGauge("linspec_num_requests_waiting", "Requests in the queue");
  Gauge& waiting_tokens = MakeGauge("linspec_prompt_tokens_waiting", "Prompt tokens in the queue");
  Gauge& speculating = MakeGauge("linspec_speculation_on", "1 while the engine drafts");
  Gauge& speculation_saved =
      MakeGauge("linspec_speculation_saved_seconds", "Beside plain steps for the same tokens; negative: lost");
  Family<Gauge>& slots = prometheus::BuildGauge()
                             .Name("linspec_state_slots")
                             .Help("Recurrent-state slots")
                             .Labels(labels)
                             .Register(registry);
  Gauge& slots_free = slots.Add({{"state", "free"}});
  Gauge& slots_running = slots.Add({{"state", "running"}});
  Gauge& prefixes = MakeGauge("linspec_prefix_cache_entries", "States kept of earlier prompts, beside the slots");
  Family<Gauge>& state_bytes = prometheus::BuildGauge()
                                   .Name("linspec_state_bytes")
                                   .Help("Memory of all state slots, the target's and the drafters'")
                                   .Labels(labels)
                                   .Register(registry);
  Gauge& target_bytes = state_bytes.Add({{"tier", "target"}});
  Gauge& draft_bytes = state_bytes.Add({{"tier", "draft"}});
  Gauge& bytes_per_slot = MakeGauge("linspec_state_bytes_per_request", "The same at every context length");
  Family<Gauge>& state_info = prometheus::BuildGauge()
                                  .Name("linspec_state_info")
                                  .Help("Constant 1; dtype of the target's states is a label")
                                  .Labels(labels)
                                  .Register(registry);
  Gauge& state_usage = MakeGauge("linspec_state_usage_ratio", "Slots held by requests over all slots, 0 to 1");
  Gauge& weight_bytes = MakeGauge("linspec_weight_bytes", "Memory of the target's weights");

  Counter& prompt_tokens =
      MakeCounter("linspec_prompt_tokens_total", "Prompt tokens processed; those found in the prefix cache are not");
  Counter& prefix_queries =
      MakeCounter("linspec_prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache");
  Counter& prefix_hits = MakeCounter("linspec_prefix_cache_hits_total", "Of these, tokens found there");
  Counter& generation_tokens = MakeCounter("linspec_generation_tokens_total", "Tokens generated");
  Counter& preemptions = MakeCounter("linspec_num_preemptions_total",
                                     "Always 0: an admitted request is never evicted, its state cannot grow");
  Counter& drafter_errors = MakeCounter("linspec_drafter_errors_total", "Draft trees that were malformed and not used");
  Counter& steps = MakeCounter("linspec_engine_steps_total", "Engine steps");
  Family<Counter>& success = CounterFamily("linspec_request_success_total", "Requests by how they ended");
  Family<Counter>& rejected = CounterFamily("linspec_admission_rejected_total", "Requests turned away, by reason");
  Family<Counter>& http = CounterFamily("linspec_http_requests_total", "HTTP requests");
  Family<Counter>& rpcs = CounterFamily("linspec_grpc_requests_total", "gRPC calls by method and status code");
  Family<Counter>& drafts = CounterFamily("linspec_spec_decode_num_drafts_total", "Draft trees verified");
  Family<Counter>& draft_tokens = CounterFamily("linspec_spec_decode_num_draft_tokens_total", "Tokens drafted");
  Family<Counter>& accepted = CounterFamily("linspec_spec_decode_num_accepted_tokens_total", "Drafted tokens accepted");
  Family<Counter>& accepted_at = CounterFamily("linspec_spec_decode_num_accepted_tokens_per_pos_total",
                                               "Accepted tokens by depth in the tree, from 0");
  Family<Counter>& drafted_at = CounterFamily("linspec_spec_decode_num_draft_tokens_per_pos_total",
                                              "Drafted tokens by depth in the tree, from 0");
  Family<Counter>& tree_nodes = CounterFamily("linspec_spec_tree_nodes_total", "Nodes of draft trees, roots included");
  Counter& verify_rows = MakeCounter("linspec_verify_rows_total", "Rows verified, roots included");

  Histogram& first_token =
      MakeHistogram("linspec_time_to_first_token_seconds", "From arrival to first output", kFirstToken);
  Histogram& gap = MakeHistogram("linspec_inter_token_latency_seconds", "Between two outputs of a request", kPerToken);
  Histogram& per_token = MakeHistogram("linspec_request_time_per_output_token_seconds",
                                       "Decode time over output tokens after the first", kPerToken);
  Histogram& end_to_end = MakeHistogram("linspec_e2e_request_latency_seconds", "From arrival to the end", kRequest);
  Histogram& queue_time = MakeHistogram("linspec_request_queue_time_seconds", "From arrival to a slot", kRequest);
  Histogram& prefill_time = MakeHistogram("linspec_request_prefill_time_seconds", "From slot to first token", kRequest);
  Histogram& decode_time =
      MakeHistogram("linspec_request_decode_time_seconds", "From first token to the end", kRequest);
  Histogram& inference_time = MakeHistogram("linspec_request_inference_time_seconds", "From slot to the end", kRequest);
  Histogram& request_prompt = MakeHistogram("linspec_request_prompt_tokens", "Prompt length", kTokens);
  Histogram& request_output = MakeHistogram("linspec_request_generation_tokens", "Output length", kTokens);
  Histogram& request_max_output =
      MakeHistogram("linspec_request_max_num_generation_tokens", "The same: a request is one sequence here", kTokens);
  Histogram& params_max_tokens = MakeHistogram("linspec_request_params_max_tokens", "max_tokens asked for", kTokens);
  Histogram& params_n = MakeHistogram("linspec_request_params_n", "n asked for", kChoices);
  Histogram& iteration_tokens = MakeHistogram("linspec_iteration_tokens_total", "Rows of one step", kIteration);
  Family<Histogram>& stage_family = HistogramFamily("linspec_step_stage_seconds", "Time of one engine step, by stage");
  std::array<Histogram*, kStages.size()> stage{};
  Family<Histogram>& response_family =
      HistogramFamily("linspec_response_stage_seconds", "Work on one piece of an answer, outside the engine, by stage");
  Histogram& detokenize_time = response_family.Add({{"stage", "detokenize"}}, kStage);
  Histogram& write_time = response_family.Add({{"stage", "write"}}, kStage);
  Family<Histogram>& http_time =
      HistogramFamily("linspec_http_request_duration_seconds", "Until the last byte was written");
  Family<Histogram>& rpc_time = HistogramFamily("linspec_grpc_request_duration_seconds", "Until the status was sent");

  std::map<std::string, DrafterCounters, std::less<>> drafters;  // the engine thread's
  std::mutex collectors_mutex;                                   // guards the next
  std::vector<MetricCollector> collectors;
};

namespace {

// Groups samples into families, in order of first appearance.
void AppendSamples(const std::vector<MetricSample>& samples, std::vector<prometheus::MetricFamily>* families) {
  const size_t first = families->size();
  for (const MetricSample& sample : samples) {
    auto family = std::find_if(families->begin() + static_cast<int64_t>(first), families->end(),
                               [&](const auto& candidate) { return candidate.name == sample.name; });
    if (family == families->end()) {
      const auto type = sample.counter ? prometheus::MetricType::Counter : prometheus::MetricType::Gauge;
      family = families->insert(family, {sample.name, sample.help, type, {}});
    }
    prometheus::ClientMetric metric;
    for (const auto& [name, value] : sample.labels) metric.label.push_back({name, value});
    (sample.counter ? metric.counter.value : metric.gauge.value) = sample.value;
    family->metric.push_back(std::move(metric));
  }
}

}  // namespace

Metrics::Metrics(MetricsOptions options) : observes_(options.observes), impl_(std::make_unique<Impl>(options)) {}
Metrics::~Metrics() = default;

void Metrics::AddCollector(MetricCollector collector) {
  std::lock_guard lock(impl_->collectors_mutex);
  impl_->collectors.push_back(std::move(collector));
}

void Metrics::OnStep(const StepStats& step) {
  if (!observes_) return;
  Impl& m = *impl_;
  m.steps.Increment();
  m.prompt_tokens.Increment(step.num_prefill_tokens);
  if (step.num_prefix_queries > 0) m.prefix_queries.Increment(static_cast<double>(step.num_prefix_queries));
  if (step.num_prefix_hits > 0) m.prefix_hits.Increment(static_cast<double>(step.num_prefix_hits));
  m.generation_tokens.Increment(step.num_output_tokens);
  m.verify_rows.Increment(step.num_verify_rows);
  m.iteration_tokens.Observe(step.num_prefill_tokens + step.num_verify_rows);
  const double times[] = {step.queue_s,  step.prefill_s, step.draft_s,  step.verify_s,
                          step.accept_s, step.commit_s,  step.deliver_s};
  for (size_t i = 0; i < kStages.size(); ++i) m.stage[i]->Observe(times[i]);
  if (step.num_drafter_errors > 0) m.drafter_errors.Increment(step.num_drafter_errors);
  if (step.num_draft_tokens == 0) return;
  const auto found = m.drafters.find(step.drafter);
  DrafterCounters& counters = found != m.drafters.end() ? found->second : m.AddDrafter(std::string(step.drafter));
  counters.drafts->Increment(step.num_drafts);
  counters.tokens->Increment(step.num_draft_tokens);
  counters.accepted->Increment(step.num_accepted_tokens);
  counters.nodes->Increment(step.num_draft_tokens + step.num_drafts);
  for (size_t depth = 0; depth < kDepths && step.drafted_per_depth[depth] > 0; ++depth) {
    counters.drafted_at[depth]->Increment(step.drafted_per_depth[depth]);
    counters.accepted_at[depth]->Increment(step.accepted_per_depth[depth]);
  }
}

void Metrics::OnSubmitted(int64_t max_tokens, int n) {
  if (!observes_) return;
  impl_->params_max_tokens.Observe(static_cast<double>(max_tokens));
  impl_->params_n.Observe(n);
}

void Metrics::OnFirstToken(const StreamTimes& times) {
  if (!observes_) return;
  impl_->first_token.Observe(Seconds(times.engine.first_token - times.engine.arrival));
  impl_->queue_time.Observe(Seconds(times.engine.scheduled - times.engine.arrival));
  impl_->prefill_time.Observe(Seconds(times.engine.first_token - times.engine.scheduled));
}

void Metrics::OnGaps(const std::vector<float>& seconds) {
  if (!observes_) return;
  for (const float gap : seconds) impl_->gap.Observe(gap);
}

void Metrics::OnDetokenize(double seconds) {
  if (observes_) impl_->detokenize_time.Observe(seconds);
}

void Metrics::OnWrite(double seconds) {
  if (observes_) impl_->write_time.Observe(seconds);
}

void Metrics::OnFinished(FinishReason reason, const StreamUsage& usage, const StreamTimes& times) {
  if (!observes_) return;
  // vLLM's word for what was cancelled is "abort".
  const bool aborted = reason == FinishReason::kCancelled || reason == FinishReason::kDeadline;
  impl_->success.Add({{"finished_reason", aborted ? "abort" : FinishReasonName(reason)}}).Increment();
  impl_->request_prompt.Observe(static_cast<double>(usage.prompt_tokens));
  impl_->request_output.Observe(static_cast<double>(usage.completion_tokens));
  impl_->request_max_output.Observe(static_cast<double>(usage.completion_tokens));
  if (times.last_output == Clock::time_point()) return;
  impl_->end_to_end.Observe(Seconds(times.last_output - times.engine.arrival));
  const double decode = Seconds(times.last_output - times.engine.first_token);
  impl_->decode_time.Observe(decode);
  impl_->inference_time.Observe(Seconds(times.last_output - times.engine.scheduled));
  if (usage.completion_tokens > 1) impl_->per_token.Observe(decode / static_cast<double>(usage.completion_tokens - 1));
}

void Metrics::OnRejected(const std::string& reason) {
  if (observes_) impl_->rejected.Add({{"reason", reason}}).Increment();
}

void Metrics::OnHttp(const std::string& route, const std::string& method, int status, double seconds) {
  if (!observes_) return;
  impl_->http.Add({{"handler", route}, {"method", method}, {"status", std::to_string(status)}}).Increment();
  impl_->http_time.Add({{"handler", route}}, kHttp).Observe(seconds);
}

void Metrics::OnRpc(const std::string& method, const std::string& code, double seconds) {
  if (!observes_) return;
  impl_->rpcs.Add({{"method", method}, {"code", code}}).Increment();
  impl_->rpc_time.Add({{"method", method}}, kHttp).Observe(seconds);
}

std::string Metrics::Serialize(const EngineStats& stats) {
  Impl& m = *impl_;
  m.running.Set(static_cast<double>(stats.num_running));
  m.waiting.Set(static_cast<double>(stats.num_waiting));
  m.waiting_tokens.Set(static_cast<double>(stats.waiting_tokens));
  m.speculating.Set(stats.speculation_on ? 1 : 0);
  m.speculation_saved.Set(stats.speculation_saved_s);
  m.slots_free.Set(static_cast<double>(stats.slots_free));
  m.slots_running.Set(static_cast<double>(stats.slots_total - stats.slots_free));
  const double slots = static_cast<double>(stats.slots_total);
  m.state_usage.Set(slots > 0 ? static_cast<double>(stats.slots_total - stats.slots_free) / slots : 0);
  m.prefixes.Set(static_cast<double>(stats.prefix_cache_entries));
  m.target_bytes.Set((slots + static_cast<double>(stats.prefix_cache_capacity)) *
                     static_cast<double>(stats.bytes_per_slot));
  m.draft_bytes.Set(slots * static_cast<double>(stats.draft_bytes_per_slot));
  m.state_info.Add({{"dtype", DTypeName(stats.state_dtype)}}).Set(1);
  m.bytes_per_slot.Set(static_cast<double>(stats.bytes_per_slot));
  m.weight_bytes.Set(static_cast<double>(stats.weight_bytes));
  auto families = m.registry.Collect();
  std::vector<MetricCollector> collectors;
  {
    std::lock_guard lock(m.collectors_mutex);
    collectors = m.collectors;
  }
  for (const MetricCollector& collector : collectors) AppendSamples(collector(), &families);
  if (m.alias_vllm) {
    const size_t count = families.size();
    for (size_t i = 0; i < count; ++i) {
      const auto name = kVllmNames.find(families[i].name);
      if (name == kVllmNames.end()) continue;
      families.push_back(families[i]);
      families.back().name = name->second;
    }
  }
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace linspec
