#include "loadtest/statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace linspec::loadtest {

double Percentile(std::span<const double> sorted, double percentile) {
  if (sorted.empty()) return 0;
  const double rank = percentile / 100 * static_cast<double>(sorted.size() - 1);
  const size_t below = static_cast<size_t>(std::floor(rank));
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (rank - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

Summary Summarize(std::vector<double> values, std::span<const double> percentiles) {
  Summary summary;
  summary.percentiles.assign(percentiles.size(), 0);
  if (values.empty()) return summary;
  std::sort(values.begin(), values.end());
  const double count = static_cast<double>(values.size());
  summary.mean = std::accumulate(values.begin(), values.end(), 0.0) / count;
  double squares = 0;
  for (const double value : values) squares += (value - summary.mean) * (value - summary.mean);
  summary.std = std::sqrt(squares / count);
  summary.median = Percentile(values, 50);
  for (size_t i = 0; i < percentiles.size(); ++i) summary.percentiles[i] = Percentile(values, percentiles[i]);
  return summary;
}

ArrivalGenerator::ArrivalGenerator(double rate, double burstiness, uint64_t seed)
    : mean_gap_(1 / rate), random_(seed), gap_(burstiness, 1 / burstiness) {}

void ArrivalGenerator::SetRate(double rate) { mean_gap_ = 1 / rate; }

double ArrivalGenerator::Next() { return time_ += mean_gap_ * gap_(random_); }

}  // namespace linspec::loadtest
