// Test reference: verification that keeps one state per tree node, as servers do that snapshot. Only its cost is wanted.
#pragma once

#include <cuda_runtime_api.h>

namespace linspec::cuda {

// node_states [requests, nodes, kv_heads, 128, 128]: node i = its parent's state (states [requests, kv_heads, 128, 128]
// for node 0) + k v^T, then out = q node_state. Nodes form a chain. qkv [requests * nodes, 3 * kv_heads * 128].
void LaunchPerNodeVerify(const float* states, float* node_states, const float* qkv, float* out, int requests, int nodes,
                         int kv_heads, cudaStream_t stream);

}  // namespace linspec::cuda
