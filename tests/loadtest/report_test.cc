#include "loadtest/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace linspec::loadtest {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

RequestRecord Record(double start, double ttft, std::vector<double> itls, int output_tokens) {
  RequestRecord record;
  record.ok = true;
  record.start = start;
  record.ttft = record.latency = ttft;
  for (const double gap : itls) record.latency += gap;
  record.chunks = static_cast<int>(itls.size()) + 1;
  record.itls = std::move(itls);
  record.prompt_tokens = 10;
  record.output_tokens = output_tokens;
  return record;
}

RunResult TwoRequests() {
  RunResult result;
  result.records = {Record(0, 0.1, {0.02, 0.02}, 5), Record(0.5, 0.3, {0.04}, 3)};
  result.duration = 2;
  result.max_in_flight = 2;
  return result;
}

TEST(ReportJson, VllmFields) {
  Options options;
  options.goodput.ttft = 200;
  const auto report = ReportJson(TwoRequests(), options, "m", {});
  EXPECT_EQ(report["completed"], 2);
  EXPECT_EQ(report["failed"], 0);
  EXPECT_EQ(report["total_input_tokens"], 20);
  EXPECT_EQ(report["total_output_tokens"], 8);
  EXPECT_DOUBLE_EQ(report["request_throughput"], 1);
  EXPECT_DOUBLE_EQ(report["request_goodput"], 0.5);
  EXPECT_DOUBLE_EQ(report["output_throughput"], 4);
  EXPECT_DOUBLE_EQ(report["total_token_throughput"], 14);
  EXPECT_DOUBLE_EQ(report["tokens_per_chunk"], 1.6);
  EXPECT_NEAR(report["mean_ttft_ms"].get<double>(), 200, 1e-9);
  EXPECT_NEAR(report["mean_tpot_ms"].get<double>(), (10 + 20) / 2.0, 1e-9);
  EXPECT_NEAR(report["mean_itl_ms"].get<double>(), 80 / 3.0, 1e-9);
  EXPECT_NEAR(report["p99_e2el_ms"].get<double>(), 338, 1e-6);
  EXPECT_NEAR(report["max_output_tokens_per_s"].get<double>(), 8, 1e-9);
  EXPECT_FALSE(report.contains("ttfts"));
  EXPECT_FALSE(report.contains("spec_decode_acceptance_rate"));
}

TEST(ReportJson, FailuresAndCancellationsStayOutOfTheLatencies) {
  RunResult result = TwoRequests();
  result.records[0].ok = false;
  result.records[0].error = "HTTP 503: full";
  result.records[1].ok = false;
  result.records[1].cancelled = true;
  const auto report = ReportJson(result, Options(), "m", {});
  EXPECT_EQ(report["completed"], 0);
  EXPECT_EQ(report["failed"], 1);
  EXPECT_EQ(report["cancelled"], 1);
  EXPECT_EQ(report["mean_ttft_ms"], 0);
  EXPECT_EQ(report["request_goodput"], nullptr);
  EXPECT_THAT(ReportTable(report, "ttft"), HasSubstr("HTTP 503: full"));
}

TEST(ReportJson, SlowReadersCountButTheirTimesDoNot) {
  RunResult result = TwoRequests();
  result.records[1].slow = true;
  const auto report = ReportJson(result, Options(), "m", {});
  EXPECT_EQ(report["completed"], 2);
  EXPECT_EQ(report["slow_readers"], 1);
  EXPECT_NEAR(report["mean_ttft_ms"].get<double>(), 100, 1e-9);
}

TEST(ReportJson, Speculation) {
  SpeculationCounters counters;
  counters.found = true;
  counters.drafts = 10;
  counters.draft_tokens = 40;
  counters.accepted_tokens = 20;
  counters.accepted_per_position = {9, 6};
  const auto report = ReportJson(TwoRequests(), Options(), "m", counters);
  EXPECT_DOUBLE_EQ(report["spec_decode_acceptance_rate"], 0.5);
  EXPECT_DOUBLE_EQ(report["spec_decode_acceptance_length"], 3);
  EXPECT_DOUBLE_EQ(report["spec_decode_per_position_acceptance_rates"][1], 0.6);
}

TEST(ReportJson, Detailed) {
  Options options;
  options.save_detailed = true;
  const auto report = ReportJson(TwoRequests(), options, "m", {});
  EXPECT_EQ(report["ttfts"].size(), 2u);
  EXPECT_EQ(report["itls"][0].size(), 2u);
}

TEST(Report, SaysWhenTheClientWasTheBottleneck) {
  RunResult result = TwoRequests();
  EXPECT_THAT(ReportTable(ReportJson(result, Options(), "m", {}), "ttft"), Not(HasSubstr("WARNING")));
  result.loop_lag_p99 = 0.5;
  const auto report = ReportJson(result, Options(), "m", {});
  EXPECT_THAT(ReportTable(report, "ttft"), HasSubstr("WARNING"));
  EXPECT_THAT(ReportHtml(report, result), HasSubstr("class='warn'"));
}

TEST(ReportHtml, IsSelfContainedAndEscapes) {
  const RunResult result = TwoRequests();
  const std::string html = ReportHtml(ReportJson(result, Options(), "<script>m", {}), result);
  EXPECT_THAT(html, HasSubstr("&lt;script&gt;m"));
  EXPECT_THAT(html, Not(HasSubstr("<script")));
  EXPECT_THAT(html, Not(HasSubstr("http")));
  EXPECT_THAT(html, HasSubstr("<polyline"));
}

TEST(ReportHtml, AnEmptyRunStillRenders) {
  const RunResult result;
  EXPECT_THAT(ReportHtml(ReportJson(result, Options(), "m", {}), result), HasSubstr("</html>"));
}

}  // namespace
}  // namespace linspec::loadtest
