#include "scheduler/engine_core.h"

#include <algorithm>
#include <utility>

#include "fmt/format.h"
#include "scheduler/device_sampling.h"

namespace linspec {
namespace {

double Seconds(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

DraftTree Chain(std::span<const int32_t> tokens) {
  DraftTree chain = DraftTree::Root(tokens.front());
  for (size_t i = 1; i < tokens.size(); ++i) chain.Add(tokens[i], static_cast<int>(i) - 1);
  return chain;
}

// Whose fault it is: what a request forbids can leave nothing, else it is the model's.
absl::Status NothingToChoose(const SamplingParams& params) {
  const bool restricted =
      !params.allowed_token_ids.empty() || !params.banned_sequences.empty() || params.min_tokens > 0;
  if (restricted) {
    return absl::InvalidArgumentError("every token is banned: by allowed_token_ids, bad_words and min_tokens together");
  }
  return absl::InternalError("no token can be chosen: logits not finite");
}

}  // namespace

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
  if (sequences_.empty()) return false;

  const StepPlan plan = Plan();
  stats->num_running = static_cast<int>(
      std::count_if(sequences_.begin(), sequences_.end(), [](const auto& sequence) { return !sequence->finished(); }));
  Prefill(plan, stats);
  Decode(plan, stats);
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

// draft -> verify -> accept -> commit. Prompts that are scored ride along as chains whose every node is accepted.
void EngineCore::Decode(const StepPlan& plan, StepStats* stats) {
  if (plan.decode.empty() && plan.score.empty()) {
    Deliver(stats);
    return;
  }
  decoding_.clear();
  for (const int index : plan.decode) decoding_.push_back(sequences_[index].get());

  const Clock::time_point start = Clock::now();
  std::vector<DraftTree> trees = speculator_->Propose(decoding_, DeepestNodes(), DraftRows(plan), stats);
  const VerifyBatch batch = Pack(plan, trees, stats);
  const Clock::time_point drafted = Clock::now();

  absl::StatusOr<VerifyResult> result = Verify(batch, stats);
  const Clock::time_point verified = Clock::now();
  absl::Status status = result.status();
  Clock::time_point accepted = verified;
  if (status.ok()) {
    const std::vector<std::vector<int32_t>> paths = Accept(plan, trees, *result, stats);
    accepted = Clock::now();
    status = model_->Commit(batch, paths, pool_);
  }
  if (!status.ok()) {
    for (Sequence* sequence : decoding_) Fail(sequence, status);
    for (const PromptChunk& chunk : plan.score) Fail(sequences_[chunk.sequence].get(), status);
  }
  const Clock::time_point committed = Clock::now();
  stats->draft_s = Seconds(start, drafted);
  stats->verify_s = Seconds(drafted, verified);
  stats->accept_s = Seconds(verified, accepted);
  stats->commit_s = Seconds(accepted, committed);
  if (status.ok()) {
    speculator_->ObserveStep({.rows = batch.num_rows(),
                              .requests = batch.num_requests(),
                              .prompt_tokens = stats->num_prefill_tokens,
                              .verify_seconds = Seconds(drafted, committed),
                              .seconds = Seconds(start, committed)},
                             stats);
  }
}

// What the plan leaves, and the memory.
int EngineCore::DraftRows(const StepPlan& plan) const {
  int64_t room = model_->MaxVerifyRows(*pool_) - std::ssize(plan.decode);
  for (const PromptChunk& chunk : plan.score) room -= chunk.num_tokens;
  return static_cast<int>(std::clamp<int64_t>(plan.draft_rows, 0, std::max<int64_t>(room, 0)));
}

// Where only what lies within a group is exact: no node at or past the position where the open group ends, but a root.
std::vector<int> EngineCore::DeepestNodes() const {
  std::vector<int> deepest;
  if (model_->exact_across_groups()) return deepest;
  const int64_t group = model_->config().linear_attention.group_size;
  for (const Sequence* sequence : decoding_) {
    deepest.push_back(static_cast<int>(group - 1 - sequence->num_committed() % group));
  }
  return deepest;
}

VerifyBatch EngineCore::Pack(const StepPlan& plan, std::span<const DraftTree> trees, StepStats* stats) {
  VerifyBatch batch;
  for (size_t i = 0; i < trees.size(); ++i) batch.Add(decoding_[i]->slot(), trees[i]);
  for (const PromptChunk& chunk : plan.score) {
    const Sequence& sequence = *sequences_[chunk.sequence];
    batch.Add(sequence.slot(), Chain(sequence.NextPromptTokens(chunk.num_tokens)));
    stats->num_prefill_tokens += chunk.num_tokens;
  }
  stats->num_decode_requests = static_cast<int>(plan.decode.size());
  stats->num_verify_rows = batch.num_rows();
  if (model_->chooses_tokens()) AddSampling(plan, trees, &batch);
  return batch;
}

void EngineCore::AddSampling(const StepPlan& plan, std::span<const DraftTree> trees, VerifyBatch* batch) {
  batch->want_hidden = speculator_->reads_hidden();
  batch->want_logits = !plan.score.empty();
  for (size_t i = 0; i < trees.size(); ++i) {
    batch->want_logits |= !ChosenOnDevice(decoding_[i]->sampling(), decoding_[i]->acceptance());
    AppendRowSampling(trees[i], decoding_[i]->walk_input(model_->config().eos_token_ids), batch);
  }
  batch->sampling.resize(batch->num_rows());  // prompts that are scored: nothing is chosen
}

absl::StatusOr<VerifyResult> EngineCore::Verify(const VerifyBatch& batch, StepStats* stats) {
  if (absl::Status started = model_->StartVerify(batch, *pool_); !started.ok()) return started;
  if (model_->chooses_tokens()) Deliver(stats);
  absl::StatusOr<VerifyResult> result = model_->FinishVerify();
  if (!result.ok()) return result;
  const int64_t rows = batch.num_rows(), logits = std::ssize(result->logits);
  const bool sampled = std::ssize(result->sampled) == rows;
  if (logits == rows * model_->config().vocab_size || (logits == 0 && sampled && !batch.want_logits)) return result;
  return absl::InternalError(fmt::format("the model returned {} logits for {} rows", logits, rows));
}

std::vector<std::vector<int32_t>> EngineCore::Accept(const StepPlan& plan, std::span<const DraftTree> trees,
                                                     const VerifyResult& result, StepStats* stats) {
  const int64_t vocab_size = model_->config().vocab_size;
  const int64_t hidden_size = model_->config().hidden_size;
  std::vector<std::vector<int32_t>> paths(trees.size());
  // Rows [begin, begin + count) of one of the result's arrays, which may be missing.
  const auto rows_of = [](const auto& values, int64_t width, int64_t begin, int64_t count) {
    const bool there = std::ssize(values) >= (begin + count) * width;
    return there ? values.subspan(begin * width, count * width) : decltype(values.subspan(0, 0))();
  };
  int64_t row = 0;
  for (const auto& sequence : sequences_) sequence->hidden_row = -1;
  for (size_t i = 0; i < trees.size(); ++i) {
    const int64_t num_rows = trees[i].num_nodes();
    const VerifyResult rows = {.logits = rows_of(result.logits, vocab_size, row, num_rows),
                               .hidden = rows_of(result.hidden, hidden_size, row, num_rows),
                               .sampled = rows_of(result.sampled, 1, row, num_rows)};
    AcceptOne(static_cast<int>(i), trees[i], rows, &paths[i], stats);
    if (!paths[i].empty()) decoding_[i]->hidden_row = static_cast<int>(row) + paths[i].back();
    row += num_rows;
  }
  for (const PromptChunk& chunk : plan.score) {
    paths.push_back(ScorePrompt(chunk, result.logits.subspan(row * vocab_size, chunk.num_tokens * vocab_size)));
    row += chunk.num_tokens;
  }
  return paths;
}

void EngineCore::AcceptOne(int index, const DraftTree& tree, const VerifyResult& rows, std::vector<int32_t>* path,
                           StepStats* stats) {
  const ModelConfig& config = model_->config();
  Sequence* sequence = decoding_[index];
  if (sequence->finished()) return;  // its client went away while the device worked
  const WalkInput input = sequence->walk_input(config.eos_token_ids);
  const bool chosen = !rows.sampled.empty() && ChosenOnDevice(sequence->sampling(), sequence->acceptance());
  Walk walk = chosen ? WalkTree(tree, rows.sampled, input) : WalkTree(tree, rows.logits, config.vocab_size, input);
  const bool ok = walk.ok;
  if (ok) speculator_->ObserveWalk(index, *sequence, tree, walk, stats);
  stats->num_output_tokens += static_cast<int>(walk.tokens.size());
  if (ok && speculator_->reads_hidden() && !rows.hidden.empty()) {
    const auto last = rows.hidden.subspan(walk.path.back() * config.hidden_size, config.hidden_size);
    sequence->hidden.assign(last.begin(), last.end());
  }
  const std::vector<int32_t> accepted = walk.path;
  if (ok && walk.finish_reason != FinishReason::kNone) KeepState(sequence);
  sequence->Accept(tree, std::move(walk), Clock::now());  // what was chosen before a failure is still good
  if (!ok) Fail(sequence, NothingToChoose(sequence->sampling()));
  if (!sequence->finished()) *path = accepted;
}

std::vector<int32_t> EngineCore::ScorePrompt(const PromptChunk& chunk, std::span<const float> logits) {
  const int64_t vocab_size = model_->config().vocab_size;
  Sequence* sequence = sequences_[chunk.sequence].get();
  std::vector<int32_t> path;
  for (int i = 0; i < chunk.num_tokens; ++i) {
    const int32_t next = sequence->tokens()[sequence->num_committed() + i + 1];
    SampleResult score = ScoreToken(logits.subspan(i * vocab_size, vocab_size), next, sequence->sampling().logprobs);
    if (!score.ok) {
      Fail(sequence, absl::InternalError("the logits of the prompt are not finite"));
      return {};
    }
    sequence->AddPromptScore(std::move(score.token));
    path.push_back(i);
  }
  sequence->AdvancePrompt(chunk.num_tokens);
  return path;
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
