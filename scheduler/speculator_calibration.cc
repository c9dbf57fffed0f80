// Start-up measurements of the speculator: what verify steps and drafts cost on this machine with these models.
#include <algorithm>
#include <array>

#include "scheduler/speculator.h"
#include "scheduler/warm_up.h"

namespace linspec {
namespace {

constexpr int kWarmUps = 2, kRepetitions = 3;  // a GPU prepares for a new size twice: launched, then captured
constexpr double kBudgetSeconds = 0.5;         // of the whole calibration; what is left out is extrapolated
constexpr int kProbeRequests[] = {4, 16, 64};  // to tell the cost of a request from that of a row
constexpr int kMostRows = 256;
constexpr int kContext = 80;
constexpr int kScratchNodes[] = {5, 2};  // for drafts of four levels, and of one
constexpr int kMostContexts = 256;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::vector<int32_t> SomeTokens(int count, int64_t vocab_size) {
  std::vector<int32_t> tokens(count);
  for (int i = 0; i < count; ++i) tokens[i] = static_cast<int32_t>((i * 7919LL + 13) % vocab_size);
  return tokens;
}

DraftTree SomeChain(int rows, int64_t vocab_size) {
  const std::vector<int32_t> tokens = SomeTokens(rows, vocab_size);
  DraftTree chain = DraftTree::Root(tokens[0]);
  for (int i = 1; i < rows; ++i) chain.Add(tokens[i], i - 1);
  return chain;
}

// Seconds of verifying and committing `rows` rows for each slot, as the engine does it; the second fastest of a few
// times, since interruptions only add.
absl::StatusOr<double> TimeStep(Model* model, StatePool* pool, std::span<const StateSlot> slots, int rows) {
  VerifyBatch batch;
  const DraftTree chain = SomeChain(rows, model->config().vocab_size);
  for (const StateSlot& slot : slots) batch.Add(slot.id(), chain);
  if (model->chooses_tokens()) {
    batch.sampling.resize(batch.num_rows());
    batch.want_logits = batch.want_hidden = false;
  }
  const std::vector<std::vector<int32_t>> paths(slots.size(), {0});
  std::array<double, kRepetitions> seconds;
  for (int i = -kWarmUps; i < kRepetitions; ++i) {
    const Clock::time_point start = Clock::now();
    if (auto result = model->Verify(batch, *pool); !result.ok()) return result.status();
    if (absl::Status status = model->Commit(batch, paths, pool); !status.ok()) return status;
    seconds[std::max(i, 0)] = SecondsSince(start);
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[1];
}

}  // namespace

absl::Status Speculator::Calibrate(Model* model, StatePool* pool) {
  const Clock::time_point start = Clock::now();
  std::vector<StateSlot> slots;
  slots.push_back(pool->Acquire());
  if (auto warm_up = TimeStep(model, pool, slots, 1); !warm_up.ok()) return warm_up.status();
  for (int rows = 1; rows <= kMaxTreeNodes && SecondsSince(start) < kBudgetSeconds; rows *= 2) {
    const absl::StatusOr<double> seconds = TimeStep(model, pool, slots, rows);
    if (!seconds.ok()) return seconds.status();
    controller_.step_costs().Calibrate(rows, *seconds);
  }
  for (const int requests : kProbeRequests) {
    // The first is always measured, the others where there is time.
    if (requests > kProbeRequests[0] && SecondsSince(start) > kBudgetSeconds / 4) break;
    while (std::ssize(slots) < requests && pool->num_free() > 0) slots.push_back(pool->Acquire());
    if (std::ssize(slots) < requests) break;
    if (absl::Status status = CalibrateRequests(model, pool, slots); !status.ok()) return status;
  }
  const std::vector<float> hidden(model->config().hidden_size, 1.0f);
  for (size_t d = 0; d < drafters_.size(); ++d) CalibrateDrafter(static_cast<int>(d), pool->capacity(), hidden);
  return absl::OkStatus();
}

// Rows of many requests against as many of one, and steps larger than one request's.
absl::Status Speculator::CalibrateRequests(Model* model, StatePool* pool, std::span<const StateSlot> slots) {
  const int requests = static_cast<int>(slots.size());
  const absl::StatusOr<double> apart = TimeStep(model, pool, slots, 1);
  if (!apart.ok()) return apart.status();
  const double together = controller_.step_costs().Estimate(requests, 1);
  const double per_request = std::max(*apart - together, 0.0) / (requests - 1);
  controller_.step_costs().CalibratePerRequest(per_request);
  for (int rows = 2 * kMaxTreeNodes; rows <= kMostRows && requests >= kMaxTreeNodes; rows *= 2) {
    const absl::StatusOr<double> seconds = TimeStep(model, pool, slots, rows / requests);
    if (!seconds.ok()) return seconds.status();
    controller_.step_costs().Calibrate(rows, *seconds - per_request * (requests - 1));
  }
  return absl::OkStatus();
}

// A drafter that fails here is not used until a probe succeeds. REQUIRES: the model has verified a row.
void Speculator::CalibrateDrafter(int drafter, int max_contexts, std::span<const float> hidden) {
  const Clock::time_point start = Clock::now();
  TimeDrafts(drafter, 1, hidden, /*counted=*/false);  // a GPU loads its kernels
  for (int count = 1; count <= std::min(max_contexts, kMostContexts) && SecondsSince(start) < kBudgetSeconds / 2;
       count *= 2) {
    TimeDrafts(drafter, count, hidden, /*counted=*/true);
  }
}

// Each round shows every context a little more text, so the catch-up is that of normal use; the first round, with its
// long catch-up, tells the cost of a token. The first of each size is not counted: a GPU still prepares for it.
void Speculator::TimeDrafts(int drafter, int count, std::span<const float> hidden, bool counted) {
  constexpr int kRounds = kRepetitions + 1;  // of each size
  const std::vector<int32_t> text = SomeTokens(kContext + 2 * 2 * kRounds, vocab_size_);
  SamplingParams greedy;
  greedy.temperature = 0;
  for (int round = 0; round <= 2 * kRounds; ++round) {
    std::vector<DraftContext> contexts;
    const std::span<const int32_t> tokens = std::span(text).first(kContext + 2 * round);
    for (int i = 0; i < count; ++i) {
      contexts.push_back({.sequence_id = kScratchSequence + i,
                          .tokens = tokens,
                          .num_prompt_tokens = kContext,
                          .sampling = &greedy,
                          .hidden = hidden,
                          .hidden_row = 0,
                          .max_nodes = kScratchNodes[round > kRounds]});
    }
    const int64_t unread = round > 0 ? 2 : std::ssize(tokens);
    const Clock::time_point proposed = Clock::now();
    const auto trees = drafters_[drafter]->Propose(contexts);
    const double seconds = SecondsSince(proposed);
    if (!trees.ok()) break;
    int levels = drafters_[drafter]->levels_computed();
    for (const DraftTree& tree : *trees) {
      if (tree.Validate(vocab_size_).ok()) levels = std::max(levels, tree.Depth());
    }
    if (!counted || round == 1 || round == kRounds + 1) continue;
    controller_.draft_costs(drafter).Observe(count, levels, drafters_[drafter]->catches_up() ? unread * count : 0,
                                             seconds);
  }
  for (int i = 0; i < count; ++i) drafters_[drafter]->Forget(kScratchSequence + i);
}

}  // namespace linspec
