#include "server/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <array>
#include <chrono>
#include <set>

#include "server/response_stream.h"
#include "server/service.h"

namespace linspec {
namespace {

using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;
using Buckets = Histogram::BucketBoundaries;

// vLLM's edges; kPerToken gains five below its 10 ms, where small models live.
const Buckets kFirstToken = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                             1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
const Buckets kPerToken = {.001, .002, .003, .005, .0075, .01, .025, .05, .075, .1, .15, .2,
                           .3,   .4,   .5,   .75,  1,     2.5, 5,    7.5, 10,   20, 40,  80};
const Buckets kRequest = {.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
const Buckets kQueue = {.001, .005, .01, .05, .1, .3, .5, .8, 1,   1.5, 2,  2.5,
                        5,    10,   15,  20,  30, 40, 50, 60, 120, 240, 480};
const Buckets kStage = {.00001, .00003, .0001, .0003, .001, .002, .003, .005, .01, .02, .03, .05, .1, .3, 1, 3};
const Buckets kTokens = {1,    2,    5,     10,    20,    50,     100,    200,    500, 1000,
                         2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1e6};
const Buckets kHttp = {.001, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60};

constexpr std::array kStages = {"queue", "prefill", "draft", "verify", "accept", "commit", "deliver"};

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

}  // namespace

struct Metrics::Impl {
  Impl(const std::string& model_name, bool alias) : labels{{"model_name", model_name}}, alias_vllm(alias) {
    for (size_t i = 0; i < kStages.size(); ++i) stage[i] = &stage_family.Add({{"stage", kStages[i]}}, kStage);
    prometheus::BuildGauge()
        .Name("linspec_build_info")
        .Help("Constant 1; the version is a label")
        .Register(registry)
        .Add({{"version", kVersion}})
        .Set(1);
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
  Family<Gauge>& slots = prometheus::BuildGauge()
                             .Name("linspec_state_slots")
                             .Help("Recurrent-state slots")
                             .Labels(labels)
                             .Register(registry);
  Gauge& can_generate = MakeGauge("linspec_can_generate", "1 unless a token that the probe asked for did not come");
  Gauge& slots_free = slots.Add({{"state", "free"}});
  Gauge& slots_running = slots.Add({{"state", "running"}});
  Gauge& state_bytes = MakeGauge("linspec_state_bytes", "Memory of all state slots");
  Gauge& bytes_per_slot = MakeGauge("linspec_state_bytes_per_request", "The same at every context length");

  Counter& prompt_tokens = MakeCounter("linspec_prompt_tokens_total", "Prompt tokens processed");
  Counter& generation_tokens = MakeCounter("linspec_generation_tokens_total", "Tokens generated");
  Counter& steps = MakeCounter("linspec_engine_steps_total", "Engine steps");
  Family<Counter>& success = CounterFamily("linspec_request_success_total", "Requests by how they ended");
  Family<Counter>& rejected = CounterFamily("linspec_admission_rejected_total", "Requests turned away, by reason");
  Family<Counter>& http = CounterFamily("linspec_http_requests_total", "HTTP requests");
  Family<Counter>& drafts = CounterFamily("linspec_spec_decode_num_drafts_total", "Draft trees verified");
  Family<Counter>& draft_tokens = CounterFamily("linspec_spec_decode_num_draft_tokens_total", "Tokens drafted");
  Family<Counter>& accepted = CounterFamily("linspec_spec_decode_num_accepted_tokens_total", "Drafted tokens accepted");
  Family<Counter>& accepted_at = CounterFamily("linspec_spec_decode_num_accepted_tokens_per_pos_total",
                                               "Accepted tokens by depth in the tree, from 0");
  Family<Counter>& drafted_at = CounterFamily("linspec_spec_decode_num_draft_tokens_per_pos_total",
                                              "Drafted tokens by depth in the tree, from 0");
  Counter& verify_rows = MakeCounter("linspec_verify_rows_total", "Rows verified, roots included");

  Histogram& first_token =
      MakeHistogram("linspec_time_to_first_token_seconds", "From arrival to first output", kFirstToken);
  Histogram& gap = MakeHistogram("linspec_inter_token_latency_seconds", "Between two outputs of a request", kPerToken);
  Histogram& per_token = MakeHistogram("linspec_request_time_per_output_token_seconds",
                                       "Decode time over output tokens after the first", kPerToken);
  Histogram& end_to_end = MakeHistogram("linspec_e2e_request_latency_seconds", "From arrival to the end", kRequest);
  Histogram& queue_time = MakeHistogram("linspec_request_queue_time_seconds", "From arrival to a slot", kQueue);
  Histogram& prefill_time = MakeHistogram("linspec_request_prefill_time_seconds", "From slot to first token", kRequest);
  Histogram& decode_time =
      MakeHistogram("linspec_request_decode_time_seconds", "From first token to the end", kRequest);
  Histogram& request_prompt = MakeHistogram("linspec_request_prompt_tokens", "Prompt length", kTokens);
  Histogram& request_output = MakeHistogram("linspec_request_generation_tokens", "Output length", kTokens);
  Histogram& iteration_tokens = MakeHistogram("linspec_iteration_tokens_total", "Rows of one step", kTokens);
  Family<Histogram>& stage_family = HistogramFamily("linspec_step_stage_seconds", "Time of one engine step, by stage");
  std::array<Histogram*, kStages.size()> stage{};
  Family<Histogram>& http_time =
      HistogramFamily("linspec_http_request_duration_seconds", "Until the last byte was written");
};

Metrics::Metrics(const std::string& model_name, bool alias_vllm)
    : impl_(std::make_unique<Impl>(model_name, alias_vllm)) {}
Metrics::~Metrics() = default;

void Metrics::OnStep(const StepStats& step) {
  Impl& m = *impl_;
  m.steps.Increment();
  m.prompt_tokens.Increment(step.num_prefill_tokens);
  m.generation_tokens.Increment(step.num_output_tokens);
  m.verify_rows.Increment(step.num_verify_rows);
  m.iteration_tokens.Observe(step.num_prefill_tokens + step.num_verify_rows);
  const double times[] = {step.queue_s,  step.prefill_s, step.draft_s,  step.verify_s,
                          step.accept_s, step.commit_s,  step.deliver_s};
  for (size_t i = 0; i < kStages.size(); ++i) m.stage[i]->Observe(times[i]);
  if (step.num_draft_tokens == 0) return;
  const std::string drafter(step.drafter);
  m.drafts.Add({{"drafter", drafter}}).Increment(step.num_drafts);
  m.draft_tokens.Add({{"drafter", drafter}}).Increment(step.num_draft_tokens);
  m.accepted.Add({{"drafter", drafter}}).Increment(step.num_accepted_tokens);
  for (size_t depth = 0; depth < step.drafted_per_depth.size(); ++depth) {
    if (step.drafted_per_depth[depth] == 0) break;
    const prometheus::Labels labels = {{"drafter", drafter}, {"position", std::to_string(depth)}};
    m.drafted_at.Add(labels).Increment(step.drafted_per_depth[depth]);
    m.accepted_at.Add(labels).Increment(step.accepted_per_depth[depth]);
  }
}

void Metrics::OnFirstToken(const StreamTimes& times) {
  impl_->first_token.Observe(Seconds(times.engine.first_token - times.engine.arrival));
  impl_->queue_time.Observe(Seconds(times.engine.scheduled - times.engine.arrival));
  impl_->prefill_time.Observe(Seconds(times.engine.first_token - times.engine.scheduled));
}

void Metrics::OnGaps(const std::vector<float>& seconds) {
  for (const float gap : seconds) impl_->gap.Observe(gap);
}

void Metrics::OnFinished(FinishReason reason, const StreamUsage& usage, const StreamTimes& times) {
  // vLLM's word for what was cancelled is "abort".
  const bool aborted = reason == FinishReason::kCancelled || reason == FinishReason::kDeadline;
  impl_->success.Add({{"finished_reason", aborted ? "abort" : FinishReasonName(reason)}}).Increment();
  impl_->request_prompt.Observe(static_cast<double>(usage.prompt_tokens));
  impl_->request_output.Observe(static_cast<double>(usage.completion_tokens));
  if (times.last_output == Clock::time_point()) return;
  impl_->end_to_end.Observe(Seconds(times.last_output - times.engine.arrival));
  const double decode = Seconds(times.last_output - times.engine.first_token);
  impl_->decode_time.Observe(decode);
  if (usage.completion_tokens > 1) impl_->per_token.Observe(decode / static_cast<double>(usage.completion_tokens - 1));
}

void Metrics::OnProbe(bool can_generate) { impl_->can_generate.Set(can_generate ? 1 : 0); }

void Metrics::OnRejected(const std::string& reason) { impl_->rejected.Add({{"reason", reason}}).Increment(); }

void Metrics::OnHttp(const std::string& route, const std::string& method, int status, double seconds) {
  impl_->http.Add({{"handler", route}, {"method", method}, {"status", std::to_string(status)}}).Increment();
  impl_->http_time.Add({{"handler", route}}, kHttp).Observe(seconds);
}

std::string Metrics::Serialize(const EngineStats& stats) {
  Impl& m = *impl_;
  m.running.Set(static_cast<double>(stats.num_running));
  m.waiting.Set(static_cast<double>(stats.num_waiting));
  m.waiting_tokens.Set(static_cast<double>(stats.waiting_tokens));
  m.speculating.Set(stats.speculation_on ? 1 : 0);
  m.slots_free.Set(static_cast<double>(stats.slots_free));
  m.slots_running.Set(static_cast<double>(stats.slots_total - stats.slots_free));
  m.state_bytes.Set(static_cast<double>(stats.slots_total * stats.bytes_per_slot));
  m.bytes_per_slot.Set(static_cast<double>(stats.bytes_per_slot));
  auto families = m.registry.Collect();
  if (m.alias_vllm) {
    const size_t count = families.size();
    for (size_t i = 0; i < count; ++i) {
      // What exists only here keeps its own name.
      if (families[i].name.starts_with("linspec_state_") || families[i].name == "linspec_build_info") continue;
      families.push_back(families[i]);
      families.back().name.replace(0, sizeof("linspec_") - 1, "vllm:");
      for (auto& metric : families.back().metric) metric.label.push_back({"engine", "0"});
    }
  }
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace linspec
