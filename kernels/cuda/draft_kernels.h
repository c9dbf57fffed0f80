// Kernels of the draft heads that no transformer layer has: rounding, their blocks, and the choice of candidates (the
// recurrent head's own: recurrent.h).
// Launched overlapped (pdl.h); a row's results depend on that row alone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/plugin_api.h"

namespace linspec::cuda {

// A step's requests, where the device can read them. `hidden` is read through one more pointer, so that a captured
// graph serves steps whose target keeps its hidden states elsewhere.
struct DraftInput {
  const LinspecCudaDraftRow* rows;  // [num_rows]
  const float* const* hidden;       // [.., D] of the target
  int num_rows;
};

// out = x rounded to bf16; count % 4 == 0.
void LaunchRound(const float* x, uint16_t* out, int64_t count, cudaStream_t stream);

// out [num_rows, D] = the rows' hidden states in bf16, and in fp32 in state; dim % 4 == 0.
void LaunchGatherHidden(const DraftInput& input, float* state, uint16_t* out, int64_t dim, cudaStream_t stream);

// state += silu(product + bias), also in bf16 to out: [rows, dim], dim % 4 == 0.
struct MedusaBlockParams {
  const float* product;
  const float* bias;  // [dim]
  float* state;
  uint16_t* out;
  int64_t dim;
};
void LaunchMedusaBlock(const MedusaBlockParams& params, int rows, cudaStream_t stream);

// The contract of LikelyChoices in models/draft_candidates.h. Logits are [num_levels, num_rows, V] of the levels from
// first_level on; the best token of each goes to next_tokens too (0 where there is none).
struct ChooseDraftParams {
  DraftInput input;
  const float* logits;
  int64_t vocab;
  int first_level, num_levels, top_k;
  LinspecCudaDraftCandidate* candidates;  // [num_levels, num_rows, top_k]
  int32_t* next_tokens;                   // [num_rows] or null
  bool at_hidden_row = false;             // one level: a row's logits are those at hidden_row; -1: it has none
};
void LaunchChooseDraft(const ChooseDraftParams& params, cudaStream_t stream);

}  // namespace linspec::cuda
