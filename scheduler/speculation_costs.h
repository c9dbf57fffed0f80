// What speculation costs on this machine with these models: verify steps and drafts, measured at start-up and followed
// ever after.
//
// Only ratios matter: is a step with drafts worth what it takes longer than a plain one? And the machine gets faster
// and slower all the time (other work, clock, where its processors run), usually while only one kind of step is seen.
// Who averages each kind for itself compares today's with yesterday's; who scales everything by what is seen never
// notices that the kinds' ratio is wrong. So StepCosts keeps apart what the machine does and what a size costs beside
// the plain step, and how sure it is of either (a Kalman filter on logarithms, one for each power of two of requests):
//
//   log seconds(rows, requests) = log prior(rows, requests) + machine + [rows > requests] size(rows / requests) + noise
//
// `machine` wanders from step to step, `size` (at 1+, 2, 4, ... 64 rows a request, linear in the logarithm between)
// hardly. While only drafts are verified the two cannot be told apart and their sum is learned; the plain steps that
// the controller puts in between then correct the ratio by as much as is unsure about it. A size of its own for "a
// little more than one row a request" is there because a device rounds rows up to what its kernels and graphs are made
// for.
//
// Threads: engine thread only. No clock: times come in as arguments, so tests are exact.
#pragma once

#include <array>
#include <cstdint>

namespace linspec {

// Seconds of one verify step.
class StepCosts {
 public:
  // The prior: one request with this many rows, a power of two; and each request beyond the first.
  void Calibrate(int rows, double seconds);
  void CalibratePerRequest(double seconds) { per_request_ = seconds; }
  // REQUIRES: rows >= requests. Returns by what factor the machine got slower, for costs that are not measured here.
  double Observe(int rows, int requests, double seconds);
  double Estimate(double rows, int requests) const;  // 0 while nothing is known
  // Of a plain step, by start-up's measurements alone: how steps of different numbers of requests compare.
  double Usual(int requests) const { return known_ == 0 ? 0 : Prior(requests, requests); }
  bool known() const { return known_ > 0; }

 private:
  static constexpr int kBuckets = 11;         // 1 .. 1024 rows or requests
  static constexpr int kSizes = 7;            // 1+, 2, .. 64 rows a request
  static constexpr int kStates = 1 + kSizes;  // the machine first
  using Vector = std::array<double, kStates>;
  struct Filter {
    Vector mean{};
    std::array<Vector, kStates> covariance{};
    int64_t step = -1;  // when it was last used; -1: never
  };

  double Prior(double rows, int requests) const;
  static Vector Weights(double rows, int requests);
  void Advance(Filter* filter);

  std::array<double, kBuckets> prior_{};
  int known_ = 0;  // prior_[0, known_) are filled
  double per_request_ = 0;
  std::array<Filter, kBuckets> filters_;  // [log2 requests]
  int64_t step_ = 0;
  double machine_ = 0;   // as last seen
  double noise_ = 0.01;  // variance of a step's log seconds
};

// What steps with drafts take that run ahead of the host beside those that wait for it, and how many of a drafter's
// steps do.
class AheadCosts {
 public:
  // Of a step whose requests all used the drafter. waiting: seconds that it takes if it waits.
  void Observe(int requests, bool ahead, double seconds, double waiting);
  double Ratio(int requests) const { return Of(requests).ratio; }  // of a step ahead to one that waits; 1: not known
  double Saved(int requests) const;                                // seconds of a step ahead beside one that waits
  // Of a step's seconds on average, some of them ahead, to those of steps that wait.
  double Factor(int requests) const;

 private:
  static constexpr int kBuckets = 11;
  struct Seen {
    double steps = 0, share = 0;  // counts are of what averages still remember
    double ahead = 0, ratio = 1, waiting = 0;
  };
  const Seen& Of(int requests) const;
  std::array<Seen, kBuckets> seen_{};  // [log2 requests]
};

// What drafting costs: levels are run one after the other, each over all contexts at once. Linear in the levels.
class DraftCosts {
 public:
  static constexpr int64_t kLongCatchUp = 16;  // tokens of a context; less is part of every draft

  void Observe(int contexts, int levels, int64_t catch_up_tokens, double seconds);
  void Scale(double factor);  // as the machine's other costs changed
  double Seconds(int contexts, int levels) const;
  double PerLevel(int contexts) const { return Line(contexts).per_level; }  // of one level more
  double PerCatchUpToken() const { return per_token_; }
  bool Knows(int contexts) const;

 private:
  static constexpr int kBuckets = 11;
  struct Costs {
    double first = 0, per_level = 0;  // seconds of one level; of each further one. 0, 0: unknown
  };
  Costs Line(int contexts) const;
  std::array<Costs, kBuckets> costs_{};  // [log2 contexts]
  double per_token_ = 0;
};

}  // namespace linspec
