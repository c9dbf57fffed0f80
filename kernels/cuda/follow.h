// What lies between a step and one that follows it before the host has seen it: which tokens it accepts, and the trees
// of the next step, made from the candidates of draft heads. The host's own versions: WalkTree in
// scheduler/acceptance.h; HeadChainDrafter, MedusaDrafter and SpeculationController::Prune.
//
// Launched one after the other, not overlapped; what reads a step that was made here must come behind a kernel that is
// not overlapped either, since verify reads tasks early (pdl.h).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/plugin_api.h"
#include "kernels/cuda/window_attention.h"

namespace linspec::cuda {

inline constexpr int kPathStride = 64;  // nodes of a path, at most: of any tree

// A step's arrays, as verification reads them.
struct StepArrays {
  Task* tasks;
  int32_t* tokens;  // this and the others: [rows]
  int64_t* positions;
  uint64_t* ancestors;
  LinspecCudaSampling* sampling;
};

// What acceptance leaves of each task of a step, for the commit, the draft heads and the trees of the next one.
struct Accepted {
  Task* tasks;                 // as they were, with their paths
  int32_t* paths;              // [num_tasks][kPathStride] accepted nodes
  LinspecCudaDraftRow* rows;   // [num_tasks] the token that was chosen last, and where its hidden state is
  LinspecCudaSampling* roots;  // [num_tasks] how the token after that is chosen
  uint32_t* call;              // of the draft heads
};

// Walks each task's tree: from its root to the child that has the token chosen after the node, as long as there is one.
// All tokens are taken to be chosen with the target's noise. call: stored for the draft heads.
void LaunchAccept(const StepArrays& step, const int32_t* sampled, int num_tasks, uint32_t call, const Accepted& out,
                  cudaStream_t stream);

struct TreesParams {
  Accepted accepted;
  const LinspecCudaDraftCandidate* candidates;  // [num_levels][row_stride][top_k], best first
  int row_stride, num_levels, top_k;            // num_levels * top_k <= LINSPEC_CUDA_MAX_FOLLOW_CANDIDATES
  // Candidates of a level are guesses below the best one of the level before; else below each node of that level.
  bool chain;
  int group_size;                     // a tree ends where its slot's open group does
  int num_tasks, num_rows;            // with padding; at most LINSPEC_CUDA_MAX_FOLLOW_TASKS tasks
  int most_rows;                      // of all tasks together, at least one each
  int most_nodes;                     // of a tree, at most LINSPEC_CUDA_MAX_FOLLOW_NODES
  StepArrays step;                    // that is made
  const LinspecCudaLogitEdit* edits;  // to *step_edits
  const LinspecCudaLogitEdit** step_edits;
  Task* made_tasks;                 // [num_tasks] for the host; as step.tasks, out_shift: how many nodes there are
  LinspecCudaTreeNode* made_nodes;  // [num_tasks][LINSPEC_CUDA_MAX_FOLLOW_NODES]
};

// Each task's tree has its likeliest paths, and the rows go to the likeliest of all tasks. Equal ones: the earlier task
// and the earlier candidate.
void LaunchTrees(const TreesParams& params, cudaStream_t stream);

}  // namespace linspec::cuda
