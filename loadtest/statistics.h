// Percentiles and arrival times. Pure functions; any thread.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace linspec::loadtest {

// Linear interpolation between closest ranks (numpy's default). 0 for no values. percentile is in [0, 100].
double Percentile(std::span<const double> sorted, double percentile);

struct Summary {
  double mean = 0, median = 0, std = 0;  // population standard deviation, as numpy's
  std::vector<double> percentiles;       // one per requested percentile
};
Summary Summarize(std::vector<double> values, std::span<const double> percentiles);

// Gaps between arrivals at a mean rate: gamma distributed with shape `burstiness`; 1 is a Poisson process.
class ArrivalGenerator {
 public:
  ArrivalGenerator(double rate, double burstiness, uint64_t seed);
  // From here on, without a jump in time.
  void SetRate(double rate);
  double Next();  // seconds since the start; 0 for ever when the rate is infinite

 private:
  double time_ = 0, mean_gap_;  // mean gap 0: infinite rate
  std::mt19937_64 random_;
  std::gamma_distribution<double> gap_;
};

}  // namespace linspec::loadtest
