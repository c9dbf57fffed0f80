// The whole client against a server whose pace is known.
#include "loadtest/client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "loadtest/loadtest.h"
#include "loadtest/runner.h"
#include "loadtest/workload.h"
#include "tests/loadtest/fake_openai_server.h"

namespace linspec::loadtest {
namespace {

constexpr auto kGap = std::chrono::milliseconds(2);

Options SomeOptions(int num_prompts, int output_len) {
  Options options;
  options.num_prompts = num_prompts;
  options.random_output_len = output_len;
  options.quiet = true;
  return options;
}

RunResult Load(const Options& options, int port) {
  Target target;
  target.host = "127.0.0.1";
  target.port = port;
  target.path = "/v1/completions";
  target.model = "fake";
  const auto workload = MakeWorkload(options);
  EXPECT_TRUE(workload.ok());
  return RunWorkload(*workload, options,
                     [&](boost::asio::io_context* loop) { return CreateRestClient(loop, target, &options); });
}

TEST(RestClient, EveryStreamArrivesWholeAndInItsChunks) {
  FakeOpenAiServer server(kGap);
  Options options = SomeOptions(50, 7);
  options.threads = 2;
  const RunResult result = Load(options, server.port());
  ASSERT_EQ(result.records.size(), 50u);
  for (const RequestRecord& record : result.records) {
    EXPECT_TRUE(record.ok) << record.error;
    EXPECT_EQ(record.chunks, 7);
    EXPECT_EQ(record.output_tokens, 7);
    EXPECT_EQ(record.itls.size(), 6u);
    EXPECT_EQ(record.text, " word word word word word word word");
    EXPECT_GE(record.latency, record.ttft);
  }
  EXPECT_EQ(result.max_in_flight, 50);
}

TEST(RestClient, ClosedLoopKeepsItsBound) {
  FakeOpenAiServer server(kGap);
  Options options = SomeOptions(30, 4);
  options.max_concurrency = 5;
  const RunResult result = Load(options, server.port());
  EXPECT_EQ(result.max_in_flight, 5);
  EXPECT_LE(server.max_streams(), 5);
}

TEST(RestClient, CancellationsLeaveMidStream) {
  FakeOpenAiServer server(kGap);
  Options options = SomeOptions(10, 200);
  options.cancel_fraction = 1;
  options.cancel_after = 3;
  for (const RequestRecord& record : Load(options, server.port()).records) {
    EXPECT_TRUE(record.cancelled);
    EXPECT_GE(record.chunks, 3);
    EXPECT_LT(record.chunks, 200);
  }
}

TEST(RestClient, AServerThatIsNotThereIsAnErrorOfEachRequest) {
  int port = 0;
  {
    port = FakeOpenAiServer(kGap).port();
  }
  const RunResult result = Load(SomeOptions(3, 2), port);
  ASSERT_EQ(result.records.size(), 3u);
  for (const RequestRecord& record : result.records) EXPECT_THAT(record.error, ::testing::HasSubstr("connect"));
}

TEST(LoadTestMain, WritesResultAndReport) {
  FakeOpenAiServer server(kGap);
  const std::filesystem::path folder = std::filesystem::path(testing::TempDir()) / "loadtest_main";
  std::filesystem::create_directories(folder);
  std::vector<std::string> args = {"loadtest",
                                   "--base-url",
                                   "http://127.0.0.1:" + std::to_string(server.port()),
                                   "--num-prompts",
                                   "20",
                                   "--request-rate",
                                   "200",
                                   "--random-output-len",
                                   "5",
                                   "--quiet",
                                   "--goodput",
                                   "ttft:60000",
                                   "--result-dir",
                                   folder,
                                   "--result-filename",
                                   "result.json",
                                   "--append-result",
                                   "--html",
                                   folder / "report.html",
                                   "--label",
                                   "one"};
  std::vector<char*> argv;
  for (std::string& arg : args) argv.push_back(arg.data());
  std::filesystem::remove(folder / "result.json");
  for (int run = 0; run < 2; ++run) ASSERT_EQ(LoadTestMain(static_cast<int>(argv.size()), argv.data()), 0);
  std::ifstream file(folder / "result.json");
  int lines = 0;
  for (std::string line; std::getline(file, line); ++lines) {
    const auto report = nlohmann::json::parse(line);
    EXPECT_EQ(report["completed"], 20);
    EXPECT_EQ(report["total_output_tokens"], 100);
    EXPECT_EQ(report["model_id"], "fake");
    EXPECT_EQ(report["label"], "one");
    EXPECT_DOUBLE_EQ(report["tokens_per_chunk"], 1);
    EXPECT_GT(report["request_goodput"], 0);
    EXPECT_GT(report["client_cpu_per_thread"], 0);
  }
  EXPECT_EQ(lines, 2);
  EXPECT_GT(std::filesystem::file_size(folder / "report.html"), 5000u);
}

}  // namespace
}  // namespace linspec::loadtest
