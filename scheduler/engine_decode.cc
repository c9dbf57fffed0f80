// The decoding half of a step: draft, verify, accept, commit; and steps that run ahead of it on a device.
#include <algorithm>
#include <optional>
#include <utility>

#include "fmt/format.h"
#include "scheduler/device_sampling.h"
#include "scheduler/engine_core.h"

namespace linspec {
namespace {

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

// draft -> verify -> accept -> commit. Prompts that are scored ride along as chains whose every node is accepted.
void EngineCore::Decode(const StepPlan& plan, StepStats* stats) {
  if (plan.decode.empty() && plan.score.empty()) {
    Deliver(stats);
    return;
  }
  const StepStart start = StartOf(plan);
  decoding_.clear();
  requests_.clear();
  for (const int index : plan.decode) {
    requests_.push_back(static_cast<int>(decoding_.size()));
    decoding_.push_back(sequences_[index].get());
  }
  DecodeTimes times{.start = Clock::now()};
  std::vector<DraftTree> trees = speculator_->Propose(decoding_, DeepestNodes(), DraftRows(plan), start, stats);
  batch_ = Pack(plan, trees, stats);
  times.drafted = Clock::now();
  Complete(plan, std::move(trees), model_->StartVerify(batch_, *pool_), times, stats);
}

// The step was started before the one ahead of it was read. Who ended since has a row that is dropped; without drafts
// the speculator does not hear of such a step, whose cost is that of other requests.
void EngineCore::DecodeAhead(StepStats* stats) {
  const bool drafted = std::exchange(ahead_, Ahead::kNothing) == Ahead::kDrafted;
  DropFinished();
  DecodeTimes times{.start = Clock::now()};
  std::vector<DraftTree> trees;
  if (drafted) {
    speculator_->Continue(decoding_, DeepestNodes(), stats);
  } else {
    std::span<Sequence* const> proposed = decoding_;
    if (std::ssize(decoding_) != batch_.num_requests()) proposed = {};
    StepPlan plan;
    plan.draft_rows = options_.max_step_tokens - static_cast<int>(decoding_.size());
    trees = speculator_->Propose(proposed, DeepestNodes(), DraftRows(plan), StepStart::kAhead, stats);
    for (size_t i = trees.size(); i < decoding_.size(); ++i) {
      trees.push_back(DraftTree::Root(decoding_[i]->pending_token()));
    }
  }
  drafted_ahead_ = drafted;
  stats->ahead = true;
  stats->num_decode_requests = static_cast<int>(decoding_.size());
  stats->num_verify_rows = batch_.num_rows();
  times.drafted = Clock::now();
  Complete(StepPlan(), std::move(trees), absl::OkStatus(), times, stats);
}

void EngineCore::Complete(const StepPlan& plan, std::vector<DraftTree> trees, absl::Status started,
                          const DecodeTimes& times, StepStats* stats) {
  const absl::StatusOr<VerifyResult> result = AwaitVerify(std::move(started), &trees, stats);
  const Clock::time_point verified = Clock::now();
  absl::Status status = result.status();
  Clock::time_point accepted = verified;
  if (status.ok()) {
    const std::vector<std::vector<int32_t>> paths = Accept(plan, trees, *result, stats);
    accepted = Clock::now();
    if (ahead_ == Ahead::kRoots) {
      batch_.Advance(result->sampled);  // which the model has, and has committed
    } else {
      status = model_->Commit(batch_, paths, pool_);
    }
  }
  if (!status.ok()) {
    if (std::exchange(ahead_, Ahead::kNothing) != Ahead::kNothing) {
      model_->FinishVerify().status().IgnoreError();  // of whom there is none any more
    }
    for (Sequence* sequence : decoding_) Fail(sequence, status);
    for (const PromptChunk& chunk : plan.score) Fail(sequences_[chunk.sequence].get(), status);
  }
  const Clock::time_point committed = Clock::now();
  stats->draft_s = Seconds(times.start, times.drafted);
  stats->verify_s = Seconds(times.drafted, verified);
  stats->accept_s = Seconds(verified, accepted);
  stats->commit_s = Seconds(accepted, committed);
  if (!status.ok()) return;
  speculator_->ObserveStep({.rows = batch_.num_rows(),
                            .requests = batch_.num_requests(),
                            .prompt_tokens = stats->num_prefill_tokens,
                            .verify_seconds = Seconds(times.drafted, committed),
                            .seconds = Seconds(times.start, committed)},
                           stats);
}

absl::StatusOr<VerifyResult> EngineCore::AwaitVerify(absl::Status started, std::vector<DraftTree>* trees,
                                                     StepStats* stats) {
  if (!started.ok()) return started;
  const bool drafted = std::exchange(drafted_ahead_, false);
  const absl::Status next = StartAhead(drafted);
  if (model_->chooses_tokens()) Deliver(stats);
  absl::StatusOr<VerifyResult> result = model_->FinishVerify();
  if (!next.ok()) return next;
  if (!result.ok()) return result;
  if (drafted &&
      (std::ssize(result->trees) != batch_.num_requests() || result->drafts.size() != result->trees.size())) {
    return absl::InternalError(
        fmt::format("the model drafted {} trees for {} requests", result->trees.size(), batch_.num_requests()));
  }
  if (drafted) *trees = TakeTrees(*result, stats);
  const int64_t rows = batch_.num_rows(), logits = std::ssize(result->logits);
  const bool sampled = std::ssize(result->sampled) == rows, all = logits == rows * model_->config().vocab_size;
  const bool ahead = ahead_ != Ahead::kNothing;
  if (ahead ? sampled : all || (logits == 0 && sampled && !batch_.want_logits)) return result;
  return absl::InternalError(
      fmt::format("the model returned {} logits and {} tokens for {} rows", logits, result->sampled.size(), rows));
}

absl::Status EngineCore::StartAhead(bool drafted) {
  waits_ = CouldRunAhead(1);
  if (!waits_) return absl::OkStatus();
  if (!drafted && batch_.num_rows() == batch_.num_requests() && speculator_->StaysPlain(decoding_)) {
    absl::Status next = model_->StartNext(pool_);
    if (next.ok()) ahead_ = Ahead::kRoots;
    return next;
  }
  StepPlan plan;
  plan.draft_rows = options_.max_step_tokens - static_cast<int>(decoding_.size());
  const std::optional<SelfDraft> draft = speculator_->DraftsOn(*model_, decoding_, DraftRows(plan));
  if (!draft || !CouldRunAhead(kMaxTreeNodes + draft->max_nodes)) return absl::OkStatus();
  absl::Status next = model_->StartDrafted(*draft, pool_);
  if (next.ok()) ahead_ = Ahead::kDrafted;
  return next;
}

// Of the step that was read: batch_ becomes it. Returns those of decoding_.
std::vector<DraftTree> EngineCore::TakeTrees(const VerifyResult& made, StepStats* stats) {
  VerifyBatch batch;
  for (size_t r = 0; r < made.trees.size(); ++r) batch.Add(batch_.slots[r], made.trees[r]);
  batch.want_logits = batch.want_hidden = false;
  batch_ = std::move(batch);
  stats->num_verify_rows = batch_.num_rows();
  std::vector<DraftTree> trees, drafts;
  for (const int request : requests_) {
    trees.push_back(made.trees[request]);
    drafts.push_back(made.drafts[request]);
  }
  speculator_->ObserveTrees(decoding_, trees, drafts, stats);
  return trees;
}

// Only where the step after this one is known but for its tokens: the same requests, chosen on the device in the same
// way, and nobody who waits for a place among them.
bool EngineCore::CouldRunAhead(int64_t more_tokens) {
  if (!options_.run_ahead || !model_->CanRunAhead()) return false;
  const auto requests = std::ssize(decoding_);
  if (requests != std::ssize(sequences_) || requests != batch_.num_requests()) return false;
  if (batch_.want_logits || batch_.want_hidden) return false;
  for (Sequence* sequence : decoding_) {
    if (sequence->finished() || sequence->num_tokens_left() < 2) return false;
    if (!ChosenAlike(sequence->walk_input(model_->config().eos_token_ids), more_tokens)) return false;
  }
  return true;
}

// It was not started ahead. Whether it could have been was found for the step before, if that had the same requests.
StepStart EngineCore::StartOf(const StepPlan& plan) const {
  const bool same = plan.prefill.empty() && plan.decode.size() == decoding_.size() &&
                    std::ssize(plan.decode) == batch_.num_requests();
  return waits_ && same ? StepStart::kWaited : StepStart::kAlone;
}

void EngineCore::DropFinished() {
  size_t kept = 0;
  for (size_t i = 0; i < decoding_.size(); ++i) {
    if (decoding_[i]->finished()) continue;
    decoding_[kept] = decoding_[i];
    requests_[kept++] = requests_[i];
  }
  decoding_.resize(kept);
  requests_.resize(kept);
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

std::vector<std::vector<int32_t>> EngineCore::Accept(const StepPlan& plan, std::span<const DraftTree> trees,
                                                     const VerifyResult& result, StepStats* stats) {
  const int64_t vocab_size = model_->config().vocab_size;
  const int64_t hidden_size = model_->config().hidden_size;
  std::vector<std::vector<int32_t>> paths(batch_.num_requests());
  // Rows [begin, begin + count) of one of the result's arrays, which may be missing.
  const auto rows_of = [](const auto& values, int64_t width, int64_t begin, int64_t count) {
    const bool there = std::ssize(values) >= (begin + count) * width;
    return there ? values.subspan(begin * width, count * width) : decltype(values.subspan(0, 0))();
  };
  for (const auto& sequence : sequences_) sequence->hidden_row = -1;
  for (size_t i = 0; i < trees.size(); ++i) {
    const int request = requests_[i];
    const int64_t row = batch_.row_starts[request], num_rows = trees[i].num_nodes();
    const VerifyResult rows = {.logits = rows_of(result.logits, vocab_size, row, num_rows),
                               .hidden = rows_of(result.hidden, hidden_size, row, num_rows),
                               .sampled = rows_of(result.sampled, 1, row, num_rows)};
    AcceptOne(static_cast<int>(i), trees[i], rows, &paths[request], stats);
    if (!paths[request].empty()) decoding_[i]->hidden_row = static_cast<int>(row) + paths[request].back();
  }
  size_t request = plan.decode.size();
  for (const PromptChunk& chunk : plan.score) {
    const int64_t row = batch_.row_starts[request];
    paths[request++] = ScorePrompt(chunk, result.logits.subspan(row * vocab_size, chunk.num_tokens * vocab_size));
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

}  // namespace linspec
