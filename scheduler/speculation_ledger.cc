#include "scheduler/speculation_ledger.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

namespace linspec {
namespace {

constexpr double kPlainDecay = 0.97, kAging = 0.996;  // of what prices are made of: per plain step, per step
constexpr double kAtFirst = 1.5;                      // plain steps over usual ones, before one was seen
constexpr double kInterrupted = 2;                    // a step counts for no more than this times what was expected
constexpr double kShare = 0.01;                       // of the time that passes, that may be lost
// Plain steps of one request that may be lost of what was gained before. What many requests bring varies less, but an
// interruption is as long.
constexpr double kLimitSteps = 16, kLeastLimitSteps = 4;
constexpr double kAtStart = 0.5;        // of the limit
constexpr double kStepsToReopen = 0.5;  // plain ones that the balance must be worth

}  // namespace

int SpeculationLedger::Bucket(int requests) {
  return std::min(static_cast<int>(std::bit_width(static_cast<unsigned>(std::max(requests, 1) - 1))), kBuckets - 1);
}

void SpeculationLedger::Price::Fade(double share) {
  for (double* sum : {&count, &x, &y, &xx, &xy}) *sum *= share;
}

void SpeculationLedger::Price::Add(double prompts, double ratio) {
  count += 1;
  x += prompts;
  y += ratio;
  xx += prompts * prompts;
  xy += prompts * ratio;
}

double SpeculationLedger::Price::PerToken() const {
  const double spread = count * xx - x * x;
  return count > 0 && spread > 1e-9 * x * x ? std::max((count * xy - x * y) / spread, 0.0) : 0;
}

double SpeculationLedger::Price::Ratio() const {
  return count > 0 ? std::max(y - PerToken() * x, 0.0) / count : kAtFirst;
}

const SpeculationLedger::Price& SpeculationLedger::PriceOf(int requests, StepStart start) const {
  const Price &alone = prices_[0][Bucket(requests)], &ahead = prices_[1][Bucket(requests)];
  const bool known = alone.count >= kLeastCount || ahead.count < kLeastCount;
  return start == StepStart::kAlone && known ? alone : ahead;
}

double SpeculationLedger::AheadSeconds(int requests, double usual_seconds) const {
  const Price& ahead = prices_[1][Bucket(requests)];
  return ahead.count >= kLeastCount ? ahead.Ratio() * usual_seconds : 0;
}

double SpeculationLedger::SavedAhead(int requests, double usual_seconds) const {
  const Price &alone = prices_[0][Bucket(requests)], &ahead = prices_[1][Bucket(requests)];
  if (alone.count < kLeastCount || ahead.count < kLeastCount) return 0;
  return std::max(alone.Ratio() - ahead.Ratio(), 0.0) * usual_seconds;
}

// Interruptions would have met a plain step as well, so they count for little on either side. A step that mostly read
// prompts says nothing. The first plain step after drafts finds caches that a drafter displaced: it is charged to the
// drafts.
SpeculationLedger::Booking SpeculationLedger::Book(const Step& step) {
  if (!(step.usual_seconds > 0)) return {};
  Price& own = prices_[step.start == StepStart::kAhead][Bucket(step.requests)];
  ++step_;
  own.Fade(std::pow(kAging, static_cast<double>(step_ - std::exchange(own.step, step_))));
  const Price& price = PriceOf(step.requests, step.start);
  const bool after_drafts = std::exchange(drafted_before_, step.drafted);
  const double plain = price.Ratio() * step.usual_seconds;
  const double prompts = price.PerToken() * static_cast<double>(step.prompt_tokens);
  limit_ = std::max(kLimitSteps / std::sqrt(step.requests), kLeastLimitSteps) * plain;
  if (!std::exchange(begun_, true)) balance_ = kAtStart * limit_;
  balance_ += kShare * std::min(step.seconds, kInterrupted * plain);

  Booking booking;
  const bool plain_step = !step.drafted && !after_drafts;
  if (!plain_step || step.start == StepStart::kWaited) {
    if (price.count > 0 && prompts <= plain) {
      const double most = kInterrupted * std::max(step.expected_seconds, plain);
      booking = {.worth = plain * step.tokens / step.requests, .cost = std::min(step.seconds - prompts, most)};
    }
  } else {
    booking.cost = step.draft_seconds;
  }
  if (plain_step) {
    const double seconds = std::min(step.seconds - step.draft_seconds, kInterrupted * (plain + prompts));
    own.Fade(kPlainDecay);
    own.Add(static_cast<double>(step.prompt_tokens) / step.usual_seconds, seconds / step.usual_seconds);
  }
  saved_ += booking.worth - booking.cost;
  balance_ = std::min(balance_ + booking.worth - booking.cost, limit_);
  used_up_ = balance_ < (used_up_ ? kStepsToReopen * plain : 0);
  return booking;
}

// No trial is dearer than half of what may ever be lost, or many requests would see none.
bool SpeculationLedger::CanLose(double seconds) const { return !used_up_ && balance_ >= std::min(seconds, limit_ / 2); }

}  // namespace linspec
