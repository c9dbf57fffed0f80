// The arithmetic a linearized transformer needs on a CPU: one parameter struct and one method per op.
//
// Every op exists as a plain scalar twin (Isa::kScalar, the reference) and as SIMD versions chosen at run time.
// Contract on determinism, which exact speculation rests on: an output row depends only on that row's inputs, with a
// reduction order fixed by the shapes. It is bit-identical whatever rows stand beside it, however many threads run,
// and whether a window token comes from the ring or from the rows of the same call.
//
// Ownership: all pointers are borrowed for the call. Threads: a CpuOps is used by one thread at a time (the engine's);
// it spreads work over its own pool. Errors: preconditions are CHECKed, they are the caller's invariants.
//
// Letters (docs/math.md): D hidden size, H query heads, Hkv key/value heads, d head_dim, G group size, V vocabulary.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/dtype.h"

namespace linspec {

// In ascending order. kAvx512 needs F, BW, VL, DQ and VNNI; kAmx is kAvx512 with int8 products in AMX tiles.
enum class Isa : uint8_t { kScalar, kAvx2, kAvx512, kAmx };
inline constexpr Isa kIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAmx};
Isa DetectIsa();  // the best that this machine runs and its system permits
const char* IsaName(Isa isa);

// A weight matrix [rows, cols] (y = W x), repacked once at load for the chosen instruction set. Immutable after Pack.
class PackedWeight {
 public:
  virtual ~PackedWeight() = default;
  virtual int64_t rows() const = 0;
  virtual int64_t cols() const = 0;
  virtual DType dtype() const = 0;    // kF32, kBF16 or kI8 (symmetric, one fp32 scale per row)
  virtual int64_t bytes() const = 0;  // what one matmul streams from memory
};

// y[m, n] = sum_k x'[m, k] w[n, k]  (+ y[m, n] if accumulate), where x' is x, or RmsNorm(x) if norm_weight is given.
// For kI8 weights x' is quantised per row to 8 bits (symmetric), the dot is exact in int32, so every Isa gives the same
// bits.
struct MatmulParams {
  const float* x;         // [num_rows, K]
  const PackedWeight* w;  // [N, K]
  float* y;               // [num_rows, N]
  int64_t num_rows;
  bool accumulate = false;
  const float* norm_weight = nullptr;  // [K]
  float norm_eps = 0;
};

struct RmsNormParams {
  const float* x;       // [num_rows, dim]
  const float* weight;  // [dim]
  float* out;           // [num_rows, dim]
  int64_t num_rows;
  int64_t dim;
  float eps;
};

struct SiluMulParams {   // out = silu(gate) * up
  const float* gate_up;  // [num_rows, 2 * dim]: gate then up
  float* out;            // [num_rows, dim]
  int64_t num_rows;
  int64_t dim;
};

// In place on q and k of a fused qkv row: RoPE (rotate halves, fp32 angles from position), then x / sqrt(sum x^2 +
// eps).
struct RopeNormalizeParams {
  float* qkv;                // [num_rows, (H + 2 Hkv) * d]: q heads, k heads, v heads
  const int64_t* positions;  // [num_rows]
  int64_t num_rows;
  int num_heads, num_kv_heads, head_dim;
  float rope_theta;
  float qk_norm_eps;
};

// The products of an MLP's first half and its activation: out = silu(gate) * up, both products of x.
struct GatedMatmulParams {
  MatmulParams product;  // w [2 dim, K]: gate then up; y [num_rows, 2 dim] is scratch
  float* out;            // [num_rows, dim]
};

enum class GlobalBranch : uint8_t { kNone, kScaled, kRmsNorm };

// Constants of one attention layer.
struct AttentionLayer {
  int num_heads, num_kv_heads, head_dim;
  int group_size;   // G
  int conv_kernel;  // taps; 0: no convolution
  bool local;       // relu^2 branch present
  GlobalBranch global;
  float global_factor;       // kScaled: a
  const float* global_gain;  // [H]             kRmsNorm
  float global_norm_eps;
  const float* decay;      // [Hkv] or null (no decay)
  const float* conv_taps;  // [H, conv_kernel], tap l multiplies v_{t-l}
  int index = 0;           // of the layer in its model: keys the rounding of 16-bit states
};

// One request's state in one layer, all of it in one dtype. Ring slot of position t is t mod G. S holds the completed
// groups.
//
// kBF16: k and v of a token are rounded to nearest before anything reads them, whether from the ring or from the rows
// of a call; sums and products are fp32; S is rounded once, at the end of a fold (state_rounding.h).
struct LayerState {
  void* s;                    // [Hkv, d_k, d_v]
  void* ring_k;               // [Hkv, G, d]  normalised keys
  void* ring_v;               // [Hkv, G, d]
  DType dtype = DType::kF32;  // kF32 or kBF16
};

// A request's rows in a verify call: a tree whose parents come before their children.
struct WindowRequest {
  LayerState state;        // read only here
  int64_t length;          // tokens committed; root position
  int64_t row_begin;       // first row in qkv
  int num_rows;            // tree nodes, <= 64 (any number when parents is null)
  const int32_t* parents;  // [num_rows] index inside the request, -1 for the root; null: a chain
};

// out = local + global + conv for every row, by the window product over [ring + ancestors]. Reads state, never writes.
// A node past a group boundary sees exactly the folded state that sequential decoding would hold (computed in scratch),
// so its bits equal those of decoding token by token.
struct VerifyAttentionParams {
  const AttentionLayer* layer;
  const float* qkv;  // [num_rows, (H + 2 Hkv) * d] after RopeNormalize
  float* out;        // [num_rows, H * d]
  std::span<const WindowRequest> requests;
};

// Appends rows path[0..n) (indices inside the request) to the ring, in order, folding S at each completed group:
// S <- decay S + K^T V over the G slots, ascending position.
struct CommitRequest {
  LayerState state;
  int64_t length;     // before the call
  int64_t row_begin;  // first row of the request in qkv
  std::span<const int32_t> path;
};
struct CommitAttentionParams {  // of one layer; the layers of a call have the same heads and requests
  const AttentionLayer* layer;
  const float* qkv;  // as given to verify
  std::span<const CommitRequest> requests;
};

// Chain of any length: out for every row and state advanced past all of them, folding on the way; the same bits as
// verify + commit token by token.
struct PrefillAttentionParams {
  const AttentionLayer* layer;
  const float* qkv;
  float* out;
  std::span<const WindowRequest> requests;  // parents must be null; state is written
};

class CpuOps {
 public:
  struct Options {
    Isa isa = DetectIsa();
    int num_threads = 0;  // 0: one per hardware thread; results do not depend on it
  };
  // INVALID_ARGUMENT if this machine cannot run options.isa or num_threads < 0.
  static absl::StatusOr<std::unique_ptr<CpuOps>> Create(Options options);
  virtual ~CpuOps() = default;

  virtual Isa isa() const = 0;
  virtual int num_threads() const = 0;

  // Source is row-major [rows, cols] in source_dtype (kF32, kF16, kBF16, kI8 with row_scales). target is kF32, kBF16 or
  // kI8; converting a float source to kI8 quantises it per row, kI8 to kI8 keeps the bits.
  virtual std::unique_ptr<PackedWeight> Pack(const void* source, DType source_dtype, const float* row_scales,
                                             int64_t rows, int64_t cols, DType target) = 0;

  virtual void Matmul(const MatmulParams&) = 0;
  // Matmul, then RopeNormalize on its output (rope.qkv == product.y), in one pass over the output.
  virtual void ProjectQkv(const MatmulParams& product, const RopeNormalizeParams& rope) = 0;
  virtual void GatedMatmul(const GatedMatmulParams&) = 0;
  virtual void RmsNorm(const RmsNormParams&) = 0;
  virtual void SiluMul(const SiluMulParams&) = 0;
  virtual void RopeNormalize(const RopeNormalizeParams&) = 0;
  virtual void VerifyAttention(const VerifyAttentionParams&) = 0;
  virtual void CommitAttention(std::span<const CommitAttentionParams> layers) = 0;
  virtual void PrefillAttention(const PrefillAttentionParams&) = 0;
};

}  // namespace linspec
