// A step that follows another before the host has read that: acceptance, commit, draft heads, trees and verification in
// a row on the stream (follow.h). Nothing is uploaded: what a step knows of its requests stands in its block, and the
// next one's is written in its place.
#include <algorithm>
#include <utility>

#include "kernels/cuda/device_drafter.h"
#include "kernels/cuda/device_model.h"
#include "kernels/cuda/follow.h"

namespace linspec::cuda {
namespace {

constexpr int kTasks = LINSPEC_CUDA_MAX_FOLLOW_TASKS;

constexpr int64_t Align(int64_t bytes) { return (bytes + 255) / 256 * 256; }

template <typename T>
constexpr int64_t Bytes(int64_t count) {
  return Align(count * static_cast<int64_t>(sizeof(T)));
}

// Of what acceptance leaves, for as many tasks as there may be: one place for all steps.
constexpr int64_t kPathsAt = Bytes<Task>(kTasks), kRowsAt = kPathsAt + Bytes<int32_t>(kTasks * kPathStride),
                  kRootsAt = kRowsAt + Bytes<LinspecCudaDraftRow>(kTasks),
                  kCallAt = kRootsAt + Bytes<LinspecCudaSampling>(kTasks), kHiddenAt = kCallAt + Bytes<uint32_t>(1),
                  kAcceptedBytes = kHiddenAt + Bytes<const float*>(1);

Accepted AcceptedAt(std::byte* block) {
  return {.tasks = reinterpret_cast<Task*>(block),
          .paths = reinterpret_cast<int32_t*>(block + kPathsAt),
          .rows = reinterpret_cast<LinspecCudaDraftRow*>(block + kRowsAt),
          .roots = reinterpret_cast<LinspecCudaSampling*>(block + kRootsAt),
          .call = reinterpret_cast<uint32_t*>(block + kCallAt)};
}

}  // namespace

int32_t DeviceModel::CheckFollow(const DeviceDrafter& drafter, const LinspecCudaFollow& follow) {
  if (num_in_flight_ != 1 || !last_.chosen || last_.num_tasks > kTasks || &drafter.target() != this) {
    return context_->Fail(kLinspecCudaInvalid, "only one step that is chosen can be followed, by heads of its model");
  }
  const bool valid = follow.num_levels >= 1 && follow.num_levels <= drafter.max_levels() && follow.top_k >= 1 &&
                     follow.top_k <= LINSPEC_CUDA_MAX_DRAFT_CANDIDATES &&
                     follow.num_levels * follow.top_k <= LINSPEC_CUDA_MAX_FOLLOW_CANDIDATES &&
                     follow.num_rows >= last_.num_tasks && follow.num_rows <= kMaxGraphRows && follow.max_nodes >= 2 &&
                     follow.max_nodes <= LINSPEC_CUDA_MAX_FOLLOW_NODES;
  return valid ? kLinspecCudaOk : context_->Fail(kLinspecCudaInvalid, "follow: levels, rows or nodes out of range");
}

int32_t DeviceModel::VerifyFollow(DeviceDrafter* drafter, const LinspecCudaFollow& follow) {
  LINSPEC_CUDA_TRY(context_->Enter());
  LINSPEC_CUDA_TRY(CheckFollow(*drafter, follow));
  LINSPEC_CUDA_TRY(ReserveAccepted());
  LINSPEC_CUDA_TRY(BeginStep());
  const int num_tasks = last_.input.num_tasks;
  const Accepted accepted = AcceptedAt(accepted_.as<std::byte>());
  const StepArrays before = ArraysOf(num_tasks, last_.input.num_rows);
  LaunchAccept(before, sampled_.as<int32_t>(), num_tasks, drafter->NextCall(), accepted, context_->stream());
  LINSPEC_CUDA_TRY(CommitOnDevice(accepted.tasks, accepted.paths, &accepted_layers_));
  DraftGuesses guesses;
  LINSPEC_CUDA_TRY(
      drafter->Guess({.rows = accepted.rows,
                      .hidden = reinterpret_cast<const float* const*>(accepted_.as<std::byte>() + kHiddenAt),
                      .call = accepted.call,
                      .stamp = static_cast<uint64_t>(accepted_.generation())},
                     last_.num_tasks, follow.num_levels, follow.top_k, &guesses));
  LINSPEC_CUDA_TRY(MakeTrees(follow, guesses));
  return StartLast(/*advanced=*/false, /*logits=*/false, /*hidden=*/false);
}

int32_t DeviceModel::ReserveAccepted() {
  LINSPEC_CUDA_TRY(accepted_.Reserve(context_, kAcceptedBytes));
  const float* hidden = hidden_.as<float>();
  if (std::exchange(accepted_hidden_, hidden) == hidden) return kLinspecCudaOk;
  // From pageable memory, which is free again when the call returns.
  return context_->Check(cudaMemcpyAsync(accepted_.as<std::byte>() + kHiddenAt, &hidden, sizeof(hidden),
                                         cudaMemcpyHostToDevice, context_->stream()),
                         "upload an address");
}

// In the block of the step that is followed, which nobody reads any more.
int32_t DeviceModel::MakeTrees(const LinspecCudaFollow& follow, const DraftGuesses& guesses) {
  const int num_tasks = PowerOfTwo(last_.num_tasks), num_rows = VerifyRows(follow.num_rows);
  const int64_t block_bytes = LayoutOf(num_tasks, num_rows, true).size;
  const int64_t nodes_at = Bytes<Task>(num_tasks),
                made_bytes = nodes_at + Bytes<LinspecCudaTreeNode>(num_tasks * LINSPEC_CUDA_MAX_FOLLOW_NODES);
  // What is in the way of growth has been queued, and is waited for.
  LINSPEC_CUDA_TRY(ReserveScratch(VerifySizes(num_rows, num_rows)));
  kept_rows_ = std::max<int64_t>(kept_rows_, num_rows);
  LINSPEC_CUDA_TRY(verify_block_.Reserve(context_, block_bytes));
  LINSPEC_CUDA_TRY(made_.Reserve(context_, made_bytes));
  const LinspecCudaStates states = last_.states;
  last_ = {.input = {},
           .states = states,
           .num_tasks = last_.num_tasks,
           .num_rows = follow.num_rows,
           .graph = true,
           .chosen = true,
           .made = true};
  last_.input = ViewsOf(num_tasks, num_rows, TreeBucket(follow.max_nodes), verify_block_.as<std::byte>());
  hidden_rows_ = follow.num_rows;
  auto* made = made_.as<std::byte>();
  LaunchTrees({.accepted = AcceptedAt(accepted_.as<std::byte>()),
               .candidates = guesses.candidates,
               .row_stride = guesses.row_stride,
               .num_levels = follow.num_levels,
               .top_k = follow.top_k,
               .chain = guesses.chain,
               .group_size = shape_.group_size,
               .num_tasks = num_tasks,
               .num_rows = num_rows,
               .most_rows = follow.num_rows,
               .most_nodes = follow.max_nodes,
               .step = ArraysOf(num_tasks, num_rows),
               .edits = edits_.as<LinspecCudaLogitEdit>(),
               .step_edits = const_cast<const LinspecCudaLogitEdit**>(last_.input.edits),
               .made_tasks = reinterpret_cast<Task*>(made),
               .made_nodes = reinterpret_cast<LinspecCudaTreeNode*>(made + nodes_at)},
              context_->stream());
  return context_->CheckLaunch("trees");
}

int32_t DeviceModel::FetchMade(StartedStep* step) {
  const int64_t nodes_at = Bytes<Task>(last_.input.num_tasks);
  const int64_t bytes = nodes_at + Bytes<LinspecCudaTreeNode>(last_.num_tasks * LINSPEC_CUDA_MAX_FOLLOW_NODES);
  LINSPEC_CUDA_TRY(step->made.Reserve(context_, bytes));
  auto* made = step->made.as<std::byte>();
  step->result.tasks = reinterpret_cast<const LinspecCudaTask*>(made);
  step->result.nodes = reinterpret_cast<const LinspecCudaTreeNode*>(made + nodes_at);
  return context_->Check(cudaMemcpyAsync(made, made_.as<void>(), bytes, cudaMemcpyDeviceToHost, context_->stream()),
                         "download trees");
}

}  // namespace linspec::cuda
