// Plots as SVG figures for the HTML report. Pure functions.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace linspec::loadtest {

struct Point {
  double x, y;
};

struct Series {
  enum class Mark { kLine, kArea, kDots, kBars };
  std::string label, color;
  std::vector<Point> points;
  Mark mark = Mark::kLine;
};

struct Marker {  // a labelled vertical line
  double x;
  std::string label, color;
};

struct Chart {
  std::string title, note, x_label, y_label;
  std::vector<Series> series = {};
  std::vector<Marker> markers = {};
  bool log_x = false;  // from the smallest positive x of a point
  double y_max = 0;    // 0: the largest y, rounded up
};

std::string RenderChart(const Chart& chart);
std::string EscapeHtml(std::string_view text);

}  // namespace linspec::loadtest
