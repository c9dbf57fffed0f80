// Chains of a draft model, all levels in one graph. The first level takes each task's known tokens, every further one
// the token chosen before it, one row a task. What the levels leave in kept_kv_ stands as a verified tree of those
// tokens would: a task's rows in a row, its first level's and then one of each level, so that attention sees a chain
// and commit takes any beginning of it. Everything that differs between calls of one size is data in one block.
#include <algorithm>

#include "kernels/cuda/device_model.h"
#include "kernels/cuda/draft_kernels.h"

namespace linspec::cuda {
namespace {

constexpr int kMostKnown =
    8;  // rows of a task at the first level, beyond the pending one's: sizes would only make graphs

}  // namespace

DeviceModel::ChainLayout DeviceModel::LayoutOf(const ChainSize& size) {
  const int64_t all = size.Row(size.levels);
  ChainLayout at{};
  at.tasks = AlignedBytes<LinspecCudaDraftRow>(size.tasks);
  at.tokens = at.tasks + AlignedBytes<Task>(int64_t{size.levels} * size.tasks);
  at.positions = at.tokens + AlignedBytes<int32_t>(size.first_rows);
  at.kept = at.positions + AlignedBytes<int64_t>(all);
  at.size = at.kept + AlignedBytes<int32_t>(all);
  return at;
}

int32_t DeviceModel::CheckChains(const LinspecCudaChainStep& step) const {
  bool valid = step.num_tasks >= 1 && step.states.base != nullptr && step.num_levels >= 1 &&
               step.num_levels <= LINSPEC_CUDA_MAX_DRAFT_LEVELS && step.top_k >= 1 &&
               step.top_k <= LINSPEC_CUDA_MAX_DRAFT_CANDIDATES && !in_flight();
  const int32_t* token = step.tokens;
  for (int r = 0; valid && r < step.num_tasks; ++r) {
    const int rows = step.tasks[r].num_rows;
    valid = rows >= 1 && rows <= kMostKnown;
    for (int i = 0; valid && i < rows; ++i, ++token) valid = *token >= 0 && *token < shape_.vocab_size;
  }
  if (valid) return kLinspecCudaOk;
  return context_->Fail(kLinspecCudaInvalid, "chains: tasks, levels, candidates or tokens out of range");
}

int32_t DeviceModel::ReserveChains(const ChainSize& size, int64_t block_bytes, int64_t candidate_bytes) {
  const int rows = std::max(size.first_rows, size.tasks);
  LINSPEC_CUDA_TRY(ReserveVerify(rows, size.Row(size.levels)));
  LINSPEC_CUDA_TRY(chain_tokens_.Reserve(context_, AlignedBytes<int32_t>(size.tasks)));
  LINSPEC_CUDA_TRY(chain_block_.Reserve(context_, block_bytes));
  LINSPEC_CUDA_TRY(host_chain_block_.Reserve(context_, block_bytes));
  LINSPEC_CUDA_TRY(candidates_.Reserve(context_, candidate_bytes));
  return host_candidates_.Reserve(context_, candidate_bytes);
}

void DeviceModel::PackChains(const LinspecCudaChainStep& step, const ChainSize& size, std::byte* host) {
  const ChainLayout at = LayoutOf(size);
  auto* rows = reinterpret_cast<LinspecCudaDraftRow*>(host + at.rows);
  auto* tasks = reinterpret_cast<Task*>(host + at.tasks);
  auto* tokens = reinterpret_cast<int32_t*>(host + at.tokens);
  auto* positions = reinterpret_cast<int64_t*>(host + at.positions);
  auto* kept_rows = reinterpret_cast<int32_t*>(host + at.kept);
  LinspecCudaDraftRow nobody = {};
  nobody.hidden_row = -1;
  std::fill_n(rows, size.tasks, nobody);
  std::fill_n(tasks, size.levels * size.tasks, Task{0, -1, 0, 0, 0, 0});
  std::fill_n(tokens, size.first_rows, 0);
  std::fill_n(positions, size.Row(size.levels), 0);
  std::fill_n(kept_rows, size.Row(size.levels), -1);
  int row = 0, kept = 0;  // of the task: its first in the first level, and in what is kept
  for (int r = 0; r < step.num_tasks; ++r) {
    const LinspecCudaTask& task = step.tasks[r];
    const int known = task.num_rows;
    rows[r] = step.rows[r];
    rows[r].hidden_row = row + known - 1;
    std::copy_n(step.tokens + row, known, tokens + row);
    for (int i = 0; i < known + size.levels - 1; ++i) {
      const int to = i < known ? row + i : size.Row(i - known + 1) + r;
      positions[to] = task.length + i;
      kept_rows[to] = kept + i;
    }
    for (int level = 0; level < size.levels; ++level) {
      const int last = known + level - 1;  // computed from the second level on, into row r
      tasks[level * size.tasks + r] = {
          task.length, task.slot, kept, last + 1, 0, 0, level == 0 ? kept - row : kept + last - r};
    }
    row += known;
    kept += known + size.levels - 1;
  }
}

void DeviceModel::EnqueueChains(const ChainSize& size, const LinspecCudaStates& states) {
  const ChainLayout at = LayoutOf(size);
  auto* block = chain_block_.as<std::byte>();
  const DraftInput drafted{
      .rows = reinterpret_cast<const LinspecCudaDraftRow*>(block + at.rows), .hidden = nullptr, .num_rows = size.tasks};
  for (int level = 0; level < size.levels; ++level) {
    const bool first = level == 0;
    const StepInput input{
        .tasks = reinterpret_cast<const Task*>(block + at.tasks) + int64_t{level} * size.tasks,
        .tokens = first ? reinterpret_cast<const int32_t*>(block + at.tokens) : chain_tokens_.as<int32_t>(),
        .positions = reinterpret_cast<const int64_t*>(block + at.positions) + size.Row(level),
        .ancestors = nullptr,
        .sampling = nullptr,
        .edits = nullptr,
        .num_tasks = size.tasks,
        .num_rows = first ? size.first_rows : size.tasks,
        .max_rows = size.max_known + level,
        .num_groups = 0,
        .kept_rows = reinterpret_cast<const int32_t*>(block + at.kept) + size.Row(level),
        .last_rows = first ? 0 : 1};
    Layers(input, states, Attention::kVerify);
    Logits(input.num_rows, nullptr);
    LaunchChooseDraft(
        {.input = drafted,
         .logits = logits(),
         .vocab = shape_.vocab_size,
         .first_level = level,
         .num_levels = 1,
         .top_k = size.top_k,
         .candidates = candidates_.as<LinspecCudaDraftCandidate>() + int64_t{level} * size.tasks * size.top_k,
         .next_tokens = chain_tokens_.as<int32_t>(),
         .at_hidden_row = first},
        context_->stream());
  }
}

int32_t DeviceModel::DraftChains(const LinspecCudaChainStep& step, LinspecCudaDraftResult* result) {
  LINSPEC_CUDA_TRY(context_->Enter());
  LINSPEC_CUDA_TRY(CheckChains(step));
  int known = 0, most = 1;
  for (int r = 0; r < step.num_tasks; ++r) {
    known += step.tasks[r].num_rows;
    most = std::max(most, step.tasks[r].num_rows);
  }
  const ChainSize size{.tasks = RowBucket(step.num_tasks),
                       .first_rows = RowBucket(known),
                       .levels = step.num_levels,
                       .top_k = step.top_k,
                       .max_known = most > 1 ? kMostKnown : 1};
  const int64_t block_bytes = LayoutOf(size).size;
  const int64_t candidate_bytes =
      AlignedBytes<LinspecCudaDraftCandidate>(int64_t{size.levels} * size.tasks * size.top_k);
  LINSPEC_CUDA_TRY(ReserveChains(size, block_bytes, candidate_bytes));
  PackChains(step, size, host_chain_block_.as<std::byte>());
  uint64_t stamp = reinterpret_cast<uintptr_t>(step.states.base) + ScratchStamp();
  for (const Buffer* buffer : {&chain_block_, &chain_tokens_, &candidates_, &host_chain_block_, &host_candidates_}) {
    stamp += buffer->generation();
  }
  const auto enqueue = [&]() -> int32_t {
    const cudaStream_t stream = context_->stream();
    LINSPEC_CUDA_TRY(context_->Check(cudaMemcpyAsync(chain_block_.as<void>(), host_chain_block_.as<void>(), block_bytes,
                                                     cudaMemcpyHostToDevice, stream),
                                     "upload chains"));
    EnqueueChains(size, step.states);
    LINSPEC_CUDA_TRY(context_->CheckLaunch("chains"));
    return context_->Check(cudaMemcpyAsync(host_candidates_.as<void>(), candidates_.as<void>(), candidate_bytes,
                                           cudaMemcpyDeviceToHost, stream),
                           "download chains");
  };
  const int kernels = (size.tasks << 16 | size.first_rows) * 4 + (size.levels > 1 ? 2 : 0) + (size.max_known > 1);
  LINSPEC_CUDA_TRY(chain_graphs_.Run({size.tasks, size.first_rows, size.levels, size.top_k, size.max_known}, kernels,
                                     stamp, enqueue));
  LINSPEC_CUDA_TRY(context_->Sync("chains"));
  *result = {.candidates = host_candidates_.as<LinspecCudaDraftCandidate>(), .row_stride = size.tasks, .reserved = 0};
  return kLinspecCudaOk;
}

}  // namespace linspec::cuda
