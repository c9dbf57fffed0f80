#include "scheduler/speculation_costs.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace linspec {
namespace {

constexpr double Squared(double x) { return x * x; }

// Standard deviations of logarithms: of a calibrated ratio, and of what one step changes.
constexpr double kUnsureSize = 0.1, kMachineDrift = 0.005, kSizeDrift = 0.0005;
constexpr double kUnsureMachine = 0.2;  // after long absence
constexpr double kLeastNoise = 0.02, kMostNoise = 0.2, kNoiseSmoothing = 0.01;
constexpr double kOutlier = 2.5;  // standard deviations that a surprise counts at most: interruptions say nothing
constexpr double kDraftSmoothing = 0.1, kAheadSmoothing = 0.05;
constexpr double kLeastRatio = 0.3, kMostRatio = 1.5;  // beyond, something else was in the way

int CeilLog2(int value) { return std::bit_width(static_cast<unsigned>(std::max(value, 1)) - 1); }

}  // namespace

void StepCosts::Calibrate(int rows, double seconds) {
  const int bucket = CeilLog2(rows);
  if (bucket >= kBuckets) return;
  prior_[bucket] = seconds;
  known_ = std::max(known_, bucket + 1);
}

// Piecewise linear in the rows; never falling, because a dip is noise; beyond the last sample along the last segment.
double StepCosts::Prior(double rows, int requests) const {
  const double others = per_request_ * (requests - 1);
  double low = prior_[0];
  for (int b = 1; b < known_; ++b) {
    const double high = std::max(low, prior_[b]);
    const double begin = std::ldexp(1.0, b - 1);
    if (rows <= 2 * begin || b == known_ - 1) return others + low + (high - low) * std::max(rows - begin, 0.0) / begin;
    low = high;
  }
  return others + low * std::max(rows, 1.0);  // one sample: assume the worst
}

StepCosts::Vector StepCosts::Weights(double rows, int requests) {
  Vector weights{};
  weights[0] = 1;
  if (rows <= requests) return weights;
  const double size = std::min(std::log2(rows / requests), kSizes - 1.0);
  const int below = static_cast<int>(size);
  weights[1 + below] = 1 - (size - below);
  if (below + 1 < kSizes) weights[2 + below] = size - below;
  return weights;
}

double StepCosts::Estimate(double rows, int requests) const {
  if (known_ == 0) return 0;
  const Filter& filter = filters_[std::min(CeilLog2(requests), kBuckets - 1)];
  const double prior = Prior(rows, requests), plain = Prior(requests, requests);
  if (filter.step < 0) return prior * std::exp(machine_);
  const Vector weights = Weights(rows, requests);
  double size = 0;
  for (int i = 1; i < kStates; ++i) size += weights[i] * filter.mean[i];
  return std::max(prior * std::exp(size), plain) * std::exp(filter.mean[0]);
}

// What may have changed since the filter was used.
void StepCosts::Advance(Filter* filter) {
  if (filter->step < 0) {
    filter->mean[0] = machine_;
    for (int i = 0; i < kStates; ++i) filter->covariance[i][i] = Squared(kUnsureSize);
  } else {
    const auto steps = static_cast<double>(step_ - filter->step);
    for (int i = 0; i < kStates; ++i) {
      double& variance = filter->covariance[i][i];
      const double drift = Squared(i == 0 ? kMachineDrift : kSizeDrift);
      const double most = Squared(i == 0 ? kUnsureMachine : kUnsureSize);
      variance = std::max(variance, std::min(variance + steps * drift, most));
    }
  }
  filter->step = step_;
}

double StepCosts::Observe(int rows, int requests, double seconds) {
  const int bucket = CeilLog2(requests);
  if (known_ == 0 || bucket >= kBuckets || !(seconds > 0)) return 1;
  ++step_;
  Filter& filter = filters_[bucket];
  Advance(&filter);
  const Vector weights = Weights(rows, requests);
  Vector gain{};  // covariance times weights, then the filter's gain
  double expected = 0, variance = noise_;
  for (int i = 0; i < kStates; ++i) {
    for (int j = 0; j < kStates; ++j) gain[i] += filter.covariance[i][j] * weights[j];
    expected += weights[i] * filter.mean[i];
    variance += weights[i] * gain[i];
  }
  const double limit = kOutlier * std::sqrt(variance);
  const double surprise = std::clamp(std::log(seconds / Prior(rows, requests)) - expected, -limit, limit);
  const double old = filter.mean[0];
  for (int i = 0; i < kStates; ++i) {
    filter.mean[i] += gain[i] / variance * surprise;
    for (int j = 0; j < kStates; ++j) filter.covariance[i][j] -= gain[i] * gain[j] / variance;
  }
  noise_ += kNoiseSmoothing * (Squared(surprise) - noise_);
  noise_ = std::clamp(noise_, Squared(kLeastNoise), Squared(kMostNoise));
  machine_ = filter.mean[0];
  return std::exp(machine_ - old);
}

const AheadCosts::Seen& AheadCosts::Of(int requests) const { return seen_[std::min(CeilLog2(requests), kBuckets - 1)]; }

void AheadCosts::Observe(int requests, bool ahead, double seconds, double waiting) {
  Seen& seen = seen_[std::min(CeilLog2(requests), kBuckets - 1)];
  const auto smooth = [](double* average, double count, double value) {
    *average += std::max(1 / count, kAheadSmoothing) * (value - *average);
  };
  smooth(&seen.share, ++seen.steps, ahead ? 1 : 0);
  if (!ahead || !(waiting > 0)) return;
  smooth(&seen.ratio, ++seen.ahead, std::clamp(seconds / waiting, kLeastRatio, kMostRatio));
  smooth(&seen.waiting, seen.ahead, waiting);
}

double AheadCosts::Saved(int requests) const {
  const Seen& seen = Of(requests);
  return std::max(1 - seen.ratio, 0.0) * seen.waiting;
}

double AheadCosts::Factor(int requests) const {
  const Seen& seen = Of(requests);
  return 1 - seen.share * (1 - seen.ratio);
}

bool DraftCosts::Knows(int contexts) const {
  const int bucket = CeilLog2(contexts);
  return bucket < kBuckets && costs_[bucket].first > 0;
}

DraftCosts::Costs DraftCosts::Line(int contexts) const {
  const int bucket = std::min(CeilLog2(contexts), kBuckets - 1);
  for (int b = bucket; b >= 0; --b) {  // fewer contexts measured: assume proportional, the worst
    if (costs_[b].first > 0)
      return {std::ldexp(costs_[b].first, bucket - b), std::ldexp(costs_[b].per_level, bucket - b)};
  }
  for (int b = bucket + 1; b < kBuckets; ++b) {
    if (costs_[b].first > 0) return costs_[b];
  }
  return {};
}

double DraftCosts::Seconds(int contexts, int levels) const {
  const Costs line = Line(contexts);
  return line.first + line.per_level * (std::max(levels, 1) - 1);
}

void DraftCosts::Observe(int contexts, int levels, int64_t catch_up_tokens, double seconds) {
  const int bucket = CeilLog2(contexts);
  if (bucket >= kBuckets || !(seconds > 0)) return;
  levels = std::max(levels, 1);
  if (catch_up_tokens > kLongCatchUp * contexts) {
    const double excess = std::max(seconds - Seconds(contexts, levels), 0.0) / static_cast<double>(catch_up_tokens);
    per_token_ += (per_token_ == 0 ? 1 : kDraftSmoothing) * (excess - per_token_);
    return;
  }
  Costs& costs = costs_[bucket];
  if (costs.first == 0) {
    const double known = Seconds(contexts, levels);  // of another number of contexts: the shape of the line
    costs = known > 0 ? Line(contexts) : Costs{seconds / levels, seconds / levels};
    const double factor = known > 0 ? seconds / known : 1;
    costs.first *= factor;
    costs.per_level *= factor;
    return;
  }
  // A drafter may hide a long catch-up in an ordinary call: outliers count at most double. The line gives way towards
  // the observation, most where it was made (normalised least mean squares).
  const double expected = Seconds(contexts, levels), further = levels - 1;
  const double step = kDraftSmoothing * (std::min(seconds, 2 * expected) - expected) / (1 + Squared(further));
  costs.first = std::max(costs.first + step, 0.2 * costs.first);
  costs.per_level = std::max(costs.per_level + step * further, 0.0);
}

void DraftCosts::Scale(double factor) {
  for (Costs& known : costs_) {
    known.first *= factor;
    known.per_level *= factor;
  }
  per_token_ *= factor;
}

}  // namespace linspec
