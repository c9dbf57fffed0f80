// Between the translation units of attention: the tensor-core instances, for the layer shapes of HasTiles. A model has
// one shape, so all its calls are of the one family or of the other and their folds are the same arithmetic.
#pragma once

#include "kernels/cuda/launch.h"

namespace linspec::cuda {

// Groups of a power of two, and the shared memory of a data-centre chip (sm_90, sm_100).
bool HasTiles(const LayerParams& layer);

void LaunchVerifyTiles(const AttentionParams& params, int num_tasks, cudaStream_t stream);
void LaunchCommitTiles(const AttentionParams& params, int num_tasks, cudaStream_t stream);
void LaunchCommitTilesOfLayers(const LayerParams& layer, bool bf16, const AttentionParams* params, int num_layers,
                               int num_tasks, cudaStream_t stream);
void LaunchPrefillTiles(const AttentionParams& params, int num_tasks, cudaStream_t stream);

}  // namespace linspec::cuda
