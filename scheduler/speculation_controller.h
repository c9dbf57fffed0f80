// Decides which drafter a decoding request uses in a step, and after drafting which of the drafted nodes are verified,
// so that tokens per second are highest; none at all when drafting does not pay.
//
// **The price of time.** Let lambda be the tokens per second that the engine makes in the best way it knows. A second
// spent must bring lambda tokens. So of the nodes of all requests, likeliest first, those are verified that make
//
//   sum of path probabilities - lambda * (seconds of the step with them - without them)
//
// largest, and a level is drafted while it promises more than lambda times what it takes. A drafter's rate is that of
// doing so with each of its latest proposals: sum of tokens / sum of seconds, with lambda equal to the result
// (Dinkelbach), so its
// *gain*, its rate over that of plain steps, less 1 is what it brings a request in a step, in tokens.
//
// **Estimates** come from three things that are measured: step and draft costs (speculation_costs.h), how likely paths
// are (speculation_acceptance.h), and the latest proposals of each drafter (speculation_history.h). When these suddenly
// promise more or less than the older ones, because the text changed, the older ones are forgotten. And since all this
// may be wrong in the same direction, what the use of a drafter comes to is set beside what it was expected to, and its
// gain corrected by that.
//
// **Runs and trials.** What is used is decided for a run of kRunSteps steps. A drafter comes into use when its gain
// exceeds 1 by more than the doubt about it, and goes when it falls below 1. Requests that may use any drafter use the
// same one, since each costs its levels again. What is not in use may be wrong by now, so it gets trials of a run:
// drafters with all requests whose texts they know, and plain steps, which tell whether what is in use still pays. How
// often is a matter of what a trial is expected to lose, which is little just where two ways are hard to tell apart.
//
// **What may be lost** is limited by what was: speculation_ledger.h. And no step of several requests takes longer than
// most_slowdown times a plain one, because a request that accepts nothing waits for the drafts of the others.
//
// **Plain steps that run ahead** (StepStart) are shorter than plain steps that wait for the host, as steps with drafts
// have to. They are what everything is measured by, where they can be had; and what costs nothing but such a wait is
// asked where its drafts bring more than that. Until then it is asked beside steps that run already, for the sake of
// knowing.
//
// **Steps with drafts that run ahead**: where a model drafts for itself, only the first step of a run waits. What the
// others take beside waiting is measured (AheadCosts), and a drafter's rate is that of its runs.
//
// Threads: engine thread only. No clock: times come in as arguments, so tests are exact.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "models/draft_tree.h"
#include "scheduler/speculation_acceptance.h"
#include "scheduler/speculation_costs.h"
#include "scheduler/speculation_history.h"
#include "scheduler/speculation_ledger.h"

namespace linspec {

inline constexpr int kAnyDrafter = -1;

struct SpeculationRequest {
  uint64_t sequence_id = 0;
  int max_nodes = 1;                     // root included
  int drafter = kAnyDrafter;             // or the only one it may use
  std::vector<int64_t> catch_up_tokens;  // [num_drafters] tokens of the sequence the drafter has not seen
  int64_t tokens_left = 0;               // output tokens it may still produce
  int max_levels = kMaxTreeNodes;        // deeper nodes will not be verified
};

struct SpeculationChoice {
  int drafter = 0;
  int nodes = 1;                    // to ask for; 1: do not draft
  int max_levels = kMaxTreeNodes;   // to compute
  float min_probability = 0;        // paths less likely than this are not worth verifying
  float min_level_probability = 0;  // nor are those worth computing first
  bool trial = false;               // of this drafter; without nodes: of plain decoding, so not even free drafts
  int free_trial = kAnyDrafter;     // a drafter that costs nothing, whose draft is to be used whatever it promises
  double gain = 0;                  // tokens that drafting is expected to bring, less what it costs but for the wait
};

// A tree as drafted, for one request of the step.
struct SpeculationProposal {
  uint64_t sequence_id;
  int drafter;
  bool trial;
  DraftTree* tree;
  bool cut_short = false;  // no deeper level was to be computed: what it would have held is unknown
};

// What a step brought and took, all told.
struct SpeculationOutcome {
  int rows = 0, requests = 0;   // verified
  double tokens = 0;            // as plain decoding counts them: one for each request and step
  int64_t prompt_tokens = 0;    // read beside
  int64_t catch_up = 0;         // tokens that the drafter read
  int drafter = kAnyDrafter;    // that costs something and was asked for most requests; kAnyDrafter: none, or a trial
  double verify_seconds = 0;    // of verification, acceptance and commit
  double draft_seconds = 0;     // spent on drafts
  double seconds = 0;           // of the whole step
  double expected_seconds = 0;  // of one that waits
  int drafter_of_all = kAnyDrafter;  // whom all requests used, in a trial too
  bool ahead = false;                // with its drafts, started before the one before it was read
};

class SpeculationController {
 public:
  // costs_nothing: [num_drafters], as Drafter::costs_nothing. Choose leaves these out: whoever asks them uses what they
  // propose where its Gain exceeds that of the choice. most_slowdown: 0: no limit.
  explicit SpeculationController(std::vector<bool> costs_nothing, double most_slowdown = 0);

  StepCosts& step_costs() { return step_costs_; }
  DraftCosts& draft_costs(int drafter) { return drafters_[drafter].costs; }
  AcceptanceModel& acceptance() { return acceptance_; }
  const SpeculationLedger& ledger() const { return ledger_; }

  // One choice per request, and with it the start of a step. max_draft_rows bounds the nodes of all trees, roots not
  // counted.
  // One that was started ahead has no drafts: what is decided holds from the next step on.
  std::vector<SpeculationChoice> Choose(std::span<const SpeculationRequest> requests, int max_draft_rows,
                                        StepStart start = StepStart::kAlone);
  // Whether the next step may be started ahead: nobody is to draft in it, not even for nothing.
  bool StaysPlain() const;
  // Whether a drafter that costs nothing is to be asked for all requests of the step, not only for those that try it.
  bool AsksAll(int drafter) const { return WorthWaiting(drafter, start_ == StepStart::kAlone ? 0 : saved_ahead_); }
  // Whether the run goes on, so that the next step may be drafted as this one is without being chosen. Not where
  // drafters that cost nothing bring more than waiting costs. trial: this step is of one.
  bool MayContinue(int drafter, bool trial) const;
  void Continue(int num_requests);  // in place of Choose
  // Of a step that was continued: tokens that its trees are expected to bring, roots not counted.
  double Expect(std::span<const SpeculationProposal> proposals);
  const AheadCosts& ahead_costs(int drafter) const { return drafters_[drafter].ahead; }
  double plain_seconds() const { return plain_seconds_; }  // of a step as this one, without drafts
  // Whether asking a chosen drafter pays for so many of the step's requests; the others found something better.
  bool StillPays(int drafter, int num_asked) const;
  // Tokens that verifying the best part of the tree brings its request beyond what it costs, if all requests of the
  // step do as much.
  double Gain(const SpeculationProposal& proposal) const;
  double price() const { return price_; }  // lambda of the step
  // Remembers what was proposed, verified or not.
  void Learn(const SpeculationProposal& proposal);
  // A drafter that costs nothing was asked for so many requests and proposed drafts worth `gains` tokens; used: one of
  // them is verified.
  void ObserveFree(int drafter, int num_asked, double gains, bool used, double seconds);
  // Cuts the trees down to the nodes that pay. Of a trial one node stays, so that something is learned. Trees with
  // distributions stay whole: what is verified must not depend on what was drawn. draft_seconds: that drafting took.
  // Returns the tokens that the rest is expected to bring.
  double Prune(std::span<const SpeculationProposal> proposals, int num_requests, double draft_seconds);
  // A reply ended with so many tokens: over more, no drafter that has to catch up with a request can make up for it.
  void ObserveReply(int64_t tokens);
  // After each step that Choose began.
  void ObserveStep(const SpeculationOutcome& outcome);

 private:
  static constexpr int kCatchUpHorizon = 128;  // output tokens over which a drafter's catch-up has to pay off, at most
  static constexpr int kRunSteps = 8;
  static constexpr int kTrialsAtStart = 2;
  // What the use of a drafter came to beside plain decoding, and what it was expected to; decaying sums.
  struct Record {
    double steps = 0, worth = 0, expected_worth = 0;  // seconds
    void Fade(double share);
    double Factor() const;  // of the expected gain, as far as it is sure
  };
  struct DrafterState {
    DraftCosts costs;
    AheadCosts ahead;
    ProposalHistory history;
    Record record;
    int64_t evaluated = -1;  // proposals of the history that the estimate knows
    int stale = 0;           // evaluations that kept it
    int max_levels = 2;      // what pays best
    ProposalHistory::Estimate estimate;
    double stated_gain = 1;  // rate over that of plain steps, by the estimates
    double gain = 1;         // corrected by the record
    bool pays = false;
    double credit = 0;                // seconds that its trials may be expected to lose
    int trials_due = kTrialsAtStart;  // whatever the credit: what was measured at start-up may be wrong
    // Of one that costs nothing: tokens that its drafts bring a step, less what the time to look for them costs after
    // all; who was asked when; steps without a draft of it.
    double net = 0;
    int64_t asked_step = 0;
    int num_asked = 0, idle_steps = 0;
  };
  static constexpr int kPlain = -1;
  struct Trial {
    int drafter = kPlain;
    int steps_left = 0;
    std::vector<uint64_t> sequences;
  };

  void Evaluate(bool anew);
  void EvaluateDrafter(DrafterState* drafter) const;
  SpeculationChoice Use(int drafter, const SpeculationRequest& request, int rows) const;
  // Lets requests use the best drafter; returns how many of the rows are left.
  int UseBest(std::span<const SpeculationRequest> requests, int rows, std::vector<SpeculationChoice>* choices);
  double Value(const SpeculationRequest& request, int drafter) const;
  // Tokens of a request that waiting for drafts costs, beside a plain step that could be started ahead.
  double Wait() const { return start_ == StepStart::kAlone ? 0 : saved_ahead_ / plain_seconds_; }
  // Whether a drafter that costs nothing brings more than it takes to look, and to wait for that if nobody else drafts.
  bool WorthWaiting(int drafter, double wait_seconds) const;
  double CatchUpCost(int64_t tokens, int drafter) const;
  double MostSeconds() const;
  void EarnCredit();
  // Starts the trial that can be paid for, if any.
  void StartTrial(std::span<const SpeculationRequest> requests, std::span<const SpeculationChoice> choices);
  bool StartTrialOf(int drafter, std::span<const SpeculationRequest> requests,
                    std::span<const SpeculationChoice> choices);
  double TrialLoss(int drafter, int num_tried) const;
  void ApplyTrial(std::span<const SpeculationRequest> requests, int rows, std::vector<SpeculationChoice>* choices);

  const std::vector<bool> costs_nothing_;
  const double most_slowdown_;
  StepCosts step_costs_;
  AcceptanceModel acceptance_;
  SpeculationLedger ledger_;
  SpeculationLedger::Booking recent_{1e-9, 1e-9};  // of steps with drafts; decaying sums
  std::vector<DrafterState> drafters_;
  int best_ = kPlain;
  int64_t step_ = 0;
  int num_requests_ = 0;  // of the step
  double price_ = 0;      // lambda
  StepStart start_ = StepStart::kAlone;
  double plain_seconds_ = 0;    // of a step with these requests
  double saved_ahead_ = 0;      // that a plain step with these requests takes less where it is started ahead
  std::vector<double> verify_;  // [nodes beyond the root] seconds of a step in which each request has so many
  double plain_credit_ = 0;
  double reply_tokens_ = kCatchUpHorizon;           // mean of those that ended lately
  int most_nodes_ = 1;                              // of a tree, that any request could use so far
  int run_left_ = 0, run_requests_ = 0;             // steps until the next evaluation; what the last one was for
  bool closed_ = false;                             // no drafts in the rest of the run
  bool drafting_ = false, drafted_before_ = false;  // in this step, in the last
  Trial trial_;
  bool after_trial_ = false;  // no trial in the next run
  int turn_ = 0;              // whose requests try next
};

}  // namespace linspec
