#include "scheduler/warm_up.h"

#include <algorithm>
#include <chrono>

#include "models/draft_guesser.h"

namespace linspec {
namespace {

constexpr int64_t kMostBytes = int64_t{192} << 20;  // of what models/cuda_capacity.cc keeps for graphs and kernels
constexpr int kTimes = 2;                           // a size is launched, its kernels loaded, and then captured
constexpr int kFewContexts = 16;
constexpr int kMostLevels = 8, kMostLevelsOfMany = 4;  // more do not pay beside many other requests
constexpr int kContexts[] = {1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256};
constexpr int kNewTokens[] = {1, 2, 4};  // of a sequence since its last draft; 4 where contexts are few
constexpr int kContext = 3;              // tokens that a sequence begins with: they ride along

class WarmUpRun {
 public:
  WarmUpRun(Model* model, StatePool* pool, const EngineOptions& options)
      : model_(model), pool_(pool), options_(options), free_bytes_(model->free_device_bytes()) {}

  absl::Status Verify(std::span<const VerifySize> sizes);
  void Draft(Drafter* drafter);
  WarmUpReport Report() {
    report_.seconds = Seconds();
    report_.bytes = std::max<int64_t>(free_bytes_ - model_->free_device_bytes(), 0);
    return report_;
  }

 private:
  double Seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }
  bool Enough() const {
    return full_ || Seconds() > options_.warm_up_s || free_bytes_ - model_->free_device_bytes() > kMostBytes;
  }
  absl::Status VerifyOne(const VerifySize& size);
  // Drafts for so many sequences, each new_tokens longer every time, with more and more levels. False: it failed.
  bool DraftLevels(Drafter* drafter, int contexts, int new_tokens, int first_level, int last_level);
  // Steps for which the model drafts itself, if it can with this drafter.
  absl::Status DraftAhead(const Drafter& drafter, int contexts, int last_level);
  void AcquireSlots(int count);

  Model* const model_;
  StatePool* const pool_;
  const EngineOptions& options_;
  const int64_t free_bytes_;
  const Clock::time_point start_ = Clock::now();
  bool full_ = false;  // the device has no memory left
  std::vector<StateSlot> slots_;
  WarmUpReport report_;
};

void WarmUpRun::AcquireSlots(int count) {
  while (std::ssize(slots_) < count && pool_->num_free() > 0) slots_.push_back(pool_->Acquire());
}

absl::Status WarmUpRun::VerifyOne(const VerifySize& size) {
  VerifyBatch batch;
  int rows = size.rows;
  for (int r = 0; r < size.requests; ++r) {
    const int others = size.requests - r - 1;
    DraftTree tree = DraftTree::Root(0);
    while (tree.num_nodes() < std::min(size.largest_tree, rows - others)) tree.Add(0, tree.num_nodes() - 1);
    rows -= tree.num_nodes();
    batch.Add(slots_[r].id(), tree);
  }
  batch.sampling.resize(batch.num_rows());
  batch.want_logits = batch.want_hidden = false;
  // Behind a plain step the one that is started before that is read: another graph.
  const bool ahead = options_.run_ahead && model_->CanRunAhead() && size.rows == size.requests;
  absl::Status status;
  for (int i = 0; i < kTimes && status.ok(); ++i) {
    status = model_->StartVerify(batch, *pool_);
    if (!status.ok()) break;
    if (ahead) status = model_->StartNext(pool_);
    const int started = ahead && status.ok() ? 2 : 1;
    for (int step = 0; step < started; ++step) status.Update(model_->FinishVerify().status());
  }
  return status;
}

absl::Status WarmUpRun::Verify(std::span<const VerifySize> sizes) {
  for (const VerifySize& size : sizes) {
    AcquireSlots(size.requests);
    if (Enough() || std::ssize(slots_) < size.requests) {
      ++report_.left_out;
      continue;
    }
    const absl::Status status = VerifyOne(size);
    full_ |= absl::IsResourceExhausted(status);
    if (!status.ok() && !full_) return status;
    ++(full_ ? report_.left_out : report_.sizes);
  }
  return absl::OkStatus();
}

bool WarmUpRun::DraftLevels(Drafter* drafter, int contexts, int new_tokens, int first_level, int last_level) {
  const int calls = 1 + kTimes * (last_level - first_level + 1);  // before them one that takes in the beginning
  const std::vector<int32_t> text(kContext + calls * new_tokens, 0);
  const std::vector<float> hidden(drafter->reads_hidden() ? model_->config().hidden_size : 0, 1.0f);
  SamplingParams greedy;
  greedy.temperature = 0;
  bool ok = true;
  for (int call = 0; call < calls && ok; ++call) {
    std::vector<DraftContext> drafted(contexts, {.sequence_id = kScratchSequence,
                                                 .tokens = std::span(text).first(kContext + call * new_tokens),
                                                 .num_prompt_tokens = kContext,
                                                 .sampling = &greedy,
                                                 .hidden = hidden,
                                                 .hidden_row = 0,
                                                 .max_nodes = kMaxTreeNodes,
                                                 .max_levels = first_level + std::max(call - 1, 0) / kTimes});
    for (int i = 0; i < contexts; ++i) drafted[i].sequence_id += i;
    ok = drafter->Propose(drafted).ok();
  }
  for (int i = 0; i < contexts; ++i) drafter->Forget(kScratchSequence + i);
  return ok;
}

absl::Status WarmUpRun::DraftAhead(const Drafter& drafter, int contexts, int last_level) {
  const DraftHeads heads = drafter.heads();
  const bool can = heads.heads != nullptr && model_->CanDraftWith(*heads.heads, contexts);
  AcquireSlots(contexts);
  if (!options_.run_ahead || !can || std::ssize(slots_) < contexts) return absl::OkStatus();
  VerifyBatch roots;
  for (int r = 0; r < contexts; ++r) roots.Add(slots_[r].id(), DraftTree::Root(0));
  roots.sampling.resize(contexts);
  roots.want_logits = roots.want_hidden = false;
  absl::Status status;
  last_level = std::min(last_level, heads.heads->max_levels());
  for (int level = 1; level <= last_level && status.ok() && !Enough(); ++level) {
    status = model_->StartVerify(roots, *pool_);
    if (!status.ok()) break;
    status = model_->StartDrafted({.heads = heads.heads,
                                   .num_levels = level,
                                   .top_k = heads.top_k,
                                   .num_rows = 2 * contexts,
                                   .max_nodes = std::max(options_.max_draft_nodes, 2)},
                                  pool_);
    const int started = status.ok() ? 2 : 1;
    for (int step = 0; step < started; ++step) status.Update(model_->FinishVerify().status());
  }
  return status;
}

void WarmUpRun::Draft(Drafter* drafter) {
  std::vector<int> sizes;
  for (const int contexts : kContexts) {
    if (contexts <= pool_->capacity()) sizes.push_back(contexts);
  }
  // Memory that the largest makes room for serves the others: graphs hold addresses, so it must not move.
  const int most = kMostLevelsOfMany;
  bool works = Enough() || DraftLevels(drafter, sizes.back(), kNewTokens[1], most, most);
  for (const int contexts : sizes) {
    const int levels = contexts <= kFewContexts ? kMostLevels : kMostLevelsOfMany;
    for (const int new_tokens : kNewTokens) {
      const bool differs = new_tokens == 1 || (drafter->catches_up() && (new_tokens == 2 || contexts <= kFewContexts));
      if (!differs) continue;
      const bool done = works && !Enough() && DraftLevels(drafter, contexts, new_tokens, 1, levels) &&
                        DraftAhead(*drafter, contexts, levels).ok();
      works &= done || Enough();
      (done ? report_.sizes : report_.left_out) += levels;
    }
  }
}

}  // namespace

absl::StatusOr<WarmUpReport> WarmUp(Model* model, StatePool* pool, std::span<const std::unique_ptr<Drafter>> drafters,
                                    const EngineOptions& options) {
  if (options.warm_up_s <= 0) return WarmUpReport{};
  const int max_rows = static_cast<int>(std::min<int64_t>(options.max_step_tokens, model->MaxVerifyRows(*pool)));
  const std::vector<VerifySize> sizes = model->WarmUpSizes(options.max_requests, max_rows, options.max_draft_nodes);
  if (sizes.empty()) return WarmUpReport{};
  WarmUpRun run(model, pool, options);
  if (absl::Status status = run.Verify(sizes); !status.ok()) return status;
  for (const auto& drafter : drafters) {
    if (!drafter->costs_nothing()) run.Draft(drafter.get());
  }
  return run.Report();
}

}  // namespace linspec
