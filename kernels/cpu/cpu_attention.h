// Window attention of one key/value head of one request: verify, commit, prefill. Private to kernels/.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/aligned_vector.h"
#include "kernels/cpu/isa_table.h"
#include "kernels/ops.h"

namespace linspec::cpu {

// Memory that one thread's calls reuse: a head of one row takes half a microsecond, of which allocating took a sixth.
struct AttentionScratch {
  AlignedVector<float> weights;                      // AttentionTile::scratch
  AlignedVector<uint16_t> rows;                      // [rows][k, v][d], of a 16-bit state
  std::vector<int32_t> nodes;                        // of all paths
  std::vector<std::span<const int32_t>> paths;       // [rows]
  std::vector<const void*> states, children_states;  // [rows]
};

void VerifyKvHead(const IsaTable& table, const AttentionLayer& layer, const WindowRequest& request, const float* qkv,
                  float* out, int kv_head, AttentionScratch* scratch);
// Asks for the part of the state that VerifyKvHead will read. States of a batch come from memory, in pieces too short
// for the processor's own prefetching.
void PrefetchKvHead(const AttentionLayer& layer, const WindowRequest& request, int kv_head);
void CommitKvHead(const IsaTable& table, const AttentionLayer& layer, const CommitRequest& request, const float* qkv,
                  int kv_head, AttentionScratch* scratch);
void PrefillKvHead(const IsaTable& table, const AttentionLayer& layer, const WindowRequest& request, const float* qkv,
                   float* out, int kv_head, AttentionScratch* scratch);

}  // namespace linspec::cpu
