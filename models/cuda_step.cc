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
