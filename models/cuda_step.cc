#include "models/cuda_step.h"

#include "models/cuda_memory.h"

namespace linspec {

LinspecCudaTask TaskOf(const VerifyBatch& batch, int request, int64_t length) {
  return {.length = length,
          .slot = batch.slots[request],
          .row_begin = batch.row_starts[request],
          .num_rows = NumNodes(batch, request),
          .path_begin = 0,
          .path_length = 0,
          .reserved = 0};
}

LinspecCudaStep CudaStep::Fill(const VerifyBatch& batch, const StatePool& pool) {
  tasks_.clear();
  positions_.clear();
  ancestors_.clear();
  sampling_.clear();
  edits_.clear();
  for (int r = 0; r < batch.num_requests(); ++r) {
    const int32_t begin = batch.row_starts[r];
    const int64_t length = pool.length(batch.slots[r]);
    tasks_.push_back(TaskOf(batch, r, length));
    for (int32_t row = begin; row < batch.row_starts[r + 1]; ++row) {
      const int32_t parent = batch.parents[row];
      ancestors_.push_back((parent < 0 ? 0 : ancestors_[begin + parent]) | uint64_t{1} << (row - begin));
      positions_.push_back(parent < 0 ? length : positions_[begin + parent] + 1);
    }
  }
  for (const RowSampling& row : batch.sampling) {
    sampling_.push_back({.seed = row.seed,
                         .position = row.position,
                         .temperature = row.temperature,
                         .top_p = row.top_p,
                         .min_p = row.min_p,
                         .top_k = row.top_k,
                         .edits_begin = row.edits_begin,
                         .edits_count = row.edits_count});
  }
  for (const LogitEdit& edit : batch.edits) edits_.push_back({edit.token, edit.bias, edit.repetition, edit.subtract});
  LinspecCudaStep step = {};
  step.states = StatesOf(pool);
  step.tasks = tasks_.data();
  step.tokens = batch.tokens.data();
  step.positions = positions_.data();
  step.ancestors = ancestors_.data();
  step.sampling = sampling_.empty() ? nullptr : sampling_.data();
  step.edits = edits_.data();
  step.num_tasks = batch.num_requests();
  step.num_rows = batch.num_rows();
  step.num_edits = static_cast<int32_t>(edits_.size());
  step.want_logits = batch.want_logits || sampling_.empty();
  step.want_hidden = batch.want_hidden;
  return step;
}

absl::Status CommitPaths(const CudaHandle& handle, VerifiedBatch* verified, const VerifyBatch& batch,
                         std::span<const std::vector<int32_t>> paths, StatePool* pool) {
  if (absl::Status valid = verified->CheckCommit(batch, paths, *pool); !valid.ok()) return valid;
  std::vector<LinspecCudaTask> tasks;
  std::vector<int32_t> nodes;
  for (int r = 0; r < batch.num_requests(); ++r) {
    if (paths[r].empty()) continue;
    tasks.push_back(TaskOf(batch, r, verified->lengths[r]));
    tasks.back().path_begin = static_cast<int32_t>(nodes.size());
    tasks.back().path_length = static_cast<int32_t>(paths[r].size());
    nodes.insert(nodes.end(), paths[r].begin(), paths[r].end());
  }
  *verified = {};
  if (tasks.empty()) return absl::OkStatus();
  const LinspecCudaStates states = StatesOf(*pool);
  const int32_t code =
      handle.device->api().commit(handle.model, &states, tasks.data(), static_cast<int32_t>(tasks.size()), nodes.data(),
                                  static_cast<int32_t>(nodes.size()));
  if (absl::Status status = handle.device->Check(code, "commit"); !status.ok()) return status;
  for (const LinspecCudaTask& task : tasks) pool->set_length(task.slot, task.length + task.path_length);
  return absl::OkStatus();
}

}  // namespace linspec
