// Asks the drafters for trees and trusts none of them: whatever they return is checked, and a request whose proposal is
// unusable is decoded plainly in that step.
//
// Threads: engine thread only. Drafter failures never fail a request; they are counted.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
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

  // Whether the next step of the same sequences may be started ahead, because nobody is to draft in it.
  bool StaysPlain(std::span<Sequence* const> sequences) const;
  // One tree per sequence, root = its pending token. deepest: [sequence] of its tree's nodes; empty: any depth will do.
  // Roots for a step that was started ahead. Fills the draft fields of stats.
  std::vector<DraftTree> Propose(std::span<Sequence* const> sequences, std::span<const int> deepest, int max_draft_rows,
                                 StepStart start, StepStats* stats);
  // How the model may draft the next step of the same sequences itself, in place of Propose: where all of them use one
  // drafter, whose heads it has, and go on doing so. Nothing: it may not.
  std::optional<SelfDraft> DraftsOn(const Model& model, std::span<Sequence* const> sequences, int max_draft_rows) const;
  // In place of Propose, of that step; and, when it was read, its trees, and what those were taken from.
  void Continue(std::span<Sequence* const> sequences, std::span<const int> deepest, StepStats* stats);
  void ObserveTrees(std::span<Sequence* const> sequences, std::span<DraftTree> trees, std::span<DraftTree> drafts,
                    StepStats* stats);
  // After the walk over the tree that Propose returned for sequences[index].
  void ObserveWalk(int index, const Sequence& sequence, const DraftTree& tree, const Walk& walk, StepStats* stats);
  // After the step. requests: of the batch that was verified, prompts that were scored among them; prompt_tokens: read
  // beside. Seconds of verification, acceptance and commit, and of the whole step since Propose began. Fills the saved
  // seconds of stats.
  struct Spent {
    int rows = 0, requests = 0;
    int64_t prompt_tokens = 0;
    double verify_seconds = 0, seconds = 0;
  };
  void ObserveStep(const Spent& spent, StepStats* stats);
  void Forget(uint64_t sequence_id);

 private:
  SpeculationMode ModeOf(const Sequence& sequence) const;
  bool Crowded(int64_t num_sequences) const;  // so many that nobody drafts
  std::vector<SpeculationRequest> Describe(std::span<Sequence* const> sequences, std::span<const int> deepest) const;
  std::vector<SpeculationChoice> Choose(std::span<const SpeculationRequest> requests, int max_draft_rows,
                                        StepStart start);
  // Asks one drafter for the requests at `indices`, for at most nodes[i] nodes each; roots alone where it failed.
  std::vector<DraftTree> Ask(int drafter, std::span<Sequence* const> sequences,
                             std::span<const SpeculationRequest> requests, std::span<const size_t> indices,
                             std::span<const int> nodes, StepStats* stats);
  // Lets drafters that cost nothing better the choices; rows: nodes that the step has room for.
  void AskFreeDrafters(std::span<Sequence* const> sequences, std::span<const SpeculationRequest> requests, int rows,
                       std::vector<DraftTree>* trees, StepStats* stats);
  void AskChosenDrafters(std::span<Sequence* const> sequences, std::span<const SpeculationRequest> requests,
                         std::vector<DraftTree>* trees, StepStats* stats);
  // What drafters that cost nothing would bring, beside a step that runs already: for some of the requests.
  void WatchFreeDrafters(std::span<Sequence* const> sequences, std::span<const SpeculationRequest> requests,
                         StepStats* stats);
  // Those to ask, of a drafter that costs nothing.
  std::vector<size_t> RequestsForFree(int drafter, std::span<const SpeculationRequest> requests) const;
  // Takes what a free drafter proposed to the request at `index`, if it is better or on trial; returns the nodes it
  // added.
  int TakeFree(int drafter, size_t index, uint64_t sequence_id, DraftTree proposed, int rows, DraftTree* tree,
               double* gains);
  // seconds: that the engine itself spent on the drafts of this step, shared among those who were asked for them.
  void ObserveDrafts(double seconds);
  void StartStep();
  // Of the step that was proposed: whom all requests use, and the nodes that it gives them on average.
  void NoteDrafterOfAll(std::span<const DraftTree> trees);
  int LevelsOfAll() const;  // to ask that drafter's heads for
  // Of the step under way, that costs something and was asked for most requests; kAnyDrafter: none, or a trial.
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
  int proposed_nodes_ = 0;      // by drafters that cost something, in the step under way
  bool asked_any_ = false;      // in the step under way
  double draft_seconds_ = 0;    // spent on drafts, then
  double reading_seconds_ = 0;  // expected of drafters that read what they had not seen, then
  double progress_ = 0;         // rows whose choice counted then; plain decoding has one for each request and step
  int64_t catch_up_ = 0;        // tokens that drafters read in it
  std::vector<Asked> drafts_;   // whose cost is to be learned
  int drafter_of_all_ = kAnyDrafter;  // kAnyDrafter: not one
  bool continued_ = false;            // the step under way: Continue
  double continued_seconds_ = 0;      // that it would take if it waited
  std::vector<double> nodes_;         // [drafter] beyond the root, of a request, in steps that were proposed
  std::vector<SpeculationChoice> choices_;
  std::vector<bool> drafted_;                                // [request] its tree of this step is there
  std::unordered_map<uint64_t, std::vector<int64_t>> seen_;  // [drafter] tokens of the sequence it was shown
};

}  // namespace linspec
