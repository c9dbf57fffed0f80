#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "loadtest/report.h"
#include "loadtest/statistics.h"

namespace linspec::loadtest {
namespace {

struct Point {
  double x, y;
};
struct Series {
  std::string label, color;
  std::vector<Point> points;
};

constexpr double kWidth = 560, kHeight = 250, kLeft = 58, kRight = 14, kTop = 14, kBottom = 38;
constexpr int kMaxPoints = 400;  // per series: more cannot be seen and only swell the file

std::string Escape(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '&':
        out += "&amp;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

// A round number at or above value / steps: 1, 2 or 5 times a power of ten.
double NiceStep(double value, int steps) {
  if (!(value > 0)) return 1;
  const double raw = value / steps, power = std::pow(10, std::floor(std::log10(raw)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= raw) return factor * power;
  }
  return 10 * power;
}

std::string Chart(const std::string& title, const std::string& x_label, const std::string& y_label,
                  const std::vector<Series>& series, bool dots) {
  double x_max = 0, y_max = 0;
  for (const Series& line : series) {
    for (const Point& point : line.points) {
      x_max = std::max(x_max, point.x);
      y_max = std::max(y_max, point.y);
    }
  }
  const double x_step = NiceStep(x_max, 6), y_step = NiceStep(y_max, 4);
  x_max = std::max(x_step, std::ceil(x_max / x_step - 1e-9) * x_step);
  y_max = std::max(y_step, std::ceil(y_max / y_step - 1e-9) * y_step);
  const auto px = [&](double x) { return kLeft + x / x_max * (kWidth - kLeft - kRight); };
  const auto py = [&](double y) { return kHeight - kBottom - y / y_max * (kHeight - kTop - kBottom); };

  std::string svg =
      fmt::format("<figure><figcaption>{}</figcaption><svg viewBox='0 0 {} {}' role='img'>", title, kWidth, kHeight);
  for (double y = 0; y <= y_max + y_step / 2; y += y_step) {
    svg += fmt::format(
        "<line class='grid' x1='{:.1f}' x2='{:.1f}' y1='{:.1f}' y2='{:.1f}'/>"
        "<text x='{:.1f}' y='{:.1f}' text-anchor='end'>{:g}</text>",
        kLeft, kWidth - kRight, py(y), py(y), kLeft - 6, py(y) + 4, y);
  }
  for (double x = 0; x <= x_max + x_step / 2; x += x_step) {
    svg +=
        fmt::format("<text x='{:.1f}' y='{:.1f}' text-anchor='middle'>{:g}</text>", px(x), kHeight - kBottom + 16, x);
  }
  svg += fmt::format("<text x='{:.1f}' y='{:.1f}' text-anchor='middle'>{}</text>", (kLeft + kWidth - kRight) / 2,
                     kHeight - 6, x_label);
  svg += fmt::format("<text transform='translate(13,{:.1f}) rotate(-90)' text-anchor='middle'>{}</text>",
                     (kTop + kHeight - kBottom) / 2, y_label);
  double legend = kLeft + 10;
  for (const Series& line : series) {
    if (dots) {
      for (const Point& point : line.points) {
        svg += fmt::format("<circle cx='{:.1f}' cy='{:.1f}' r='2.2' fill='{}'/>", px(point.x), py(point.y), line.color);
      }
    } else {
      svg += fmt::format("<polyline fill='none' stroke='{}' stroke-width='2' points='", line.color);
      for (const Point& point : line.points) svg += fmt::format("{:.1f},{:.1f} ", px(point.x), py(point.y));
      svg += "'/>";
    }
    if (series.size() > 1) {
      svg += fmt::format(
          "<rect x='{0:.1f}' y='{1:.1f}' width='10' height='10' fill='{2}'/>"
          "<text x='{3:.1f}' y='{4:.1f}'>{5}</text>",
          legend, kTop, line.color, legend + 14, kTop + 9, line.label);
      legend += 26 + 8.0 * static_cast<double>(line.label.size());
    }
  }
  return svg + "</svg></figure>\n";
}

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
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
       max-width: 1200px; padding: 28px 20px; }
h1 { font-size: 22px; margin: 0 0 2px; } p.sub { color: var(--soft); margin: 0 0 20px; }
.warn { background: #b3261e; color: #fff; padding: 10px 14px; border-radius: 8px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-bottom: 16px; }
.tile, figure, table { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 10px 14px; } .tile b { display: block; font-size: 22px; } .tile span { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 16px; margin: 16px 0; }
figure { margin: 0; padding: 12px 14px; } figcaption { font-weight: 600; margin-bottom: 4px; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); } .grid { stroke: var(--line); }
table { border-collapse: collapse; width: 100%; } td, th { padding: 6px 12px; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr + tr td { border-top: 1px solid var(--line); }
)";

std::string Tile(const std::string& label, const std::string& value) {
  return fmt::format("<div class='tile'><b>{}</b><span>{}</span></div>", value, label);
}

std::string LatencyTable(const nlohmann::ordered_json& report) {
  std::string head = "<tr><th>milliseconds</th>", body;
  for (const char* metric : {"ttft", "tpot", "itl", "e2el"}) {
    const std::string suffix = fmt::format("_{}_ms", metric);
    std::string cells;
    for (const auto& [key, value] : report.items()) {
      if (!key.ends_with(suffix) || !value.is_number()) continue;
      cells += fmt::format("<td>{:.2f}</td>", value.get<double>());
      if (metric == std::string_view("ttft")) {
        head += fmt::format("<th>{}</th>", key.substr(0, key.size() - suffix.size()));
      }
    }
    body += fmt::format("<tr><td>{}</td>{}</tr>", metric, cells);
  }
  return fmt::format("<table>{}</tr>{}</table>", head, body);
}

}  // namespace

std::string ReportHtml(const nlohmann::ordered_json& report, const RunResult& result) {
  std::vector<double> ttft, tpot, itl, e2el;
  Series arrivals{"TTFT", "#2f6fde", {}}, tokens{"tokens", "#1f9d63", {}}, flight{"in flight", "#c2571a", {}};
  const size_t stride = result.records.size() / (4 * kMaxPoints) + 1;
  for (size_t i = 0; i < result.records.size(); ++i) {
    const RequestRecord& record = result.records[i];
    if (!record.ok || record.slow) continue;
    ttft.push_back(record.ttft);
    e2el.push_back(record.latency);
    if (record.tpot() >= 0) tpot.push_back(record.tpot());
    itl.insert(itl.end(), record.itls.begin(), record.itls.end());
    if (i % stride == 0) arrivals.points.push_back({record.start, record.ttft * 1e3});
  }
  Timeline(result, &tokens, &flight);

  const auto number = [&](const char* key) { return report.at(key).get<double>(); };
  std::string html = fmt::format(
      "<!doctype html><html lang='en'><meta charset='utf-8'><title>linspec loadtest</title>"
      "<meta name='viewport' content='width=device-width'><style>{}</style>",
      kStyle);
  html += fmt::format(
      "<h1>Load test of {}</h1><p class='sub'>{} requests, rate {}, burstiness {}, max concurrency {}, "
      "dataset {}, seed {}, {:.1f} s</p>",
      Escape(report.at("model_id").get<std::string>()), report.at("num_prompts").dump(),
      Escape(report.at("request_rate").dump()), report.at("burstiness").dump(), report.at("max_concurrency").dump(),
      Escape(report.at("dataset").get<std::string>()), report.at("seed").dump(), number("duration"));
  if (result.client_was_bottleneck()) {
    html += "<p class='warn'>The client itself was a bottleneck: these figures are not the server's alone.</p>";
  }
  html += "<div class='tiles'>";
  html += Tile("requests completed", report.at("completed").dump());
  html += Tile("failed", report.at("failed").dump());
  html += Tile("output tokens/s", fmt::format("{:.0f}", number("output_throughput")));
  html += Tile("median TTFT, ms", fmt::format("{:.1f}", number("median_ttft_ms")));
  html += Tile("median TPOT, ms", fmt::format("{:.2f}", number("median_tpot_ms")));
  html += Tile("tokens per chunk", fmt::format("{:.2f}", number("tokens_per_chunk")));
  if (!report.at("request_goodput").is_null())
    html += Tile("goodput, req/s", fmt::format("{:.2f}", number("request_goodput")));
  if (report.contains("spec_decode_acceptance_length")) {
    html += Tile("tokens per verified draft", fmt::format("{:.2f}", number("spec_decode_acceptance_length")));
  }
  html += "</div>" + LatencyTable(report) + "<div class='charts'>";
  html += Chart("Time to first token", "ms", "% of requests", {Distribution("TTFT", "#2f6fde", ttft)}, false);
  html += Chart("Time per output token, gaps between chunks", "ms", "% at or below",
                {Distribution("TPOT", "#2f6fde", tpot), Distribution("ITL", "#c2571a", itl)}, false);
  html += Chart("End-to-end latency", "ms", "% of requests", {Distribution("E2E", "#2f6fde", e2el)}, false);
  html += Chart("Output tokens per second", "seconds", "tokens/s", {tokens}, false);
  html += Chart("Requests in flight", "seconds", "requests", {flight}, false);
  html += Chart("Time to first token by start time", "seconds", "ms", {arrivals}, true);
  return html + "</div></html>\n";
}

}  // namespace linspec::loadtest
