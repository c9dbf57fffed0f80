// What speculation costs on this machine with these models: verify steps and drafts, measured at start-up and followed
// ever after.
//
// Threads: engine thread only. No clock: times come in as arguments, so tests are exact.
#pragma once

#include <array>
#include <cstdint>

namespace linspec {

// Seconds of one verify step, sampled at powers of two of its rows.
class StepCosts {
 public:
  void Calibrate(int rows, double seconds);  // one request
  void CalibratePerRequest(double seconds) { per_request_ = seconds; }
  // Returns by how much the whole table was scaled. The machine as a whole gets faster and slower (other work, clock,
  // where its processors run), and what was not measured lately must follow, or it looks wrong beside what was.
  double Observe(int rows, int requests, double seconds);
  double Estimate(double rows, int requests) const;  // 0 while nothing is known
  bool known() const { return known_ > 0; }

 private:
  static constexpr int kBuckets = 11;  // 1 .. 1024 rows
  double RowCost(double rows) const;
  std::array<double, kBuckets> seconds_{};
  int known_ = 0;  // buckets [0, known_) are filled
  double per_request_ = 0;
};

// What drafting costs: levels are run one after the other, each over all contexts at once.
class DraftCosts {
 public:
  static constexpr int64_t kLongCatchUp = 16;  // tokens of a context; less is part of every draft

  void Observe(int contexts, int levels, int64_t catch_up_tokens, double seconds);
  void Scale(double factor);  // as the machine's other costs changed
  double PerLevel(int contexts) const;
  double PerCatchUpToken() const { return per_token_; }

 private:
  static constexpr int kBuckets = 11;
  std::array<double, kBuckets> per_level_{};  // [log2 contexts], 0: unknown
  double per_token_ = 0;
};

}  // namespace linspec
