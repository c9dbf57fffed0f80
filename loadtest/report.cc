#include "loadtest/report.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <nlohmann/json.hpp>

#include "loadtest/statistics.h"

namespace linspec::loadtest {
namespace {

using Json = nlohmann::ordered_json;

struct Metric {
  const char* key;
  std::vector<double> seconds;
};

std::string PercentileName(double percentile) { return fmt::format("p{:g}", percentile); }

void AddMetric(const Metric& metric, const Options& options, Json* report) {
  const Summary summary = Summarize(metric.seconds, options.metric_percentiles);
  const auto add = [&](const std::string& what, double value) {
    (*report)[fmt::format("{}_{}_ms", what, metric.key)] = value * 1e3;
  };
  add("mean", summary.mean);
  add("median", summary.median);
  add("std", summary.std);
  for (size_t i = 0; i < options.metric_percentiles.size(); ++i) {
    add(PercentileName(options.metric_percentiles[i]), summary.percentiles[i]);
  }
}

bool MeetsGoodput(const RequestRecord& record, const Goodput& goodput) {
  return record.ttft * 1e3 <= goodput.ttft && record.tpot() * 1e3 <= goodput.tpot &&
         record.latency * 1e3 <= goodput.e2el;
}

// Most output tokens in any whole second.
double PeakTokensPerSecond(const RunResult& result) {
  std::vector<double> buckets(static_cast<size_t>(result.duration) + 2);
  for (const RequestRecord& record : result.records) {
    if (record.chunks == 0) continue;
    const double tokens_per_chunk = static_cast<double>(record.output_tokens) / record.chunks;
    double time = record.start + record.ttft;
    const auto add = [&] { buckets[std::min(static_cast<size_t>(time), buckets.size() - 1)] += tokens_per_chunk; };
    add();
    for (const double gap : record.itls) {
      time += gap;
      add();
    }
  }
  return *std::max_element(buckets.begin(), buckets.end());
}

void AddDetails(const RunResult& result, Json* report) {
  for (const char* key :
       {"input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "generated_texts", "errors"}) {
    (*report)[key] = Json::array();
  }
  for (const RequestRecord& record : result.records) {
    (*report)["input_lens"].push_back(record.prompt_tokens);
    (*report)["output_lens"].push_back(record.output_tokens);
    (*report)["ttfts"].push_back(record.ttft);
    (*report)["itls"].push_back(record.itls);
    (*report)["latencies"].push_back(record.latency);
    (*report)["start_times"].push_back(record.start);
    (*report)["generated_texts"].push_back(record.text);
    (*report)["errors"].push_back(record.error);
  }
}

void AddSpeculation(const SpeculationCounters& speculation, Json* report) {
  if (!speculation.found) return;
  const double drafts = std::max(speculation.drafts, 1.0);
  (*report)["spec_decode_num_drafts"] = speculation.drafts;
  (*report)["spec_decode_draft_tokens"] = speculation.draft_tokens;
  (*report)["spec_decode_accepted_tokens"] = speculation.accepted_tokens;
  (*report)["spec_decode_acceptance_rate"] = speculation.accepted_tokens / std::max(speculation.draft_tokens, 1.0);
  (*report)["spec_decode_acceptance_length"] = 1 + speculation.accepted_tokens / drafts;
  Json rates = Json::array();
  for (const double accepted : speculation.accepted_per_position) rates.push_back(accepted / drafts);
  (*report)["spec_decode_per_position_acceptance_rates"] = rates;
}

}  // namespace

Json ReportJson(const RunResult& result, const Options& options, const std::string& model,
                const SpeculationCounters& speculation) {
  Metric ttft{"ttft", {}}, tpot{"tpot", {}}, itl{"itl", {}}, e2el{"e2el", {}};
  int64_t completed = 0, failed = 0, cancelled = 0, slow = 0, good = 0, input = 0, output = 0, chunks = 0;
  std::string first_error;
  for (const RequestRecord& record : result.records) {
    if (record.cancelled) {
      ++cancelled;
      continue;
    }
    if (!record.ok) {
      if (failed++ == 0) first_error = record.error;
      continue;
    }
    ++completed;
    input += record.prompt_tokens;
    output += record.output_tokens;
    chunks += record.chunks;
    if (record.slow) {
      ++slow;
      continue;
    }
    ttft.seconds.push_back(record.ttft);
    e2el.seconds.push_back(record.latency);
    if (record.tpot() >= 0) tpot.seconds.push_back(record.tpot());
    itl.seconds.insert(itl.seconds.end(), record.itls.begin(), record.itls.end());
    if (MeetsGoodput(record, options.goodput)) ++good;
  }
  const double duration = std::max(result.duration, 1e-9);

  Json report;
  report["date"] = fmt::format("{:%Y%m%d-%H%M%S}", fmt::gmtime(std::time(nullptr)));
  report["endpoint_type"] = report["backend"] = options.backend;
  report["label"] = options.label;
  report["model_id"] = model;
  report["dataset"] = options.dataset_name;
  report["num_prompts"] = result.records.size();
  report["request_rate"] = std::isinf(options.request_rate) ? Json("inf") : Json(options.request_rate);
  report["burstiness"] = options.burstiness;
  report["max_concurrency"] = options.max_concurrency;
  report["seed"] = options.seed;
  report["goodput_ms"] = Json::object();  // the objectives
  for (const auto& [name, bound] : {std::pair("ttft", options.goodput.ttft), std::pair("tpot", options.goodput.tpot),
                                    std::pair("e2el", options.goodput.e2el)}) {
    if (std::isfinite(bound)) report["goodput_ms"][name] = bound;
  }
  report["duration"] = result.duration;
  report["completed"] = completed;
  report["failed"] = failed;
  report["cancelled"] = cancelled;
  report["slow_readers"] = slow;
  report["total_input_tokens"] = input;
  report["total_output_tokens"] = output;
  report["request_throughput"] = static_cast<double>(completed) / duration;
  report["request_goodput"] = options.goodput.any() ? Json(static_cast<double>(good) / duration) : Json(nullptr);
  report["output_throughput"] = static_cast<double>(output) / duration;
  report["total_token_throughput"] = static_cast<double>(input + output) / duration;
  report["max_output_tokens_per_s"] = PeakTokensPerSecond(result);
  report["max_concurrent_requests"] = result.max_in_flight;
  report["tokens_per_chunk"] = chunks > 0 ? static_cast<double>(output) / static_cast<double>(chunks) : 0.0;
  for (const Metric* metric : {&ttft, &tpot, &itl, &e2el}) AddMetric(*metric, options, &report);
  AddSpeculation(speculation, &report);
  report["client_loop_lag_p99_ms"] = result.loop_lag_p99 * 1e3;
  report["client_loop_lag_max_ms"] = result.loop_lag_max * 1e3;
  report["client_start_lateness_p99_ms"] = result.start_lateness_p99 * 1e3;
  report["client_cpu_per_thread"] = result.cpu_per_thread;
  report["client_was_bottleneck"] = result.client_was_bottleneck();
  report["interrupted"] = result.interrupted;
  report["first_error"] = first_error;
  if (options.save_detailed) AddDetails(result, &report);
  return report;
}

std::string ReportTable(const Json& report, std::string_view metrics) {
  std::string table;
  const auto number = [&](const char* key) { return report.at(key).get<double>(); };
  const auto row = [&](const char* label, const char* key, int digits) {
    table += fmt::format("{:<34}{:>12.{}f}\n", label, number(key), digits);
  };
  row("Successful requests", "completed", 0);
  row("Failed requests", "failed", 0);
  row("Cancelled by this client", "cancelled", 0);
  row("Slow readers (no latencies)", "slow_readers", 0);
  row("Duration (s)", "duration", 2);
  row("Prompt tokens", "total_input_tokens", 0);
  row("Output tokens", "total_output_tokens", 0);
  row("Request throughput (req/s)", "request_throughput", 2);
  if (!report.at("request_goodput").is_null()) row("Request goodput (req/s)", "request_goodput", 2);
  row("Output throughput (tok/s)", "output_throughput", 1);
  row("Peak output throughput (tok/s)", "max_output_tokens_per_s", 0);
  row("Most requests in flight", "max_concurrent_requests", 0);
  row("Tokens per chunk", "tokens_per_chunk", 2);
  for (const char* metric : {"ttft", "tpot", "itl", "e2el"}) {
    if (metrics.find(metric) == std::string_view::npos) continue;
    std::string name(metric);
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::toupper(c); });
    const std::string suffix = fmt::format("_{}_ms", metric);
    std::string cells;
    for (const auto& [key, value] : report.items()) {
      if (!key.ends_with(suffix) || key.starts_with("std") || !value.is_number()) continue;
      cells += fmt::format("  {} {:.2f}", key.substr(0, key.size() - suffix.size()), value.get<double>());
    }
    table += fmt::format("{:<10}{}\n", name + " (ms)", cells);
  }
  if (report.contains("spec_decode_acceptance_length")) {
    row("Draft tokens accepted (rate)", "spec_decode_acceptance_rate", 3);
    row("Tokens per verify of a draft", "spec_decode_acceptance_length", 2);
  }
  if (report.at("failed").get<int64_t>() > 0) {
    table += "First error: " + report.at("first_error").get<std::string>() + "\n";
  }
  if (report.at("client_was_bottleneck").get<bool>()) {
    table += fmt::format(
        "WARNING: this client was a bottleneck (event loops late by {:.0f} ms at p99 and busy {:.0f} % of the time, "
        "requests sent {:.0f} ms late at p99); the figures are not the server's alone. Use more --threads or another "
        "machine.\n",
        number("client_loop_lag_p99_ms"), number("client_cpu_per_thread") * 100,
        number("client_start_lateness_p99_ms"));
  }
  return table;
}

}  // namespace linspec::loadtest
