#include "scheduler/speculation_costs.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace linspec {
namespace {

// Weights of a new verify time: for the machine as a whole, and beyond that for steps of this size. One row has no weight of
// its own: it is what the others are measured by.
constexpr double kMachineSmoothing = 0.05, kSizeSmoothing = 0.02;
constexpr double kDraftSmoothing = 0.1;

void Smooth(double* average, double value, double weight) { *average += weight * (value - *average); }

int CeilLog2(int value) { return std::bit_width(static_cast<unsigned>(std::max(value, 1)) - 1); }

}  // namespace

void StepCosts::Calibrate(int rows, double seconds) {
  const int bucket = CeilLog2(rows);
  if (bucket >= kBuckets) return;
  seconds_[bucket] = seconds;
  known_ = std::max(known_, bucket + 1);
}

// Piecewise linear in the rows; never falling, because a dip is noise; beyond the last sample along the last segment.
double StepCosts::RowCost(double rows) const {
  if (known_ == 0) return 0;
  double low = seconds_[0];
  for (int b = 1; b < known_; ++b) {
    const double high = std::max(low, seconds_[b]);
    const double begin = std::ldexp(1.0, b - 1);
    if (rows <= 2 * begin || b == known_ - 1) return low + (high - low) * std::max(rows - begin, 0.0) / begin;
    low = high;
  }
  return low * std::max(rows, 1.0);  // one sample: assume the worst
}

double StepCosts::Estimate(double rows, int requests) const { return RowCost(rows) + per_request_ * (requests - 1); }

double StepCosts::Observe(int rows, int requests, double seconds) {
  const int bucket = CeilLog2(rows);
  if (known_ == 0 || bucket >= kBuckets) return 1;
  for (; known_ <= bucket; ++known_) {  // the estimate up to here becomes the sample it will be corrected from
    seconds_[known_] = RowCost(std::ldexp(1.0, known_));
  }
  const double expected = Estimate(rows, requests);
  if (expected <= 0) return 1;
  const double change = std::clamp(seconds / expected, 0.5, 2.0) - 1, machine = 1 + kMachineSmoothing * change;
  for (double& known : seconds_) known *= machine;
  per_request_ *= machine;
  if (bucket > 0) seconds_[bucket] *= 1 + kSizeSmoothing * change;
  return machine;
}

void DraftCosts::Observe(int contexts, int levels, int64_t catch_up_tokens, double seconds) {
  const int bucket = CeilLog2(contexts);
  if (bucket >= kBuckets) return;
  levels = std::max(levels, 1);
  if (catch_up_tokens > kLongCatchUp * contexts) {
    const double excess = std::max(seconds - PerLevel(contexts) * levels, 0.0) / static_cast<double>(catch_up_tokens);
    Smooth(&per_token_, excess, per_token_ == 0 ? 1 : kDraftSmoothing);
  } else {
    double* known = &per_level_[bucket];
    // A drafter may hide a long catch-up in an ordinary call: outliers count at most double.
    const double observed = *known == 0 ? seconds / levels : std::min(seconds / levels, 2 * *known);
    Smooth(known, observed, *known == 0 ? 1 : kDraftSmoothing);
  }
}

void DraftCosts::Scale(double factor) {
  for (double& known : per_level_) known *= factor;
  per_token_ *= factor;
}

double DraftCosts::PerLevel(int contexts) const {
  const int bucket = std::min(CeilLog2(contexts), kBuckets - 1);
  for (int b = bucket; b >= 0; --b) {  // fewer contexts measured: assume proportional, the worst
    if (per_level_[b] > 0) return std::ldexp(per_level_[b], bucket - b);
  }
  for (int b = bucket + 1; b < kBuckets; ++b) {
    if (per_level_[b] > 0) return per_level_[b];
  }
  return 0;
}

}  // namespace linspec
