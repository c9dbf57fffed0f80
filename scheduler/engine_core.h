// One step of the engine, without threads or locks: news in, outputs out.
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
  void Decode(const StepPlan& plan, StepStats* stats);
  int DraftRows(const StepPlan& plan) const;
  std::vector<int> DeepestNodes() const;  // of each decoding request; empty: no limit
  VerifyBatch Pack(const StepPlan& plan, std::span<const DraftTree> trees, StepStats* stats);
  void AddSampling(const StepPlan& plan, std::span<const DraftTree> trees, VerifyBatch* batch);
  // Verify; the news of the step before are delivered while a device works.
  absl::StatusOr<VerifyResult> Verify(const VerifyBatch& batch, StepStats* stats);
  // Walks the trees, appends tokens, scores prompts; returns the accepted path of every row of the batch.
  std::vector<std::vector<int32_t>> Accept(const StepPlan& plan, std::span<const DraftTree> trees,
                                           const VerifyResult& result, StepStats* stats);
  void AcceptOne(int index, const DraftTree& tree, const VerifyResult& rows, std::vector<int32_t>* path,
                 StepStats* stats);
  std::vector<int32_t> ScorePrompt(const PromptChunk& chunk, std::span<const float> logits);
  void Deliver(StepStats* stats);
  void Reap(std::vector<uint64_t>* ended);  // sequences whose last news were delivered
  void Fail(Sequence* sequence, const absl::Status& status);
  StepPlan Plan() const;

  Model* model_;
  StatePool* pool_;
  Speculator* speculator_;
  const EngineOptions options_;
  std::function<void()> after_delivery_;  // may be null
  Scheduler scheduler_;
  PrefixCache prefix_cache_;
  std::vector<std::unique_ptr<Sequence>> sequences_;  // in order of admission
  std::vector<Sequence*> decoding_;                   // of the step under way
  uint64_t next_sequence_id_ = 1;
};

}  // namespace linspec
