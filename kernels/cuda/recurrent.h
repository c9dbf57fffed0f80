// Kernels of the recurrent draft head: the input of one level, and for few rows of a small model all levels at once.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/draft_kernels.h"
#include "kernels/cuda/plugin_api.h"

namespace linspec::cuda {

// out = [RMSNorm(state), RMSNorm(embedding of the token)] in bf16. At level 0 the state is the target's hidden state,
// which is stored, and the token is the row's own.
struct RecurrentInputParams {
  DraftInput input;
  LinspecCudaMatrix embedding;  // [V, D]
  const int32_t* tokens;        // [num_rows] chosen at the level before; null: level 0
  float* state;                 // [num_rows, D]
  const float *state_norm, *token_norm;
  uint16_t* out;  // [num_rows, 2 D]
  float eps;
};
void LaunchRecurrentInput(const RecurrentInputParams& params, cudaStream_t stream);

inline constexpr int kMostLevelsRows = 8;

// All levels of at most kMostLevelsRows rows, one launch whose blocks keep the weights in shared memory and wait for
// each other: their logits, with the bits that LaunchRecurrentInput and the products of gemm_tile.h give one after the
// other, each level following the best token of the one before (what LaunchChooseDraft puts first).
struct RecurrentLevelsParams {
  DraftInput input;
  LinspecCudaMatrix embedding;               // [V, D]
  LinspecCudaMatrix gate_up, down, lm_head;  // [2 M, 2 D], [D, M], [V, D], of one type
  const float *state_norm, *token_norm;      // [D]
  float eps;
  int num_levels;
  // What input and call point to may be pinned memory of the host: each block reads it once, first.
  // call: another number at every launch; should one come again after 2^32 launches, a block might take an old value
  // for a new one, which costs a bad guess. mail: RecurrentLevelsPlan::mail_bytes, zeroed once, for one launch at a
  // time.
  const uint32_t* call;
  uint64_t* mail;
  float* logits;  // [num_levels, num_rows, V]
};

// What a block keeps of a matrix: `tiles` of 16 rows at most, in shared memory from `offset` on, `pitch` bytes a row.
struct ResidentPlan {
  int tiles, pitch, offset;
};

// How the blocks share the work.
struct RecurrentLevelsPlan {
  int blocks;  // 0: it cannot run
  ResidentPlan gate_up, down, lm_head;
  int input, input_pitch, x, x_pitch, partial;  // offsets, and bytes of a row
  int shared_bytes;
  int64_t mail_bytes;
};
// Needs sm_90 or later, weights of one type, D of at most 1,024, and matrices of which each multiprocessor can keep its
// part: a tile of gate_up and of down, 8 of lm_head. On the current device; of params only the matrices are read.
RecurrentLevelsPlan PlanRecurrentLevels(const RecurrentLevelsParams& params);
void LaunchRecurrentLevels(const RecurrentLevelsParams& params, const RecurrentLevelsPlan& plan, cudaStream_t stream);

}  // namespace linspec::cuda
