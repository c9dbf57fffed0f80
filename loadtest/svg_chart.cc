#include "loadtest/svg_chart.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace linspec::loadtest {
namespace {

constexpr double kWidth = 560, kHeight = 250, kLeft = 58, kRight = 16, kTop = 18, kBottom = 40;

// A round number at or above value / steps: 1, 2 or 5 times a power of ten.
double NiceStep(double value, int steps) {
  if (!(value > 0)) return 1;
  const double raw = value / steps, power = std::pow(10, std::floor(std::log10(raw)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= raw) return factor * power;
  }
  return 10 * power;
}

struct Axes {
  double x_min = 0, x_max = 1, y_max = 1;
  bool log_x = false;
  std::vector<double> x_ticks, y_ticks;

  double X(double x) const {
    const double share =
        log_x ? (std::log10(std::max(x, x_min)) - std::log10(x_min)) / (std::log10(x_max) - std::log10(x_min))
              : (x - x_min) / (x_max - x_min);
    return kLeft + share * (kWidth - kLeft - kRight);
  }
  double Y(double y) const { return kHeight - kBottom - y / y_max * (kHeight - kTop - kBottom); }
};

void LogTicks(double low, double high, Axes* axes) {
  axes->log_x = true;
  axes->x_min = low;
  axes->x_max = std::max(high, low * 1.0001);
  const bool few = axes->x_max / axes->x_min < 200;  // 1-2-5 up to about two decades, then tens only
  for (double power = std::pow(10, std::floor(std::log10(low))); power <= axes->x_max; power *= 10) {
    for (const double factor : {1.0, 2.0, 5.0}) {
      const double tick = factor * power;
      if (tick >= axes->x_min * 0.999 && tick <= axes->x_max * 1.001 && (few || factor == 1))
        axes->x_ticks.push_back(tick);
    }
  }
}

Axes MakeAxes(const Chart& chart) {
  double x_low = std::numeric_limits<double>::infinity(), x_high = 0, y_high = 0;
  for (const Series& series : chart.series) {
    for (const Point& point : series.points) {
      if (point.x > 0) x_low = std::min(x_low, point.x);
      x_high = std::max(x_high, point.x);
      y_high = std::max(y_high, point.y);
    }
  }
  Axes axes;
  if (chart.log_x && x_high > 0) {
    LogTicks(x_low * 0.8, x_high * 1.2, &axes);
  } else {
    const double step = NiceStep(x_high, 6);
    axes.x_max = std::max(step, std::ceil(x_high / step - 1e-9) * step);
    for (double x = 0; x <= axes.x_max + step / 2; x += step) axes.x_ticks.push_back(x);
  }
  const double step = NiceStep(chart.y_max > 0 ? chart.y_max : y_high, 4);
  axes.y_max = chart.y_max > 0 ? chart.y_max : std::max(step, std::ceil(y_high / step - 1e-9) * step);
  for (double y = 0; y <= axes.y_max + step / 1000; y += step) axes.y_ticks.push_back(y);
  return axes;
}

std::string Frame(const Chart& chart, const Axes& axes) {
  std::string svg;
  for (const double y : axes.y_ticks) {
    svg += fmt::format(
        "<line class='grid' x1='{:.1f}' x2='{:.1f}' y1='{:.1f}' y2='{:.1f}'/>"
        "<text x='{:.1f}' y='{:.1f}' text-anchor='end'>{:g}</text>",
        kLeft, kWidth - kRight, axes.Y(y), axes.Y(y), kLeft - 6, axes.Y(y) + 4, y);
  }
  for (const double x : axes.x_ticks) {
    svg += fmt::format(
        "<line class='grid' x1='{0:.1f}' x2='{0:.1f}' y1='{1:.1f}' y2='{2:.1f}'/>"
        "<text x='{0:.1f}' y='{3:.1f}' text-anchor='middle'>{4:g}</text>",
        axes.X(x), kHeight - kBottom, kHeight - kBottom + 4, kHeight - kBottom + 16, x);
  }
  svg += fmt::format("<text x='{:.1f}' y='{:.1f}' text-anchor='middle'>{}</text>", (kLeft + kWidth - kRight) / 2,
                     kHeight - 6, chart.x_label);
  svg += fmt::format("<text transform='translate(13,{:.1f}) rotate(-90)' text-anchor='middle'>{}</text>",
                     (kTop + kHeight - kBottom) / 2, chart.y_label);
  return svg;
}

std::string Draw(const Series& series, const Axes& axes) {
  std::string svg;
  if (series.mark == Series::Mark::kDots) {
    for (const Point& point : series.points) {
      svg += fmt::format("<circle cx='{:.1f}' cy='{:.1f}' r='2.4' fill='{}' fill-opacity='.7'/>", axes.X(point.x),
                         axes.Y(point.y), series.color);
    }
    return svg;
  }
  if (series.mark == Series::Mark::kBars) {
    for (const Point& point : series.points) {
      const double left = axes.X(point.x - 0.35), right = axes.X(point.x + 0.35), top = axes.Y(point.y);
      svg += fmt::format("<rect x='{:.1f}' y='{:.1f}' width='{:.1f}' height='{:.1f}' rx='2' fill='{}'/>", left, top,
                         right - left, axes.Y(0) - top, series.color);
      svg += fmt::format("<text x='{:.1f}' y='{:.1f}' text-anchor='middle'>{:.0f}</text>", (left + right) / 2, top - 4,
                         point.y);
    }
    return svg;
  }
  std::string line;
  for (const Point& point : series.points) line += fmt::format("{:.1f},{:.1f} ", axes.X(point.x), axes.Y(point.y));
  if (series.mark == Series::Mark::kArea && !series.points.empty()) {
    svg += fmt::format("<polygon fill='{}' fill-opacity='.15' points='{:.1f},{:.1f} {}{:.1f},{:.1f}'/>", series.color,
                       axes.X(series.points.front().x), axes.Y(0), line, axes.X(series.points.back().x), axes.Y(0));
  }
  svg += fmt::format("<polyline fill='none' stroke='{}' stroke-width='1.8' stroke-linejoin='round' points='{}'/>",
                     series.color, line);
  return svg;
}

std::string DrawMarkers(const Chart& chart, const Axes& axes) {
  std::string svg;
  double last = -100;  // labels that would touch go one line down
  int row = 0;
  std::vector<Marker> markers = chart.markers;
  std::sort(markers.begin(), markers.end(), [](const Marker& a, const Marker& b) { return a.x < b.x; });
  for (const Marker& marker : markers) {
    if (!(marker.x > 0 && marker.x <= axes.x_max)) continue;
    const double x = axes.X(marker.x);
    row = x - last < 34 ? (row + 1) % 3 : 0;
    last = x;
    svg += fmt::format(
        "<line stroke='{0}' stroke-dasharray='3 3' x1='{1:.1f}' x2='{1:.1f}' y1='{2:.1f}' y2='{3:.1f}'/>"
        "<text x='{4:.1f}' y='{5:.1f}' style='fill:{0}'>{6}</text>",
        marker.color, x, kTop - 4, kHeight - kBottom, x + 3, kTop + 4 + 12 * row, marker.label);
  }
  return svg;
}

}  // namespace

std::string EscapeHtml(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (c == '&')
      out += "&amp;";
    else if (c == '"')
      out += "&quot;";
    else
      out += c;
  }
  return out;
}

std::string RenderChart(const Chart& chart) {
  const Axes axes = MakeAxes(chart);
  std::string html = fmt::format("<figure><figcaption>{}", chart.title);
  if (chart.series.size() > 1) {
    for (const Series& series : chart.series)
      html += fmt::format("<i style='background:{}'></i><small>{}</small>", series.color, series.label);
  }
  html += fmt::format("</figcaption><p class='note'>{}</p><svg viewBox='0 0 {} {}' role='img'>", chart.note, kWidth,
                      kHeight);
  html += Frame(chart, axes);
  for (const Series& series : chart.series) html += Draw(series, axes);
  return html + DrawMarkers(chart, axes) + "</svg></figure>\n";
}

}  // namespace linspec::loadtest
