// Asks the drafters for trees and trusts none of them: whatever they return is checked, and a request whose proposal is
// unusable is decoded plainly in that step.
//
// Threads: engine thread only. Drafter failures never fail a request; they are counted.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "models/drafter.h"
#include "models/model.h"
#include "scheduler/engine.h"
#include "scheduler/sequence.h"
#include "scheduler/speculation_controller.h"

namespace linspec {

class Speculator {
 public:
  Speculator(std::vector<std::unique_ptr<Drafter>> drafters, const EngineOptions& options, int64_t vocab_size);

  // INVALID_ARGUMENT names the mode and what is available. Constant after construction: any thread.
  absl::Status CheckMode(SpeculationMode mode) const;
  bool empty() const { return drafters_.empty(); }
  std::span<const std::unique_ptr<Drafter>> drafters() const { return drafters_; }
  bool reads_hidden() const;  // a drafter needs hidden states on the host

  // Measures verify steps and drafts. Uses scratch slots of the pool and gives them back. Errors: the model's.
  absl::Status Calibrate(Model* model, StatePool* pool);

  // One tree per sequence, root = its pending token. deepest: [sequence] of its tree's nodes; empty: any depth will do.
  // Fills the draft fields of stats.
  std::vector<DraftTree> Propose(std::span<Sequence* const> sequences, std::span<const int> deepest, int max_draft_rows,
                                 StepStats* stats);
  // After the walk over the tree that Propose returned for sequences[index].
  void ObserveWalk(int index, const Sequence& sequence, const DraftTree& tree, const Walk& walk, StepStats* stats);
  // After the step, whose verification, acceptance and commit took `seconds`.
  void ObserveVerify(int rows, int requests, int tokens, double seconds);
  void Forget(uint64_t sequence_id);

 private:
  std::vector<SpeculationRequest> Describe(std::span<Sequence* const> sequences, std::span<const int> deepest) const;
  std::vector<SpeculationChoice> Choose(std::span<const SpeculationRequest> requests, int max_draft_rows);
  // Asks one drafter for the requests at `indices`, for at most nodes[i] nodes each; roots alone where it failed.
  std::vector<DraftTree> Ask(int drafter, std::span<Sequence* const> sequences,
                             std::span<const SpeculationRequest> requests, std::span<const size_t> indices,
                             std::span<const int> nodes, StepStats* stats);
  // Lets drafters that cost nothing better the choices; rows: nodes that the step has room for.
  void AskFreeDrafters(std::span<Sequence* const> sequences, std::span<const SpeculationRequest> requests, int rows,
                       std::vector<DraftTree>* trees, StepStats* stats);
  void AskChosenDrafters(std::span<Sequence* const> sequences, std::span<const SpeculationRequest> requests,
                         std::vector<DraftTree>* trees, StepStats* stats);
  // Those to ask, of a drafter that costs nothing.
  std::vector<size_t> RequestsForFree(int drafter, std::span<const SpeculationRequest> requests) const;
  // gains: of what they proposed this step for so many requests; seconds: that it took to ask them.
  void PauseFreeDrafters(double gains, size_t num_asked, size_t num_requests, double seconds);
  // seconds: that the engine itself spent on the drafts of this step, shared among those who were asked for them.
  void ObserveDrafts(double seconds);
  int DrafterOfMost() const;
  int FindDrafter(SpeculationMode mode) const;  // -1: not loaded
  absl::Status CalibrateRequests(Model* model, StatePool* pool, std::span<const StateSlot> slots);
  void CalibrateDrafter(int drafter, int max_contexts, std::span<const float> hidden);
  void TimeDrafts(int drafter, int count, std::span<const float> hidden, bool counted);

  std::vector<std::unique_ptr<Drafter>> drafters_;
  const EngineOptions options_;
  const int64_t vocab_size_;
  SpeculationController controller_;
  int64_t step_ = 0;
  std::vector<int64_t> asked_;  // [drafter] last step that asked it
  struct Asked {
    int drafter, contexts, levels;
    int64_t catch_up;
    double seconds;
  };
  int used_ = kAnyDrafter;     // the drafter of (nearly) all requests of the step under way; kAnyDrafter: none
  double draft_seconds_ = 0;   // that its drafts took
  std::vector<Asked> drafts_;  // of the step under way, whose cost is to be learned
  std::vector<SpeculationChoice> choices_;                   // of the step under way
  std::vector<bool> drafted_;                                // [request] its tree of this step is there
  std::unordered_map<uint64_t, std::vector<int64_t>> seen_;  // [drafter] tokens of the sequence it was shown
  // Tokens that free drafts bring a step, less what the time to look for them costs after all. While it is negative,
  // steps go without, more and more of them between two attempts, and of many requests only some are looked at.
  double free_gain_ = 0;
  int pause_ = 0, pause_left_ = 0;  // steps
  int64_t free_step_ = 0;           // that asked for them last
  int64_t free_used_ = 0;           // that used one, or whose trials began
  int free_trials_ = 0;             // drafts that are still to be tried
  size_t free_asked_ = 0;           // requests, then
};

}  // namespace linspec
