#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

#include "loadtest/report.h"
#include "loadtest/statistics.h"
#include "loadtest/svg_chart.h"

namespace linspec::loadtest {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kMaxPoints = 400;  // per series: more cannot be seen and only swell the file
constexpr char kBlue[] = "#2f6fde", kOrange[] = "#d2691e", kGreen[] = "#1f9d63", kRed[] = "#c62828",
               kGrey[] = "#8492a1";

// Share of values at or below x, as at most kMaxPoints points.
Series Distribution(std::string label, std::string color, std::vector<double> seconds) {
  Series series{std::move(label), std::move(color), {}};
  std::sort(seconds.begin(), seconds.end());
  const size_t count = std::min<size_t>(seconds.size(), kMaxPoints);
  for (size_t i = 0; i < count; ++i) {
    const double percent = count == 1 ? 100 : 100.0 * static_cast<double>(i) / static_cast<double>(count - 1);
    series.points.push_back({Percentile(seconds, percent) * 1e3, percent});
  }
  return series;
}

// Tokens per second and streams in flight over the run.
void Timeline(const RunResult& result, Series* tokens, Series* in_flight) {
  const double width = std::max(result.duration / 120, 0.05);
  std::vector<double> token_bins(static_cast<size_t>(result.duration / width) + 1), flight_bins(token_bins.size());
  const auto bin = [&](double time) { return std::min(static_cast<size_t>(time / width), token_bins.size() - 1); };
  for (const RequestRecord& record : result.records) {
    for (size_t i = bin(record.start); i <= bin(record.start + record.latency); ++i) flight_bins[i] += 1;
    if (record.chunks == 0) continue;
    const double per_chunk = static_cast<double>(record.output_tokens) / record.chunks;
    double time = record.start + record.ttft;
    token_bins[bin(time)] += per_chunk;
    for (const double gap : record.itls) token_bins[bin(time += gap)] += per_chunk;
  }
  for (size_t i = 0; i < token_bins.size(); ++i) {
    const double time = (static_cast<double>(i) + 0.5) * width;
    tokens->points.push_back({time, token_bins[i] / width});
    in_flight->points.push_back({time, flight_bins[i]});
  }
}

constexpr std::string_view kStyle = R"(
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5c6b7a; --line: #dde3ea; --card: #fff; --page: #f4f6f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf1; --soft: #9aa7b5; --line: #2c3743; --card: #18212b; --page: #10161d; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
       max-width: 1240px; padding: 28px 20px 40px; }
h1 { font-size: 22px; margin: 0 0 2px; } p.sub { color: var(--soft); margin: 0 0 20px; }
.warn { background: #b3261e; color: #fff; padding: 10px 14px; border-radius: 8px; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin-bottom: 16px; }
@media (max-width: 760px) { .tiles { grid-template-columns: repeat(2, 1fr); } }
.tile, figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 10px 14px; } .tile b { font-size: 22px; } .tile em { font-style: normal; color: var(--soft); }
.tile span { display: block; color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 16px; margin: 16px 0; }
figure { margin: 0; padding: 12px 14px 6px; } figcaption { font-weight: 600; }
figcaption i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 5px 0 14px; }
figcaption small { color: var(--soft); font-weight: 400; } p.note { color: var(--soft); font-size: 12px; margin: 0; min-height: 18px; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 11px; fill: var(--soft); } .grid { stroke: var(--line); }
.card { overflow: hidden; margin-bottom: 16px; } table { border-collapse: collapse; width: 100%; }
td, th { padding: 7px 14px; text-align: right; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; font-size: 13px; } th:first-child, td:first-child { text-align: left; }
tr + tr td { border-top: 1px solid var(--line); } footer { color: var(--soft); font-size: 13px; }
)";

std::string Tile(const std::string& label, const std::string& value, const std::string& more = "") {
  return fmt::format("<div class='tile'><b>{}</b> <em>{}</em><span>{}</span></div>", value, more, label);
}

std::string Tiles(const Json& report) {
  const auto number = [&](const char* key) { return report.at(key).get<double>(); };
  const auto tail = [&](const char* metric) {
    const std::string key = fmt::format("p99_{}_ms", metric);
    return report.contains(key) ? fmt::format("p99 {:.1f}", report.at(key).get<double>()) : std::string();
  };
  std::string html = "<div class='tiles'>";
  html +=
      Tile("requests completed", report.at("completed").dump(), fmt::format("{} failed", report.at("failed").dump()));
  html += Tile("output tokens per second", fmt::format("{:.0f}", number("output_throughput")),
               fmt::format("peak {:.0f}", number("max_output_tokens_per_s")));
  html += Tile("time to first token, median ms", fmt::format("{:.1f}", number("median_ttft_ms")), tail("ttft"));
  html += Tile("time per output token, median ms", fmt::format("{:.2f}", number("median_tpot_ms")), tail("tpot"));
  html += Tile("end to end, median ms", fmt::format("{:.0f}", number("median_e2el_ms")), tail("e2el"));
  html += Tile("tokens per chunk", fmt::format("{:.2f}", number("tokens_per_chunk")));
  if (report.at("request_goodput").is_null()) {
    html += Tile("requests per second", fmt::format("{:.2f}", number("request_throughput")));
  } else {
    html += Tile("requests per second within the objectives", fmt::format("{:.2f}", number("request_goodput")),
                 fmt::format("of {:.2f}", number("request_throughput")));
  }
  if (report.contains("spec_decode_acceptance_length")) {
    html += Tile("tokens per verified draft", fmt::format("{:.2f}", number("spec_decode_acceptance_length")),
                 fmt::format("{:.0f} % accepted", number("spec_decode_acceptance_rate") * 100));
  } else {
    html += Tile("most requests in flight", report.at("max_concurrent_requests").dump());
  }
  return html + "</div>";
}

std::string LatencyTable(const Json& report) {
  const std::pair<const char*, const char*> rows[] = {{"ttft", "Time to first token"},
                                                      {"tpot", "Time per output token after the first"},
                                                      {"itl", "Gap between chunks"},
                                                      {"e2el", "End to end"}};
  std::string head = "<tr><th>milliseconds</th>", body;
  for (const auto& [metric, name] : rows) {
    const std::string suffix = fmt::format("_{}_ms", metric);
    std::string cells;
    for (const auto& [key, value] : report.items()) {
      if (!key.ends_with(suffix) || !value.is_number()) continue;
      const std::string column = key.substr(0, key.size() - suffix.size());
      if (column == "median" && report.contains("p50" + suffix)) continue;  // the same number twice
      cells += fmt::format("<td>{:.2f}</td>", value.get<double>());
      if (metric == rows[0].first) head += fmt::format("<th>{}</th>", column);
    }
    body += fmt::format("<tr><td>{}</td>{}</tr>", name, cells);
  }
  return fmt::format("<div class='card'><table>{}</tr>{}</table></div>", head, body);
}

// What went wrong, most frequent first.
std::string ErrorTable(const RunResult& result) {
  std::map<std::string, int> counts;
  for (const RequestRecord& record : result.records) {
    if (!record.ok && !record.cancelled) ++counts[record.error];
  }
  if (counts.empty()) return "";
  std::vector<std::pair<std::string, int>> errors(counts.begin(), counts.end());
  std::stable_sort(errors.begin(), errors.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
  std::string html = "<div class='card'><table><tr><th>failed with</th><th>requests</th></tr>";
  for (size_t i = 0; i < std::min<size_t>(errors.size(), 10); ++i) {
    html += fmt::format("<tr><td>{}</td><td>{}</td></tr>", EscapeHtml(errors[i].first), errors[i].second);
  }
  return html + "</table></div>";
}

struct Latencies {
  std::vector<double> ttft, tpot, itl, e2el;
  Series starts{"answered", kBlue, {}, Series::Mark::kDots}, failures{"failed", kRed, {}, Series::Mark::kDots};
};

Latencies Collect(const RunResult& result) {
  Latencies all;
  const size_t stride = result.records.size() / (4 * kMaxPoints) + 1;
  for (size_t i = 0; i < result.records.size(); ++i) {
    const RequestRecord& record = result.records[i];
    if (!record.ok && !record.cancelled && all.failures.points.size() < kMaxPoints) {
      all.failures.points.push_back({record.start, 0});
    }
    if (!record.ok || record.slow) continue;
    all.ttft.push_back(record.ttft);
    all.e2el.push_back(record.latency);
    if (record.tpot() >= 0) all.tpot.push_back(record.tpot());
    all.itl.insert(all.itl.end(), record.itls.begin(), record.itls.end());
    if (i % stride == 0) all.starts.points.push_back({record.start, record.ttft * 1e3});
  }
  return all;
}

Chart DistributionChart(const Json& report, const char* metric, const char* title, std::vector<Series> series) {
  Chart chart{.title = title,
              .note = "share of requests at or below, logarithmic time",
              .x_label = "ms",
              .y_label = "%",
              .series = std::move(series),
              .log_x = true,
              .y_max = 100};
  for (const char* percentile : {"p50", "p95", "p99"}) {
    const std::string key = fmt::format("{}_{}_ms", percentile, metric);
    if (report.contains(key)) chart.markers.push_back({report.at(key).get<double>(), percentile, kGrey});
  }
  const auto& goals = report.at("goodput_ms");
  if (goals.contains(metric)) chart.markers.push_back({goals.at(metric).get<double>(), "goal", kRed});
  return chart;
}

std::string Charts(const Json& report, const RunResult& result) {
  Latencies all = Collect(result);
  Series tokens{"tokens", kGreen, {}, Series::Mark::kArea}, flight{"in flight", kOrange, {}, Series::Mark::kArea};
  Timeline(result, &tokens, &flight);
  std::vector<Series> starts = {all.starts};
  if (!all.failures.points.empty()) starts.push_back(all.failures);
  std::string html = "<div class='charts'>";
  html +=
      RenderChart(DistributionChart(report, "ttft", "Time to first token", {Distribution("TTFT", kBlue, all.ttft)}));
  html += RenderChart(DistributionChart(
      report, "tpot", "Time per output token",
      {Distribution("per token", kBlue, all.tpot), Distribution("gaps between chunks", kOrange, all.itl)}));
  html += RenderChart(DistributionChart(report, "e2el", "End to end", {Distribution("E2E", kBlue, all.e2el)}));
  html += RenderChart({.title = "Time to first token over the run",
                       .note = "one dot a request, at the time it was sent",
                       .x_label = "seconds",
                       .y_label = "ms",
                       .series = starts});
  html += RenderChart({.title = "Output tokens per second",
                       .note = "",
                       .x_label = "seconds",
                       .y_label = "tokens/s",
                       .series = {tokens}});
  html += RenderChart(
      {.title = "Requests in flight", .note = "", .x_label = "seconds", .y_label = "requests", .series = {flight}});
  if (report.contains("spec_decode_per_position_acceptance_rates")) {
    Series rates{"accepted", kGreen, {}, Series::Mark::kBars};
    double depth = 1;
    for (const Json& rate : report.at("spec_decode_per_position_acceptance_rates")) {
      if (rate.get<double>() > 0) rates.points.push_back({depth, rate.get<double>() * 100});
      depth += 1;
    }
    if (!rates.points.empty()) {
      html += RenderChart({.title = "Drafts accepted at least so deep",
                           .note = "of all verified drafts",
                           .x_label = "depth in the draft tree",
                           .y_label = "%",
                           .series = {rates},
                           .y_max = 100});
    }
  }
  return html + "</div>";
}

}  // namespace

std::string ReportHtml(const Json& report, const RunResult& result) {
  const auto number = [&](const char* key) { return report.at(key).get<double>(); };
  const auto text = [&](const char* key) { return EscapeHtml(report.at(key).get<std::string>()); };
  const std::string rate = report.at("request_rate").is_string()
                               ? "all at once"
                               : fmt::format("{:g} requests/s arriving", report.at("request_rate").get<double>());
  std::string html = fmt::format(
      "<!doctype html><html lang='en'><meta charset='utf-8'><title>Load test of {0}</title>"
      "<meta name='viewport' content='width=device-width'><style>{1}</style>"
      "<h1>Load test of {0}</h1><p class='sub'>{2}{3}{4} requests of dataset {5}, {6} (burstiness {7}), {8}, seed {9}, "
      "{10:.1f} s"
      "</p>",
      text("model_id"), kStyle, text("label"), text("label").empty() ? "" : ": ", report.at("num_prompts").dump(),
      text("dataset"), rate, report.at("burstiness").dump(),
      report.at("max_concurrency") == 0 ? std::string("no limit in flight")
                                        : "at most " + report.at("max_concurrency").dump() + " in flight",
      report.at("seed").dump(), number("duration"));
  if (result.client_was_bottleneck()) {
    html += "<p class='warn'>The client itself was a bottleneck: these figures are not the server's alone.</p>";
  }
  html += Tiles(report) + LatencyTable(report) + ErrorTable(result) + Charts(report, result);
  html += fmt::format(
      "<footer>{} UTC. Slow readers ({}) and requests cancelled by the client ({}) are not in the latencies. Client: "
      "event "
      "loops late by {:.1f} ms at p99, {:.0f} % busy.</footer></html>\n",
      text("date"), report.at("slow_readers").dump(), report.at("cancelled").dump(), number("client_loop_lag_p99_ms"),
      number("client_cpu_per_thread") * 100);
  return html;
}

}  // namespace linspec::loadtest
