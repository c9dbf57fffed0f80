// Yardsticks: verification with one state per tree node, as servers do that snapshot, and states that take every
// accepted token at once, against which the saving of one S a tree and of folding by groups is measured; and a plain
// read of memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace linspec::cuda {

// node_states [requests, nodes, kv_heads, 128, 128]: node i = its parent's state (states [requests, kv_heads, 128, 128]
// for node 0) + k v^T, then out = q node_state. Nodes form a chain. qkv [requests * nodes, 3 * kv_heads * 128].
void LaunchPerNodeVerify(const float* states, float* node_states, const float* qkv, float* out, int requests, int nodes,
                         int kv_heads, cudaStream_t stream);

// Eager commit: S of each request, a matrix [kv_heads, 128, 128] every `stride` floats, += k v^T of each of the
// `tokens` rows of qkv that every request has, token by token: what the fold of a group does once, without decay.
void LaunchEagerCommit(float* states, int64_t stride, const float* qkv, int requests, int tokens, int kv_heads,
                       cudaStream_t stream);

// Reads `floats` (a multiple of 4) once; out [blocks].
void LaunchRead(const float* data, int64_t floats, float* out, int blocks, cudaStream_t stream);

}  // namespace linspec::cuda
