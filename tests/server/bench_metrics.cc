// What metrics and logs cost the threads that feed them: compare with the length of a step and the life of a request.
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <unistd.h>

#include "server/log.h"
#include "server/metrics.h"
#include "server/response_stream.h"

namespace linspec {
namespace {

MetricsOptions Options() { return {.model_name = "m", .drafters = {"draft", "ngram"}, .alias_vllm = true}; }

StepStats Step(int draft_tokens) {
  StepStats step;
  step.verify_s = 0.003;
  step.num_verify_rows = 8 + draft_tokens;
  step.num_output_tokens = 8;
  step.num_drafts = draft_tokens > 0 ? 8 : 0;
  step.num_draft_tokens = draft_tokens;
  step.num_accepted_tokens = draft_tokens / 2;
  for (int depth = 0; depth < 4 && draft_tokens > 0; ++depth) step.drafted_per_depth[depth] = 8;
  step.drafter = draft_tokens > 0 ? "draft" : "";
  return step;
}

void BM_Step(benchmark::State& state) {
  Metrics metrics(Options());
  const StepStats step = Step(static_cast<int>(state.range(0)));
  for (auto _ : state) metrics.OnStep(step);
}
BENCHMARK(BM_Step)->Arg(0)->Arg(32);

// All that one request of 64 outputs adds: first token, gaps, text and writes, end.
void BM_Request(benchmark::State& state) {
  Metrics metrics(Options());
  StreamUsage usage;
  usage.completion_tokens = 64;
  StreamTimes times;
  times.last_output = times.engine.first_token = Clock::now();
  const std::vector<float> gap = {0.003f};
  for (auto _ : state) {
    metrics.OnSubmitted(64, 1);
    metrics.OnFirstToken(times);
    for (int i = 0; i < 64; ++i) {
      metrics.OnDetokenize(1e-5);
      metrics.OnGaps(gap);
      metrics.OnWrite(2e-5);
    }
    metrics.OnFinished(FinishReason::kLength, usage, times);
    metrics.OnHttp("/v1/completions", "POST", 200, 0.2);
  }
}
BENCHMARK(BM_Request);

void BM_Scrape(benchmark::State& state) {
  Metrics metrics(Options());
  metrics.AddCollector(ProcessSamples);
  metrics.OnStep(Step(32));
  for (auto _ : state) benchmark::DoNotOptimize(metrics.Serialize(EngineStats()));
}
BENCHMARK(BM_Scrape)->Unit(benchmark::kMicrosecond);

// On the caller's thread; the log's own thread writes to /dev/null at the same time.
void BM_LogLine(benchmark::State& state) {
  const int null = open("/dev/null", O_WRONLY);
  {
    Log log(state.range(0) == 0 ? LogFormat::kText : LogFormat::kJson, LogLevel::kInfo, null);
    for (auto _ : state) {
      log.Write(LogLevel::kInfo, "request finished",
                {{"request_id", "0123456789abcdef"},
                 {"finish_reason", "length"},
                 {"prompt_tokens", int64_t{64}},
                 {"output_tokens", int64_t{64}},
                 {"queue_ms", 0.1},
                 {"ttft_ms", 12.5},
                 {"e2e_ms", 200.5},
                 {"seed", "42"}});
    }
  }
  close(null);
}
BENCHMARK(BM_LogLine)->Arg(0)->Arg(1);

}  // namespace
}  // namespace linspec

BENCHMARK_MAIN();
