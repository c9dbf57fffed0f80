// What speculation gained or lost beside plain decoding, in measured seconds, and whether it may go on.
//
// A step with drafts is credited with what its tokens would have cost plainly and charged with what it took, drafting
// and the engine's own work for drafts included. What the balance may fall by is what was gained before, up to a limit,
// and a small share of the time that passes. Once that is used up, drafts are over until the balance has grown again.
// So whatever the estimates promise, a wrong one costs no more than this.
//
// A plain step's price is measured by plain steps, for each power of two of requests. Prompts that are read beside make
// a step longer where a device works them off asynchronously, so the price has a second part, for a token of a prompt.
// A price grows old: without plain steps from time to time drafts are over as well. Where plain steps are started ahead
// (StepStart), theirs is the price, and steps that wait because somebody may draft are charged, drafts or not.
//
// Threads: engine thread only. No clock: times come in as arguments, so tests are exact. Seconds throughout.
#pragma once

#include <array>
#include <cstdint>

namespace linspec {

// How a step began, where plain steps are started before the ones ahead of them are read, which drafts have to be.
enum class StepStart : uint8_t {
  kAlone,   // a plain step of these requests could not have been started ahead
  kWaited,  // it could, had nobody been going to draft
  kAhead,   // it was: it has no drafts
};

class SpeculationLedger {
 public:
  struct Step {
    int requests = 1;
    StepStart start = StepStart::kAlone;
    double tokens = 0;            // as plain decoding counts them: one for each request and step
    int64_t prompt_tokens = 0;    // read beside
    bool drafted = false;         // a drafter that costs something was asked, or drafts were verified
    double seconds = 0;           // of all of it
    double draft_seconds = 0;     // of that, spent on drafts
    double expected_seconds = 0;  // of a step with drafts
    double usual_seconds = 0;     // that start-up found for a plain step of so many requests
  };
  struct Booking {
    double worth = 0, cost = 0;  // what the tokens would have cost, and what they did; 0, 0: not comparable
  };

  // After each step.
  Booking Book(const Step& step);
  // Whether a step of so many requests may have drafts.
  bool Open(int requests, StepStart start = StepStart::kAlone) const {
    return !used_up_ && PriceOf(requests, start).count >= kLeastCount;
  }
  // Of a plain step that is started ahead, and by how much it is shorter than one that is not; 0: not known.
  double AheadSeconds(int requests, double usual_seconds) const;
  double SavedAhead(int requests, double usual_seconds) const;
  // Whether it may lose so much on purpose.
  bool CanLose(double seconds) const;
  // How much of what may ever be lost is there, 0 to 1.
  double fill() const { return limit_ > 0 && balance_ > 0 ? balance_ / limit_ : 0; }
  double saved() const { return saved_; }  // since the start, by all steps with drafts

 private:
  static constexpr int kBuckets = 12;  // 1 .. 2048 requests
  static constexpr double kLeastCount = 1.5;
  // A line through plain steps: seconds over usual seconds, by tokens of prompts over usual seconds. Decaying sums.
  struct Price {
    double count = 0, x = 0, y = 0, xx = 0, xy = 0;
    int64_t step = 0;  // that it was last used in
    void Fade(double share);
    void Add(double prompts, double ratio);
    double PerToken() const;
    double Ratio() const;  // without prompts
  };
  static int Bucket(int requests);
  // Of a step that cannot be started ahead that of one that can, as long as no other is known: it is lower.
  const Price& PriceOf(int requests, StepStart start) const;

  std::array<std::array<Price, kBuckets>, 2> prices_{};  // [started ahead][bucket]
  int64_t step_ = 0;
  bool drafted_before_ = false;  // in the last step
  bool begun_ = false;
  double limit_ = 0;  // of the balance
  double balance_ = 0, saved_ = 0;
  bool used_up_ = false;
};

}  // namespace linspec
