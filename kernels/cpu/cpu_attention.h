// Window attention of one key/value head of one request: verify, commit, prefill. Private to kernels/.
#pragma once

#include "kernels/cpu/isa_table.h"
#include "kernels/ops.h"

namespace linspec::cpu {

void VerifyKvHead(const IsaTable& table, const AttentionLayer& layer, const WindowRequest& request, const float* qkv,
                  float* out, int kv_head);
// Asks for the part of the state that VerifyKvHead will read. States of a batch come from memory, in pieces too short for
// the processor's own prefetching.
void PrefetchKvHead(const AttentionLayer& layer, const WindowRequest& request, int kv_head);
void CommitKvHead(const IsaTable& table, const AttentionLayer& layer, const CommitRequest& request, const float* qkv,
                  int kv_head);
void PrefillKvHead(const IsaTable& table, const AttentionLayer& layer, const WindowRequest& request, const float* qkv,
                   float* out, int kv_head);

}  // namespace linspec::cpu
