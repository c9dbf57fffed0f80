// Host entry points of the kernels. All launches are asynchronous on `stream`; errors are read with cudaGetLastError.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/plugin_api.h"
#include "kernels/cuda/window_attention.h"

namespace linspec::cuda {

// Attention: head_dim % 4 == 0 and <= 128; tasks with slot -1 do nothing, tasks without rows leave everything as it is.
// Slots need not be cleared: nothing of a slot is read before it was written.
//
// Verify reads `tasks` and S before the kernel in front of it in the stream has ended (pdl.h): what wrote those must be
// older than that kernel. It never writes state. Commit appends accepted rows and folds. Prefill is verify and commit
// of a chain of any length; it needs AttentionParams::scratch.
void LaunchVerify(const AttentionParams& params, int num_tasks, cudaStream_t stream);
void LaunchCommit(const AttentionParams& params, int num_tasks, cudaStream_t stream);
void LaunchPrefill(const AttentionParams& params, int num_tasks, cudaStream_t stream);

// Commit of all layers: `layers` [num_layers] is in device memory, its LayerParams all have the shape of `shape`, its
// states are all bf16 or all fp32.
void LaunchCommitLayers(const LayerParams& shape, bool bf16, const AttentionParams* layers, int num_layers,
                        int num_tasks, cudaStream_t stream);

// Whether verify may get AttentionParams::raw, for rows that LaunchRopeNormalize has not seen: what that would have
// done happens inside, to the same bits. Tasks of one row each; row_begin < rows of the call.
bool VerifyTakesRawRows(const LayerParams& layer, int num_tasks, int max_rows);
// Layer shapes whose states may be bf16.
bool SupportsBf16States(const LayerParams& layer);

// Groups that a prefill task of `rows` rows touches, for AttentionParams::num_groups.
constexpr int64_t PrefillGroups(int64_t length, int64_t rows, int group_size) {
  return rows == 0 ? 0 : (length % group_size + rows + group_size - 1) / group_size;
}
// Size of AttentionParams::scratch: S before each group, fp32. One scratch serves all layers, one call at a time.
int64_t PrefillScratchFloats(const LayerParams& layer, int64_t num_groups);

struct EmbedParams {
  LinspecCudaMatrix table;  // [V, D]
  const int32_t* tokens;    // [rows]
  float* out;               // [rows, D]
};
// overlapped: may start before the kernel ahead of it has ended (pdl.h).
void LaunchEmbed(const EmbedParams& params, int rows, cudaStream_t stream, bool overlapped = true);

// A step of one row a task becomes the one after it: lengths and positions one further, and the token of a row the one
// that was chosen after it, 0 where none could be. Not overlapped, and what reads the step must come behind a kernel
// that is not either: verify reads tasks early.
struct AdvanceParams {
  Task* tasks;      // [num_tasks]
  int32_t* tokens;  // this and the others: [rows]
  int64_t* positions;
  LinspecCudaSampling* sampling;
  const int32_t* sampled;
};
void LaunchAdvance(const AdvanceParams& params, int num_tasks, int rows, cudaStream_t stream);

struct RmsNormRows {  // dim % 4 == 0, everything aligned to 16 bytes
  const float* x;     // [rows, dim]
  const float* weight;
  float* out;  // either may be null
  uint16_t* out_bf16;
  int64_t dim;
  float eps;
};
void LaunchRmsNorm(const RmsNormRows& params, int rows, cudaStream_t stream);

// out = silu(gate) * up, all bf16; gate_up [rows, 2 dim] in the order of PackedGateUpRow, dim % 8 == 0.
void LaunchSiluMul(const uint16_t* gate_up, uint16_t* out, int64_t dim, int rows, cudaStream_t stream);

struct RopeRows {
  float* qkv;            // [rows, (H + 2 Hkv) d], in place
  const float2* angles;  // [rows, d / 2]: cosine, sine
  int num_heads, num_kv_heads, head_dim;
  float eps;
  void* kv = nullptr;                // [rows, 2 Hkv d]: if set, k and v go here instead
  bool bf16 = false;                 // k and v are rounded to bf16; in kv they are bf16
  const int32_t* kv_rows = nullptr;  // [rows] row of kv that row i's go to; -1: nowhere. Null: row i
};
void LaunchRopeTable(const int64_t* positions, double theta, int head_dim, float2* angles, int rows,
                     cudaStream_t stream);
void LaunchRopeNormalize(const RopeRows& params, int rows, cudaStream_t stream);

// Index of the largest value of each row, the lowest among equals; -1 for a row that holds a NaN.
void LaunchArgmax(const float* logits, int64_t vocab, int32_t* out, int rows, cudaStream_t stream);

// RMSNorm without a launch of its own, by the products around it. The product that reads a residual stream x multiplies
// x * weight in bf16, and its results by 1 / rms, 1 / sqrt(mean of x^2 + eps), which it gets in one of three ways:
// - in the prologue: it reads x and the weight itself (ring products of up to kRingNormRows rows, small ones);
// - squares: the product that completed x left x * weight, and sums of squares of parts of x (warpgroup products);
// - scales: LaunchNormForSmall did, which has the bits of the prologue (tiled and small products).
inline constexpr int kNormPart = 64;  // values of a part
inline constexpr int kRingNormRows = 2;
__host__ __device__ constexpr int64_t NormParts(int64_t dim) { return (dim + kNormPart - 1) / kNormPart; }
struct NormAfter {
  const float* weight = nullptr;  // [N]; null: none
  uint16_t* out = nullptr;        // [rows, N]
  float* squares = nullptr;       // [rows, NormParts(N)]
};
struct NormBefore {  // at most one of x, squares and scales; none: the product's x is complete
  float eps = 0.0f;
  const float* x = nullptr;        // [rows, K], aligned to 16 bytes: the product's x is not read
  const float* weight = nullptr;   // [K], with x; aligned to 16 bytes
  const float* squares = nullptr;  // [rows, NormParts(K)]
  const float* scales = nullptr;   // [rows]: 1 / rms
};

// y[m, n] (+)= scale[n] * sum_k x[m, k] w[n, k]
struct GemmParams {
  LinspecCudaMatrix w;         // [N, K] bf16, int8 or fp8; K % 16 == 0, data aligned to 16 bytes
  const uint16_t* x;           // [rows, K] bf16, aligned to 16 bytes; null with norm_before.x
  float* y;                    // [rows, N], aligned to 16 bytes; unused with y_bf16
  bool accumulate;             // add to y
  uint16_t* y_bf16 = nullptr;  // if set, the result goes here as bf16: [rows, N], or [rows, N / 2] with silu_mul
  // w holds gate and up rows in turn (PackedGateUpRow) and the result is silu(gate) * up. Needs y_bf16; N % 16 == 0.
  bool silu_mul = false;
  // StreamingGemmWorkspaceBytes() of device memory, zeroed once, for all products of one stream; above 8 rows.
  void* workspace = nullptr;
  NormAfter norm_after = {};  // needs accumulate
  NormBefore norm_before = {};
  // If rope.qkv is set, w is qkv of heads of 128, y is rope.qkv, and the result is what LaunchRopeNormalize leaves, to
  // the same bits: warpgroup products (gemm_wgmma.h).
  RopeRows rope = {};
};
// Which row of [gate; up] (each `intermediate` rows, a multiple of 8) is row r of w for silu_mul: 8 rows of gate, the
// same 8 of up, and so on, so that one lane of the product ends with both.
constexpr int64_t PackedGateUpRow(int64_t r, int64_t intermediate) {
  return r / 16 * 8 + r % 8 + (r % 16 < 8 ? 0 : intermediate);
}
// Few rows: streams the weights once for each 64 rows. Starts before the kernel ahead of it has ended (pdl.h). The bits
// of a row depend on that row alone: not on the number of rows, and not on which kernel ran.
int64_t StreamingGemmWorkspaceBytes();
void LaunchStreamingGemm(const GemmParams& params, int rows, cudaStream_t stream);
// A matrix that fits in the L2, up to a few hundred rows: the same product and bits, without a workspace.
void LaunchSmallGemm(const GemmParams& params, int rows, cudaStream_t stream);
// x * weight in bf16 [rows, K] and 1 / rms [rows] of norm.x, for products by w, with the bits of a small one's
// prologue.
void LaunchNormForSmall(const NormBefore& norm, const LinspecCudaMatrix& w, uint16_t* out, float* scales, int rows,
                        cudaStream_t stream);
// Many rows (from about 128): the same product and bits, bound by arithmetic.
void LaunchTiledGemm(const GemmParams& params, int rows, cudaStream_t stream);

// out [rows, w.cols] = rows [row_begin, row_begin + rows) of int8 or fp8 weights times their scales, rounded to bf16.
void LaunchWidenWeights(const LinspecCudaMatrix& w, int64_t row_begin, int64_t rows, uint16_t* out,
                        cudaStream_t stream);

}  // namespace linspec::cuda
