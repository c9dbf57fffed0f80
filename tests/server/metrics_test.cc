#include "server/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <regex>

#include "server/response_stream.h"

namespace linspec {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

EngineStats SomeStats() {
  EngineStats stats;
  stats.slots_total = 8;
  stats.slots_free = 6;
  stats.num_running = 2;
  stats.num_waiting = 3;
  stats.bytes_per_slot = 1000;
  stats.state_dtype = DType::kBF16;
  stats.draft_bytes_per_slot = 100;
  stats.weight_bytes = 5000;
  return stats;
}

// The value of the one sample whose line begins with `name` and holds all `labels`; fails when there is none or
// several.
double Value(const std::string& text, const std::string& name, const std::vector<std::string>& labels = {}) {
  std::vector<double> found;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with(name + "{") && !line.starts_with(name + " ")) continue;
    bool all = true;
    for (const std::string& label : labels) all = all && line.find(label) != std::string::npos;
    if (all) found.push_back(std::stod(line.substr(line.rfind(' ') + 1)));
  }
  EXPECT_EQ(found.size(), 1u) << name << " in\n" << text;
  return found.empty() ? -1 : found.front();
}

StreamTimes Times() {
  StreamTimes times;
  const Clock::time_point start = Clock::time_point() + std::chrono::hours(1);
  times.engine = {start, start + std::chrono::milliseconds(2), start + std::chrono::milliseconds(6), {}};
  times.last_output = start + std::chrono::milliseconds(46);
  return times;
}

TEST(MetricsTest, CountersExistAtZeroSoThatTheFirstEventHasARate) {
  Metrics metrics({.model_name = "m", .drafters = {"draft", "ngram"}});
  const std::string text = metrics.Serialize(SomeStats());
  for (const char* reason : {"stop", "length", "abort", "error"}) {
    EXPECT_EQ(Value(text, "linspec_request_success_total", {"finished_reason=\"" + std::string(reason) + "\""}), 0);
  }
  EXPECT_EQ(Value(text, "linspec_admission_rejected_total", {"reason=\"queue_requests\""}), 0);
  for (const char* drafter : {"draft", "ngram", "mixed"}) {
    EXPECT_EQ(Value(text, "linspec_spec_decode_num_drafts_total", {"drafter=\"" + std::string(drafter) + "\""}), 0);
  }
}

TEST(MetricsTest, StatesByRoleAndBytes) {
  Metrics metrics({.model_name = "m"});
  const std::string text = metrics.Serialize(SomeStats());
  EXPECT_EQ(Value(text, "linspec_state_slots", {"state=\"free\""}), 6);
  EXPECT_EQ(Value(text, "linspec_state_slots", {"state=\"running\""}), 2);
  EXPECT_EQ(Value(text, "linspec_state_usage_ratio"), 0.25);
  EXPECT_EQ(Value(text, "linspec_state_bytes", {"tier=\"target\""}), 8000);
  EXPECT_EQ(Value(text, "linspec_state_bytes", {"tier=\"draft\""}), 800);
  EXPECT_EQ(Value(text, "linspec_state_bytes_per_request"), 1000);
  EXPECT_EQ(Value(text, "linspec_state_info", {"dtype=\"BF16\""}), 1);
  EXPECT_EQ(Value(text, "linspec_weight_bytes"), 5000);
  EXPECT_THAT(text, HasSubstr("engine=\"0\",model_name=\"m\""));
}

TEST(MetricsTest, StepsFeedStagesAndSpeculation) {
  Metrics metrics({.model_name = "m", .drafters = {"draft"}});
  StepStats step;
  step.drafter = "draft";
  step.num_drafts = 2;
  step.num_draft_tokens = 5;
  step.num_accepted_tokens = 3;
  step.drafted_per_depth = {2, 2, 1};
  step.accepted_per_depth = {2, 1, 0};
  step.num_output_tokens = 5;
  step.num_verify_rows = 7;
  step.verify_s = 0.004;
  step.num_drafter_errors = 1;
  step.num_prefix_queries = 300;
  step.num_prefix_hits = 256;
  metrics.OnStep(step);
  const std::string text = metrics.Serialize(SomeStats());
  EXPECT_EQ(Value(text, "linspec_spec_decode_num_draft_tokens_total"), 5);
  EXPECT_EQ(Value(text, "linspec_spec_tree_nodes_total"), 7);
  EXPECT_EQ(Value(text, "linspec_spec_decode_num_accepted_tokens_per_pos_total", {"position=\"1\""}), 1);
  EXPECT_EQ(Value(text, "linspec_spec_decode_num_draft_tokens_per_pos_total", {"position=\"2\""}), 1);
  EXPECT_EQ(Value(text, "linspec_drafter_errors_total"), 1);
  EXPECT_EQ(Value(text, "linspec_prefix_cache_queries_total"), 300);
  EXPECT_EQ(Value(text, "linspec_prefix_cache_hits_total"), 256);
  EXPECT_EQ(Value(text, "linspec_step_stage_seconds_count", {"stage=\"verify\""}), 1);
  EXPECT_EQ(Value(text, "linspec_step_stage_seconds_bucket", {"stage=\"verify\"", "le=\"0.005\""}), 1);
  EXPECT_EQ(Value(text, "linspec_step_stage_seconds_bucket", {"stage=\"verify\"", "le=\"0.003\""}), 0);
  EXPECT_EQ(Value(text, "linspec_generation_tokens_total"), 5);
}

TEST(MetricsTest, RequestTimesInVllmsBucketsAndFinerOnes) {
  Metrics metrics({.model_name = "m"});
  StreamUsage usage;
  usage.prompt_tokens = 12;
  usage.completion_tokens = 11;
  metrics.OnSubmitted(64, 2);
  metrics.OnFirstToken(Times());
  metrics.OnDetokenize(0.00002);
  metrics.OnWrite(0.0002);
  metrics.OnFinished(FinishReason::kDeadline, usage, Times());
  const std::string text = metrics.Serialize(SomeStats());
  EXPECT_EQ(Value(text, "linspec_time_to_first_token_seconds_bucket", {"le=\"0.005\""}), 0);
  EXPECT_EQ(Value(text, "linspec_time_to_first_token_seconds_bucket", {"le=\"0.0075\""}), 1);
  EXPECT_EQ(Value(text, "linspec_request_time_per_output_token_seconds_bucket", {"le=\"0.005\""}), 1);  // 40 ms / 10
  EXPECT_NEAR(Value(text, "linspec_request_queue_time_seconds_sum"), 0.002, 1e-9);
  EXPECT_NEAR(Value(text, "linspec_request_prefill_time_seconds_sum"), 0.004, 1e-9);
  EXPECT_NEAR(Value(text, "linspec_request_decode_time_seconds_sum"), 0.040, 1e-9);
  EXPECT_NEAR(Value(text, "linspec_request_inference_time_seconds_sum"), 0.044, 1e-9);
  EXPECT_NEAR(Value(text, "linspec_e2e_request_latency_seconds_sum"), 0.046, 1e-9);
  EXPECT_EQ(Value(text, "linspec_request_success_total", {"finished_reason=\"abort\""}), 1);
  EXPECT_EQ(Value(text, "linspec_request_params_n_bucket", {"le=\"1\""}), 0);
  EXPECT_EQ(Value(text, "linspec_request_params_max_tokens_sum"), 64);
  EXPECT_EQ(Value(text, "linspec_response_stage_seconds_count", {"stage=\"detokenize\""}), 1);
  EXPECT_EQ(Value(text, "linspec_response_stage_seconds_count", {"stage=\"write\""}), 1);
}

// The edges that vLLM 0.29 exports; a dashboard's heatmap of both must line up.
TEST(MetricsTest, EveryEdgeOfVllmIsThere) {
  Metrics metrics({.model_name = "m", .alias_vllm = true});
  const std::string text = metrics.Serialize(SomeStats());
  const std::map<std::string, std::vector<const char*>> edges = {
      {"vllm:time_to_first_token_seconds",
       {"0.001", "0.005", "0.01", "0.02", "0.04", "0.06", "0.08", "0.1", "0.25", "0.5", "0.75",
        "1",     "2.5",   "5",    "7.5",  "10",   "20",   "40",   "80",  "160",  "640", "2560"}},
      {"vllm:inter_token_latency_seconds",
       {"0.01", "0.025", "0.05", "0.075", "0.1", "0.15", "0.2", "0.3", "0.4", "0.5", "0.75", "1", "2.5", "5", "7.5",
        "10", "20", "40", "80"}},
      {"vllm:e2e_request_latency_seconds", {"0.3", "0.5", "0.8", "1",  "1.5", "2",   "2.5", "5",   "10",   "15",  "20",
                                            "30",  "40",  "50",  "60", "120", "240", "480", "960", "1920", "7680"}},
      {"vllm:iteration_tokens_total",
       {"1", "8", "16", "32", "64", "128", "256", "512", "1024", "2048", "4096", "8192", "16384"}},
  };
  for (const auto& [name, wanted] : edges) {
    for (const char* edge : wanted) {
      EXPECT_EQ(Value(text, name + "_bucket", {"le=\"" + std::string(edge) + "\""}), 0) << name << " " << edge;
    }
  }
  EXPECT_EQ(Value(text, "vllm:num_requests_running"), 2);
  EXPECT_EQ(Value(text, "vllm:kv_cache_usage_perc"), 0.25);
}

TEST(MetricsTest, AliasHoldsVllmsNamesOnlyAndIsOptIn) {
  Metrics plain({.model_name = "m"}), aliased({.model_name = "m", .alias_vllm = true});
  EXPECT_THAT(plain.Serialize(SomeStats()), Not(HasSubstr("vllm:")));
  const std::string text = aliased.Serialize(SomeStats());
  EXPECT_THAT(text, Not(HasSubstr("vllm:state")));
  EXPECT_THAT(text, Not(HasSubstr("vllm:step")));
  EXPECT_THAT(text, HasSubstr("# TYPE vllm:num_preemptions_total counter"));
}

TEST(MetricsTest, DevicesAndOtherCollectorsAreReadAtEachScrape) {
  Metrics metrics({.model_name = "m"});
  DeviceStats gpu{.device = "0",
                  .name = "GPU \"X\"",
                  .memory_bytes = {{"weights", 70}, {"states", 20}},
                  .busy_seconds = {{"verify", 1.5}}};
  metrics.AddCollector([&gpu] { return DeviceSamples(std::span(&gpu, 1)); });
  metrics.AddCollector(ProcessSamples);
  std::string text = metrics.Serialize(SomeStats());
  EXPECT_EQ(Value(text, "linspec_gpu_memory_bytes", {"gpu=\"0\"", "kind=\"weights\""}), 70);
  EXPECT_EQ(Value(text, "linspec_gpu_time_seconds_total", {"stage=\"verify\""}), 1.5);
  EXPECT_EQ(Value(text, "linspec_gpu_info", {R"(name="GPU \"X\"")"}), 1);
  EXPECT_THAT(text, HasSubstr("# TYPE linspec_gpu_time_seconds_total counter"));
  EXPECT_GT(Value(text, "process_resident_memory_bytes"), 1e6);
  EXPECT_GT(Value(text, "process_open_fds"), 2);
  gpu.memory_bytes[0].second = 71;
  EXPECT_EQ(Value(metrics.Serialize(SomeStats()), "linspec_gpu_memory_bytes", {"kind=\"weights\""}), 71);
  EXPECT_TRUE(DeviceSamples({}).empty());
}

TEST(MetricsTest, HttpAndRpc) {
  Metrics metrics({.model_name = "m"});
  metrics.OnHttp("/v1/completions", "POST", 200, 0.02);
  metrics.OnRpc("Generate", "INVALID_ARGUMENT", 0.001);
  const std::string text = metrics.Serialize(SomeStats());
  EXPECT_EQ(
      Value(text, "linspec_http_requests_total", {"handler=\"/v1/completions\"", "method=\"POST\"", "status=\"200\""}),
      1);
  EXPECT_EQ(Value(text, "linspec_grpc_requests_total", {"code=\"INVALID_ARGUMENT\"", "method=\"Generate\""}), 1);
}

}  // namespace
}  // namespace linspec
