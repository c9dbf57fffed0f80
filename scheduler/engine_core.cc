#include "scheduler/engine_core.h"

#include <algorithm>
#include <utility>

namespace linspec {

EngineCore::EngineCore(Model* model, StatePool* pool, Speculator* speculator, const EngineOptions& options)
    : model_(model),
      pool_(pool),
      speculator_(speculator),
      options_(options),
      scheduler_(options.max_step_tokens, speculator->empty() ? 1 : options.max_draft_nodes),
      prefix_cache_(pool, options.prefix_cache_entries) {}

bool EngineCore::Step(RequestQueue::News news, StepStats* stats, std::vector<uint64_t>* ended) {
  const bool abort = news.abort;
  const std::unordered_set<uint64_t> cancelled = std::move(news.cancelled);
  Admit(std::move(news), stats);
  EndCancelled(cancelled, abort);
  EndWaits(stats);
  if (sequences_.empty() && ahead_ == Ahead::kNothing) return false;

  stats->num_running = static_cast<int>(
      std::count_if(sequences_.begin(), sequences_.end(), [](const auto& sequence) { return !sequence->finished(); }));
  if (ahead_ != Ahead::kNothing) {
    DecodeAhead(stats);
  } else {
    const StepPlan plan = Plan();
    Prefill(plan, stats);
    Decode(plan, stats);
  }
  // What a device computed is delivered while it computes the next step; what ends, or comes from a CPU, at once.
  const bool ends = std::any_of(sequences_.begin(), sequences_.end(), [](const auto& s) { return s->finished(); });
  if (ends || !model_->chooses_tokens()) Deliver(stats);
  Reap(ended);
  return true;
}

void EngineCore::Admit(RequestQueue::News news, StepStats* stats) {
  const Clock::time_point now = Clock::now();
  for (RequestQueue::Ended& gone : news.ended) {
    sequences_.push_back(std::make_unique<Sequence>(next_sequence_id_++, std::move(gone.request), StateSlot(), now));
    sequences_.back()->Finish(gone.reason, absl::OkStatus(), now);
  }
  for (QueuedRequest& queued : news.admitted) {
    sequences_.push_back(std::make_unique<Sequence>(next_sequence_id_++, std::move(queued), pool_->Acquire(), now));
    if (sequences_.back()->request().prompt_logprobs) continue;  // every prompt token's logits are wanted
    stats->num_prefix_queries += std::ssize(sequences_.back()->prompt_prefix());
    ReusePrefix(sequences_.back().get(), stats);
  }
}

// Takes up the longest kept state. The state at the prompt's end will be kept if there is more than a little to compute
// until there. Where the prompt shares more with another, the state at that point will be kept: by the other if it is
// yet to get there, for which this one waits, else by this one. Waiting only for those ahead, in order of admission, so
// that nobody waits in a circle.
void EngineCore::ReusePrefix(Sequence* sequence, StepStats* stats) {
  if (prefix_cache_.capacity() == 0) return;
  const std::string_view owner = sequence->cache_owner();
  const std::span<const int32_t> prompt = sequence->tokens();
  const int64_t restored = prefix_cache_.Restore(owner, prompt, sequence->num_committed(), sequence->slot());
  if (restored > 0) {
    stats->num_prefix_hits += restored - sequence->num_committed();
    sequence->TakeUp(restored);
  }
  const int64_t end = std::ssize(sequence->prompt_prefix());
  if (end - sequence->num_committed() >= 2 * PrefixCache::kGrain) sequence->StopAt(end);
  int64_t shared = prefix_cache_.LongestShared(owner, prompt);
  Sequence* ahead = nullptr;
  for (const auto& other : sequences_) {
    if (other.get() == sequence) break;
    if (other->finished() || other->request().prompt_logprobs || other->cache_owner() != owner) continue;
    const int64_t shared_with_it = PrefixCache::Shared(prompt, other->prompt_prefix());
    if (shared_with_it < shared || (shared_with_it == shared && ahead != nullptr)) continue;
    shared = shared_with_it;
    ahead = other.get();
  }
  if (shared < sequence->num_committed() + PrefixCache::kGrain) return;
  const bool waits = ahead != nullptr && ahead->num_committed() < shared;
  (waits ? ahead : sequence)->StopAt(shared);
  sequence->waits_for = waits ? ahead->id() : 0;
  sequence->waits_until = shared;
}

void EngineCore::EndWaits(StepStats* stats) {
  for (const auto& sequence : sequences_) {
    if (sequence->waits_for == 0 || sequence->finished()) continue;
    const auto ahead = std::find_if(sequences_.begin(), sequences_.end(),
                                    [&](const auto& other) { return other->id() == sequence->waits_for; });
    const bool gone = ahead == sequences_.end() || (*ahead)->finished();
    const bool passed = !gone && (*ahead)->num_committed() >= sequence->waits_until;
    if (!gone && !passed) continue;
    sequence->waits_for = 0;
    ReusePrefix(sequence.get(), stats);
  }
}

// The state of a sequence that ends: where what continues it will start.
void EngineCore::KeepState(Sequence* sequence) {
  if (prefix_cache_.capacity() == 0 || !model_->prefills_as_it_decodes()) return;
  StateSlot slot = sequence->GiveUpSlot();
  const int64_t length = pool_->length(slot.id());
  prefix_cache_.Keep(sequence->cache_owner(), sequence->tokens().first(length), std::move(slot));
}

void EngineCore::EndCancelled(const std::unordered_set<uint64_t>& cancelled, bool abort) {
  const Clock::time_point now = Clock::now();
  for (const auto& sequence : sequences_) {
    if (sequence->finished()) continue;
    const Request& request = sequence->request();
    if (abort || cancelled.contains(request.id)) {
      sequence->Finish(FinishReason::kCancelled, absl::OkStatus(), now);
    } else if (request.deadline && *request.deadline <= now) {
      sequence->Finish(FinishReason::kDeadline, absl::OkStatus(), now);
    }
  }
}

// Finished sequences still wait for delivery; the plan skips them.
StepPlan EngineCore::Plan() const {
  std::vector<SequenceView> views;
  std::vector<int> indices;
  for (size_t i = 0; i < sequences_.size(); ++i) {
    if (sequences_[i]->finished() || sequences_[i]->waits_for != 0) continue;
    views.push_back(sequences_[i]->view());
    indices.push_back(static_cast<int>(i));
  }
  StepPlan plan = scheduler_.Plan(views);
  for (PromptChunk& chunk : plan.prefill) chunk.sequence = indices[chunk.sequence];
  for (PromptChunk& chunk : plan.score) chunk.sequence = indices[chunk.sequence];
  for (int& sequence : plan.decode) sequence = indices[sequence];
  return plan;
}

void EngineCore::Prefill(const StepPlan& plan, StepStats* stats) {
  if (plan.prefill.empty()) return;
  const Clock::time_point start = Clock::now();
  std::vector<PrefillChunk> chunks;
  for (const PromptChunk& chunk : plan.prefill) {
    const Sequence& sequence = *sequences_[chunk.sequence];
    chunks.push_back({sequence.slot(), sequence.NextPromptTokens(chunk.num_tokens)});
    stats->num_prefill_tokens += chunk.num_tokens;
  }
  const absl::Status status = model_->Prefill(chunks, pool_);
  for (const PromptChunk& chunk : plan.prefill) {
    Sequence* sequence = sequences_[chunk.sequence].get();
    if (!status.ok()) {
      Fail(sequence, status);
      continue;
    }
    sequence->AdvancePrompt(chunk.num_tokens);
    if (!sequence->at_stop()) continue;
    const auto committed = sequence->tokens().first(sequence->num_committed());
    const bool whole = committed.size() == sequence->prompt_prefix().size();
    prefix_cache_.Snapshot(sequence->cache_owner(), committed, sequence->slot(),
                           whole ? PrefixCache::Place::kPromptEnd : PrefixCache::Place::kParting);
  }
  stats->prefill_s = Seconds(start, Clock::now());
}

void EngineCore::Deliver(StepStats* stats) {
  const Clock::time_point start = Clock::now();
  bool told = false;
  for (const auto& sequence : sequences_) {
    if (!sequence->has_news()) continue;
    told = true;
    const bool wanted = sequence->Deliver();
    if (wanted || sequence->finished()) continue;
    KeepState(sequence.get());
    sequence->Abandon(Clock::now());
  }
  if (told && after_delivery_) after_delivery_();
  stats->deliver_s += Seconds(start, Clock::now());
}

void EngineCore::Reap(std::vector<uint64_t>* ended) {
  DropFinished();
  std::erase_if(sequences_, [&](const auto& sequence) {
    if (!sequence->closed()) return false;
    speculator_->Forget(sequence->id());
    ended->push_back(sequence->request().id);
    return true;
  });
}

void EngineCore::Fail(Sequence* sequence, const absl::Status& status) {
  if (!sequence->finished()) sequence->Finish(FinishReason::kError, status, Clock::now());
}

}  // namespace linspec
