// One step of the engine, without threads or locks: news in, outputs out.
//
// Where a model can, a plain step is started before the one ahead of it is read (DecodeAhead): the device then never
// waits for the host. It is bound to the requests that it was started for. Who joins gets a slot, and the next plan.
// Who ended has a row there that comes to nothing, and a slot that may be given away at once, because zeroing, copies
// and commits are queued behind what runs. The same for steps with drafts, where the model drafts for itself.
//
// Threads: engine thread only. A sequence that ends, for whatever reason, gives its slot back within the same step.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <unordered_set>
#include <vector>

#include "models/model.h"
#include "models/state_pool.h"
#include "scheduler/engine.h"
#include "scheduler/prefix_cache.h"
#include "scheduler/request_queue.h"
#include "scheduler/scheduler.h"
#include "scheduler/sequence.h"
#include "scheduler/speculator.h"

namespace linspec {

class EngineCore {
 public:
  // Everything must outlive the core.
  EngineCore(Model* model, StatePool* pool, Speculator* speculator, const EngineOptions& options);

  void SetAfterDelivery(std::function<void()> run) { after_delivery_ = std::move(run); }  // as Engine's

  // One turn. stats->num_waiting and queue_s are the caller's. Ids of the requests that ended are appended to `ended`.
  // False when there was nothing to do.
  bool Step(RequestQueue::News news, StepStats* stats, std::vector<uint64_t>* ended);
  int num_running() const { return static_cast<int>(sequences_.size()); }
  // For requests: the rest of the pool belongs to the prefix cache.
  int num_free_slots() const { return pool_->num_free() - (prefix_cache_.capacity() - prefix_cache_.size()); }
  int num_kept_prefixes() const { return prefix_cache_.size(); }

 private:
  void Admit(RequestQueue::News news, StepStats* stats);
  void ReusePrefix(Sequence* sequence, StepStats* stats);
  void EndWaits(StepStats* stats);
  void KeepState(Sequence* sequence);
  void EndCancelled(const std::unordered_set<uint64_t>& cancelled, bool abort);
  void Prefill(const StepPlan& plan, StepStats* stats);
  struct DecodeTimes {
    Clock::time_point start, drafted = {};
  };
  void Decode(const StepPlan& plan, StepStats* stats);
  void DecodeAhead(StepStats* stats);
  // What both end with, of the step in batch_; trees: of decoding_.
  void Complete(const StepPlan& plan, std::vector<DraftTree> trees, absl::Status started, const DecodeTimes& times,
                StepStats* stats);
  // Before it waits, the next step is started where that can be, and the news of the last one are delivered where a
  // device works meanwhile. Trees that the model made replace those given.
  absl::StatusOr<VerifyResult> AwaitVerify(absl::Status started, std::vector<DraftTree>* trees, StepStats* stats);
  absl::Status StartAhead(bool drafted);    // the next step, behind one with drafts of the model or one of the host's
  bool CouldRunAhead(int64_t more_tokens);  // as far as those who decode are concerned; tokens until the last choice
  std::vector<DraftTree> TakeTrees(const VerifyResult& made, StepStats* stats);
  void DropFinished();  // from decoding_
  int DraftRows(const StepPlan& plan) const;
  StepStart StartOf(const StepPlan& plan) const;  // before decoding_ and batch_ are its
  std::vector<int> DeepestNodes() const;          // of each decoding request; empty: no limit
  VerifyBatch Pack(const StepPlan& plan, std::span<const DraftTree> trees, StepStats* stats);
  void AddSampling(const StepPlan& plan, std::span<const DraftTree> trees, VerifyBatch* batch);
  // Walks the trees, appends tokens, scores prompts; returns the accepted path of every request of the batch.
  std::vector<std::vector<int32_t>> Accept(const StepPlan& plan, std::span<const DraftTree> trees,
                                           const VerifyResult& result, StepStats* stats);
  void AcceptOne(int index, const DraftTree& tree, const VerifyResult& rows, std::vector<int32_t>* path,
                 StepStats* stats);
  std::vector<int32_t> ScorePrompt(const PromptChunk& chunk, std::span<const float> logits);
  void Deliver(StepStats* stats);
  void Reap(std::vector<uint64_t>* ended);  // sequences whose last news were delivered
  void Fail(Sequence* sequence, const absl::Status& status);
  StepPlan Plan() const;
  static double Seconds(Clock::time_point from, Clock::time_point to) {
    return std::chrono::duration<double>(to - from).count();
  }

  Model* model_;
  StatePool* pool_;
  Speculator* speculator_;
  const EngineOptions options_;
  std::function<void()> after_delivery_;  // may be null
  Scheduler scheduler_;
  PrefixCache prefix_cache_;
  std::vector<std::unique_ptr<Sequence>> sequences_;  // in order of admission
  std::vector<Sequence*> decoding_;                   // of the step under way, as far as they did not end
  std::vector<int> requests_;                         // [decoding_] which of batch_ each is
  VerifyBatch batch_;                                 // of the step under way; until it is read, of the one it follows
  enum class Ahead : uint8_t { kNothing, kRoots, kDrafted };
  Ahead ahead_ = Ahead::kNothing;  // what was started and not read
  bool drafted_ahead_ = false;     // the step under way has drafts of the model, not read yet
  bool waits_ = false;             // the next one could be started ahead, but for drafts
  uint64_t next_sequence_id_ = 1;
};

}  // namespace linspec
