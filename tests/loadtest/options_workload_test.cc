#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <fstream>

#include "loadtest/options.h"
#include "loadtest/workload.h"

namespace linspec::loadtest {
namespace {

using ::testing::HasSubstr;

absl::StatusOr<Options> Parse(std::vector<std::string> args) { return ParseOptions(args); }

TEST(Options, DefaultsStayOnThisMachine) {
  const auto options = Parse({});
  ASSERT_TRUE(options.ok());
  EXPECT_EQ(options->host, "127.0.0.1");
  EXPECT_EQ(options->port, 8000);
  EXPECT_TRUE(std::isinf(options->request_rate));
  EXPECT_EQ(Parse({"--backend", "grpc"})->port, 50051);
}

TEST(Options, ReadsEveryKindOfValue) {
  const auto options = Parse({"--request-rate", "2.5", "--seed=18446744073709551615", "--ignore-eos", "--num-prompts=7",
                              "--metric-percentiles", "50,99.9", "--goodput", "ttft:200 tpot:20"});
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->request_rate, 2.5);
  EXPECT_EQ(options->seed, UINT64_MAX);
  EXPECT_TRUE(options->ignore_eos);
  EXPECT_EQ(options->num_prompts, 7);
  EXPECT_EQ(options->metric_percentiles, (std::vector<double>{50, 99.9}));
  EXPECT_EQ(options->goodput.ttft, 200);
  EXPECT_TRUE(std::isinf(options->goodput.e2el));
}

TEST(Options, ErrorsNameFlagAndValue) {
  const struct {
    std::vector<std::string> args;
    const char* message;
  } cases[] = {
      {{"--nonsense"}, "--nonsense"},
      {{"positional"}, "positional"},
      {{"--num-prompts"}, "--num-prompts"},
      {{"--num-prompts", "0"}, "--num-prompts 0"},
      {{"--num-prompts", "3x"}, "3x"},
      {{"--request-rate", "nan"}, "--request-rate"},
      {{"--request-rate", "-1"}, "-1"},
      {{"--cancel-fraction", "1.5"}, "1.5"},
      {{"--port", "70000"}, "70000"},
      {{"--backend", "other"}, "other"},
      {{"--goodput", "ttft"}, "--goodput"},
      {{"--goodput", "x:1"}, "--goodput x:1"},
      {{"--dataset-name", "trace"}, "--dataset-path"},
      {{"--metric-percentiles", "101"}, "101"},
      {{"--base-url", "ftp://x"}, "--base-url ftp://x"},
      {{"--tls-cert", "c.pem"}, "--tls-key"},
      {{"--base-url", "http://x:y"}, "--base-url http://x:y"},
      {{"--length-distribution", "normal"}, "--length-distribution normal"},
      {{"--ramp-up-strategy", "linear"}, "--ramp-up-start-rps"},
      {{"--percentile-metrics", "ttft,x"}, "--percentile-metrics x"},
  };
  for (const auto& test : cases) {
    const auto options = Parse(test.args);
    ASSERT_FALSE(options.ok()) << test.message;
    EXPECT_THAT(std::string(options.status().message()), HasSubstr(test.message));
  }
}

TEST(Options, BaseUrlNamesHostPortAndPrefix) {
  const auto options = Parse({"--base-url", "http://example:81/api/"});
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->host, "example");
  EXPECT_EQ(options->port, 81);
  EXPECT_EQ(options->path_prefix, "/api");
  EXPECT_EQ(Parse({"--base-url", "http://example"})->port, 80);
}

TEST(Options, HelpNamesEveryFlag) { EXPECT_THAT(OptionsHelp(), HasSubstr("--burstiness")); }

TEST(Trace, SortsAndStartsAtZero) {
  const auto rows = ParseTrace("prompt_tokens,arrival,output_tokens\n5,12.5,7\r\n3,10,4\n");
  ASSERT_TRUE(rows.ok()) << rows.status();
  ASSERT_EQ(rows->size(), 2u);
  EXPECT_EQ((*rows)[0].arrival, 0);
  EXPECT_EQ((*rows)[0].prompt_tokens, 3);
  EXPECT_EQ((*rows)[1].arrival, 2.5);
  EXPECT_EQ((*rows)[1].output_tokens, 7);
}

TEST(Trace, ReadsAzureColumnsAndDates) {
  const auto rows = ParseTrace(
      "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 23:59:59.5000000,374,44\n2023-11-17 "
      "00:00:01.0000000,396,109\n");
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_DOUBLE_EQ((*rows)[1].arrival, 1.5);
}

TEST(Trace, ErrorsNameTheLine) {
  EXPECT_THAT(std::string(ParseTrace("a,b\n1,2\n").status().message()), HasSubstr("line 1"));
  EXPECT_THAT(std::string(ParseTrace("arrival,prompt_tokens,output_tokens\n1,2\n").status().message()),
              HasSubstr("line 2"));
  EXPECT_FALSE(ParseTrace("arrival,prompt_tokens,output_tokens\n").ok());
  EXPECT_FALSE(ParseTrace("arrival,prompt_tokens,output_tokens\nnan,1,1\n").ok());
  EXPECT_FALSE(ParseTrace("").ok());
}

TEST(Workload, IsAFunctionOfTheSeed) {
  Options options;
  options.num_prompts = 50;
  options.request_rate = 10;
  options.random_range_ratio = 0.5;
  options.cancel_fraction = 0.5;
  options.slow_fraction = 0.5;
  const auto a = MakeWorkload(options), b = MakeWorkload(options);
  options.seed = 1;
  const auto c = MakeWorkload(options);
  ASSERT_TRUE(a.ok() && b.ok() && c.ok());
  int cancelled = 0, slow = 0;
  for (size_t i = 0; i < a->size(); ++i) {
    EXPECT_EQ((*a)[i].prompt, (*b)[i].prompt);
    EXPECT_EQ((*a)[i].arrival, (*b)[i].arrival);
    EXPECT_GE((*a)[i].max_tokens, 32);
    EXPECT_LE((*a)[i].max_tokens, 96);
    cancelled += (*a)[i].cancel_after_chunks >= 0;
    slow += (*a)[i].read_delay_ms > 0;
  }
  EXPECT_NE((*a)[0].prompt, (*c)[0].prompt);
  EXPECT_GT(cancelled, 10);
  EXPECT_LT(cancelled, 40);
  EXPECT_GT(slow, 10);
}

class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& text)
      : path(testing::TempDir() + "linspec_loadtest_" + std::to_string(getpid())) {
    std::ofstream(path) << text;
  }
  ~TemporaryFile() { std::remove(path.c_str()); }
  const std::string path;
};

TEST(Workload, ReadsPromptsInTurn) {
  const TemporaryFile file("{\"prompt\":\"one\"}\n\n{\"turns\":[\"two\",\"later\"]}\n");
  Options options;
  options.dataset_name = "custom";
  options.dataset_path = file.path;
  options.num_prompts = 3;
  const auto workload = MakeWorkload(options);
  ASSERT_TRUE(workload.ok()) << workload.status();
  EXPECT_EQ((*workload)[0].prompt, "one");
  EXPECT_EQ((*workload)[1].prompt, "two");
  EXPECT_EQ((*workload)[2].prompt, "one");
}

TEST(Workload, ErrorsNameFileAndLine) {
  Options options;
  options.dataset_name = "custom";
  options.dataset_path = "/nonexistent/prompts.jsonl";
  EXPECT_THAT(std::string(MakeWorkload(options).status().message()), HasSubstr("/nonexistent/prompts.jsonl"));
  const TemporaryFile file("{\"prompt\":\"one\"}\n[1]\n");
  options.dataset_path = file.path;
  EXPECT_THAT(std::string(MakeWorkload(options).status().message()), HasSubstr(":2:"));
}

double MeanLength(const Options& options) {
  const auto workload = MakeWorkload(options);
  EXPECT_TRUE(workload.ok());
  double sum = 0;
  for (const PlannedRequest& request : *workload) sum += request.max_tokens;
  return sum / static_cast<double>(workload->size());
}

TEST(Workload, LengthDistributionsKeepTheirMean) {
  Options options;
  options.num_prompts = 20000;
  options.random_output_len = 100;
  options.random_input_len = 1;
  for (const auto& [name, ratio] :
       {std::pair("uniform", 0.5), std::pair("lognormal", 0.7), std::pair("exponential", 0.0)}) {
    options.length_distribution = name;
    options.random_range_ratio = ratio;
    EXPECT_NEAR(MeanLength(options), 100, 3) << name;
  }
}

TEST(Workload, RampUpMovesTheRate) {
  Options options;
  options.num_prompts = 4000;
  options.random_input_len = options.random_output_len = 1;
  options.ramp_up_start_rps = 10;
  options.ramp_up_end_rps = 100;
  for (const char* strategy : {"linear", "exponential"}) {
    options.ramp_up_strategy = strategy;
    const auto workload = MakeWorkload(options);
    ASSERT_TRUE(workload.ok());
    const double first = (*workload)[100].arrival, last = workload->back().arrival - (*workload)[3899].arrival;
    EXPECT_NEAR(100 / first, 10.5, 4) << strategy;
    EXPECT_NEAR(100 / last, 98, 30) << strategy;
  }
}

TEST(Workload, TraceCanLendItsLengthsOnly) {
  const std::string path = testing::TempDir() + "/trace.csv";
  std::ofstream(path) << "TIMESTAMP,ContextTokens,GeneratedTokens\n0,3,5\n1000,4,6\n";
  Options options;
  options.dataset_name = "trace";
  options.dataset_path = path;
  options.trace_arrivals = false;
  options.request_rate = 100;
  const auto workload = MakeWorkload(options);
  ASSERT_TRUE(workload.ok());
  ASSERT_EQ(workload->size(), 2u);
  EXPECT_EQ((*workload)[1].max_tokens, 6);
  EXPECT_LT((*workload)[1].arrival, 5);
}

TEST(Workload, ReadsShareGpt) {
  const std::string path = testing::TempDir() + "/sharegpt.json";
  std::ofstream(path) << R"([{"id":"a","conversations":[{"from":"human","value":"hello"},{"from":"gpt","value":"hi"}]},
                             {"id":"b","conversations":[]}])";
  Options options;
  options.dataset_name = "sharegpt";
  options.dataset_path = path;
  options.num_prompts = 2;
  const auto workload = MakeWorkload(options);
  ASSERT_TRUE(workload.ok()) << workload.status();
  EXPECT_EQ((*workload)[0].prompt, "hello");
  EXPECT_EQ((*workload)[1].prompt, "hello");
}

}  // namespace
}  // namespace linspec::loadtest
