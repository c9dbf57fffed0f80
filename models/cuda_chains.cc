#include "models/cuda_chains.h"

#include <fmt/format.h>

#include <utility>
#include <vector>

#include "models/cuda_draft.h"
#include "models/cuda_memory.h"
#include "models/cuda_step.h"
#include "models/verify_batch.h"

namespace linspec {
namespace {

class CudaChains final : public DraftChains {
 public:
  explicit CudaChains(const Model& draft) : handle_(draft.cuda()), vocab_size_(draft.config().vocab_size) {}
  int max_levels() const override { return LINSPEC_CUDA_MAX_DRAFT_LEVELS; }
  int max_top_k() const override { return LINSPEC_CUDA_MAX_DRAFT_CANDIDATES; }

  absl::StatusOr<DraftGuesses> Guess(const VerifyBatch& known, const StatePool& pool,
                                     std::span<const DraftContext* const> contexts, int num_levels,
                                     int top_k) override {
    if (absl::Status valid = CheckBatch(known, vocab_size_, pool.capacity()); !valid.ok()) return valid;
    if (static_cast<int>(contexts.size()) != known.num_requests()) {
      return absl::InternalError(
          fmt::format("chains: {} contexts, {} requests", contexts.size(), known.num_requests()));
    }
    std::vector<LinspecCudaTask> tasks;
    std::vector<LinspecCudaDraftRow> rows;
    for (int r = 0; r < known.num_requests(); ++r) {
      tasks.push_back(TaskOf(known, r, pool.length(known.slots[r])));
      rows.push_back(DraftRowOf(*contexts[r]));
    }
    const LinspecCudaChainStep step{.states = StatesOf(pool),
                                    .tasks = tasks.data(),
                                    .tokens = known.tokens.data(),
                                    .rows = rows.data(),
                                    .num_tasks = known.num_requests(),
                                    .num_levels = num_levels,
                                    .top_k = top_k,
                                    .reserved = 0};
    LinspecCudaDraftResult result = {};
    absl::Status drafted =
        handle_.device->Check(handle_.device->api().draft_chains(handle_.model, &step, &result), "draft chains");
    if (!drafted.ok()) return drafted;
    DraftGuesses guesses{num_levels, top_k, {}};
    guesses.candidates.resize(contexts.size() * num_levels * top_k);
    ReadCandidates(result, 0, contexts.size(), &guesses);
    looked_at_.Set(LookedAt(known, guesses), pool);
    return guesses;
  }

  absl::Status Commit(const VerifyBatch& looked_at, std::span<const std::vector<int32_t>> paths,
                      StatePool* pool) override {
    return CommitPaths(handle_, &looked_at_, looked_at, paths, pool);
  }

 private:
  const CudaHandle handle_;
  const int64_t vocab_size_;
  VerifiedBatch looked_at_;
};

}  // namespace

std::unique_ptr<DraftChains> MakeCudaChains(const Model& draft) {
  if (draft.cuda().model == nullptr) return nullptr;
  return std::make_unique<CudaChains>(draft);
}

}  // namespace linspec
