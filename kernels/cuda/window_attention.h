// Verify, commit and prefill of one (request, kv head) as block programs; the kernels and the host test share them.
//
// Math, for the node u at position p of a request with L committed tokens, S holding the groups before base = L - L %
// G:
//   y_u = sum_j [group(j) = group(p)] relu(q.k_j)^2 v_j + sum_{p - j < conv} tap_{p-j} v_j + scale * z_u
//   z_u = g^n q S + sum_{base <= j, group(j) < group(p)} g^(group(p)-1-group(j)) (q.k_j) v_j,   n = group(p) - group(L)
// over j in ring and ancestors of u (u included). z_u is q S of sequential decoding, which would have folded those
// groups; scale = a, or gain_h / sqrt(mean z^2 + eps). Sums run by ascending position: a term of weight 0 changes no
// bit, so a row has the same bits whatever rows stand beside it. Past a boundary inside a tree z_u rounds differently
// from a real fold.
//
// Memory: state of a slot and layer is [S: Hkv,d,d | ring_k: Hkv,G,d | ring_v: Hkv,G,d] fp32; ring slot = position % G.
// Thread t of the block owns rows [t / (d/4) * R, +R) and columns 4 (t % (d/4)) of S in registers: S is read once, by
// 16-byte loads, a warp covering whole rows. Ring and tree rows pass through shared memory in chunks of 64 tokens, for
// tiles of 8 query rows.
#pragma once

#include "kernels/cuda/block.h"

namespace linspec::cuda {

inline constexpr int kMaxHeadDim = 128;
inline constexpr int kMaxNodes = 64;  // an ancestor set is one uint64_t
inline constexpr int kRowTile = 8;
inline constexpr int kChunk = 64;
inline constexpr int kTileStride = kMaxHeadDim + 4;  // one 16-byte unit of padding: rows start in different banks
inline constexpr int kFragmentRows = 16;             // d * d / 4 / kThreads at d = 128

enum class Global : int32_t { kNone, kScaled, kRmsNorm };

struct LayerParams {
  int32_t num_heads, num_kv_heads, head_dim, group_size, conv_kernel, local;
  Global global;
  float global_factor, global_norm_eps;
  const float* global_gain;  // [H] or null
  const float* decay;        // [Hkv] or null
  const float* conv_taps;    // [H, conv_kernel] or null
  int32_t index = 0;         // of the layer in its model: keys the rounding of bf16 states
};

struct StateView {  // all slots in one allocation, in elements of fp32 or bf16
  void* base;
  int64_t per_slot, layer_offset;
  bool bf16 = false;  // shapes of SupportsBf16States only; see AttentionParams::kv

  LINSPEC_BLOCK int64_t ElementBytes() const { return bf16 ? 2 : 4; }
  template <typename T>
  LINSPEC_BLOCK T* Slot(int32_t slot) const {
    return static_cast<T*>(base) + slot * per_slot + layer_offset;
  }
};

struct Task {      // one request of a call
  int64_t length;  // tokens committed
  int32_t slot;    // -1: padding, the block returns
  int32_t row_begin, num_rows;
  int32_t path_begin, path_length;  // commit: into AttentionParams::paths
  int32_t out_shift = 0;            // verify: queries and outputs are this many rows above k and v
};

template <typename T>
struct KvRows {
  const T* data;  // k of a row's kv heads, then v
  int64_t stride;
};

// Rows that RoPE and the L2 norm still await.
struct RawRows {
  const float* angles = nullptr;  // [rows, d / 2]: cosine, sine; null: rows are ready
  float eps = 0.0f;
  void* kv = nullptr;  // [rows, 2 Hkv d] in the type of the states: where k and v go
};

struct AttentionParams {
  LayerParams layer;
  StateView states;
  const Task* tasks;  // [num_tasks]
  const float* qkv;   // [rows, (H + 2 Hkv) d]
  // [rows, 2 Hkv d] in the type of the states: k and v, where they are not those in qkv. With bf16 states verify and
  // commit need it, and prefill needs k and v in qkv to be rounded to bf16.
  const void* kv = nullptr;
  const uint64_t* ancestors;  // [rows] bit j: node j of the request is the row or above it; null: chains
  const int32_t* paths;       // accepted nodes, indices inside the request
  float* out;                 // [rows, H d] or null
  uint16_t* out_bf16;         // the same, rounded, for the next matrix product; or null
  int32_t max_rows = 0;       // verify: no task has more rows; 0: up to kMaxNodes. Changes the grid, never a bit
  int32_t last_rows = 0;      // verify: outputs of this many last rows of each task only; 0: of all
  // Prefill: PrefillScratchFloats of `num_groups`, the sum over the tasks of PrefillGroups (or more).
  float* scratch = nullptr;
  int32_t num_groups = 0;
  bool exact_prefill = false;  // outputs of prefill from three tf32 products instead of one; states always are
  RawRows raw = {};            // verify, where VerifyTakesRawRows

  template <typename T = float>
  LINSPEC_BLOCK KvRows<T> Kv() const {
    const int64_t d = layer.head_dim, heads = layer.num_heads, both = 2 * layer.num_kv_heads;
    if (kv != nullptr) return {static_cast<const T*>(kv), both * d};
    return {reinterpret_cast<const T*>(qkv + heads * d), (heads + both) * d};
  }
};

struct AttentionShared {
  float tile[kChunk * kTileStride];  // keys, values, or partial sums of q S [groups][kRowTile][d]
  float q[kRowTile * kMaxHeadDim];
  float local[kRowTile * kChunk];  // weights of v_j in y and in z
  float grouped[kRowTile * kChunk];
  float squares[kRowTile * kMaxHeadDim / 4];
};

struct Fragment {
  Vec4 v[kFragmentRows];
};
struct Accumulator {
  Vec4 local, grouped;
};

LINSPEC_BLOCK uint16_t RoundToBf16(float value) {  // finite values
  union {
    float f;
    uint32_t u;
  } bits{value};
  if ((bits.u & 0x7F800000u) == 0x7F800000u)
    return static_cast<uint16_t>((bits.u >> 16) | ((bits.u & 0xFFFFu) ? 64 : 0));
  return static_cast<uint16_t>((bits.u + 0x7FFFu + ((bits.u >> 16) & 1u)) >> 16);
}

LINSPEC_BLOCK float Power(float base, int exponent) {
  float result = 1.0f;
  for (int i = 0; i < exponent; ++i) result *= base;
  return result;
}

// Where the threads of a block stand on a d x d matrix.
struct Grid {
  int d, columns, groups, rows;  // columns of 4; rows per thread

  LINSPEC_BLOCK explicit Grid(int dim)
      : d(dim), columns(dim / 4), groups(kThreads / columns), rows((dim + groups - 1) / groups) {}
  LINSPEC_BLOCK int Column(int thread) const { return thread % columns * 4; }
  LINSPEC_BLOCK int Group(int thread) const { return thread / columns; }
  LINSPEC_BLOCK int Row(int thread, int r) const { return Group(thread) * rows + r; }
  LINSPEC_BLOCK bool Owns(int thread, int r) const { return Group(thread) < groups && r < rows && Row(thread, r) < d; }
};

// The window of one request and kv head. Positions are relative to base: ring tokens before the open group are
// negative.
struct Window {
  const LayerParams& layer;
  const float *ring_k, *ring_v;        // [G, d]
  const float *row_k, *row_v, *row_q;  // of the request's first row; row_q of the kv head's first query head
  const uint64_t* ancestors;           // [num_rows] or null
  int64_t stride, kv_stride, first_out;
  int kv_head, num_rows, phase, ring_begin;
  int first_query = 0;  // rows before it are seen, but not computed
  bool folded;          // S holds at least one group

  LINSPEC_BLOCK Window(const AttentionParams& p, int64_t length, int64_t row, int rows, bool chain, float* state,
                       int head)
      : layer(p.layer), ancestors(chain ? nullptr : p.ancestors + row), first_out(row), kv_head(head), num_rows(rows) {
    const int d = layer.head_dim, g = layer.group_size;
    stride = static_cast<int64_t>(layer.num_heads + 2 * layer.num_kv_heads) * d;
    ring_k = state + static_cast<int64_t>(layer.num_kv_heads) * d * d + static_cast<int64_t>(head) * g * d;
    ring_v = ring_k + static_cast<int64_t>(layer.num_kv_heads) * g * d;
    const KvRows<float> kv = p.Kv();
    kv_stride = kv.stride;
    row_q = p.qkv + row * stride + static_cast<int64_t>(head) * (layer.num_heads / layer.num_kv_heads) * d;
    row_k = kv.data + row * kv_stride + static_cast<int64_t>(head) * d;
    row_v = row_k + static_cast<int64_t>(layer.num_kv_heads) * d;
    phase = static_cast<int>(length % g);
    folded = length >= g;
    const int history = phase - layer.conv_kernel + 1;  // oldest position that a tap of the root reaches
    ring_begin = history < 0 ? history : 0;
    if (ring_begin < -static_cast<int64_t>(length - phase)) ring_begin = -static_cast<int>(length - phase);
  }

  LINSPEC_BLOCK int ring_tokens() const { return phase - ring_begin; }
  LINSPEC_BLOCK uint64_t Mask(int row) const {
    return ancestors != nullptr ? ancestors[row] : ~uint64_t{0} >> (63 - row);
  }
  LINSPEC_BLOCK int Position(int row) const { return phase + PopCount(Mask(row)) - 1; }
  LINSPEC_BLOCK const float* Key(int token) const { return Pick(token, ring_k, row_k); }
  LINSPEC_BLOCK const float* Value(int token) const { return Pick(token, ring_v, row_v); }

 private:
  LINSPEC_BLOCK const float* Pick(int token, const float* ring, const float* rows) const {
    if (token >= ring_tokens()) return rows + (token - ring_tokens()) * kv_stride;
    const int position = ring_begin + token;
    return ring + static_cast<int64_t>(position < 0 ? position + layer.group_size : position) * layer.head_dim;
  }
};

// Weights of window token `token` for query row `row`, whose score q.k is in `score`.
LINSPEC_BLOCK void PairWeight(const Window& w, int head, int row, int token, float score, float* local,
                              float* grouped) {
  const LayerParams& layer = w.layer;
  const int ring = w.ring_tokens();
  const int reader = w.Position(row), key = token < ring ? w.ring_begin + token : w.Position(token - ring);
  const int reader_group = reader / layer.group_size, lag = reader - key;
  *local = 0.0f;
  *grouped = 0.0f;
  if (key >= 0 && key / layer.group_size == reader_group) {
    const float positive = layer.local ? fmaxf(score, 0.0f) : 0.0f;
    *local = positive * positive;
  } else if (key >= 0 && layer.global != Global::kNone) {
    const float g = layer.decay != nullptr ? layer.decay[w.kv_head] : 1.0f;
    *grouped = Power(g, reader_group - 1 - key / layer.group_size) * score;
  }
  if (lag < layer.conv_kernel) *local += layer.conv_taps[head * layer.conv_kernel + lag];
}

LINSPEC_BLOCK bool Sees(const Window& w, int row, int token) {
  const int node = token - w.ring_tokens();
  return node < 0 || (node <= row && (w.Mask(row) >> node & 1) != 0);
}

template <int kDim>
struct HeadProgram {  // kDim 0: head_dim is known at run time only
  const Window& w;
  const AttentionParams& params;
  AttentionShared& shared;
  int d;

  LINSPEC_BLOCK HeadProgram(const Window& window, const AttentionParams& p, AttentionShared& s)
      : w(window), params(p), shared(s), d(kDim != 0 ? kDim : p.layer.head_dim) {}

  // Copies tokens [begin, begin + count) of the window to shared.tile.
  template <bool kKeys>
  LINSPEC_BLOCK void Stage(int thread, int begin, int count) const {
    const int columns = d / 4;
    for (int i = thread; i < count * columns; i += kThreads) {
      const int token = i / columns, c = i % columns * 4;
      const float* source = kKeys ? w.Key(begin + token) : w.Value(begin + token);
      Store4(shared.tile + token * kTileStride + c, Load4(source + c));
    }
  }

  LINSPEC_BLOCK void StageQueries(int thread, int head_in_group, int row_begin, int rows) const {
    const int columns = d / 4;
    for (int i = thread; i < rows * columns; i += kThreads) {
      const int row = i / columns, c = i % columns * 4;
      const float* source = w.row_q + (row_begin + row) * w.stride + static_cast<int64_t>(head_in_group) * d;
      Store4(shared.q + row * kMaxHeadDim + c, Load4(source + c));
    }
  }

  LINSPEC_BLOCK void Score(int thread, int head, int row_begin, int rows, int begin, int count) const {
    for (int i = thread; i < rows * kChunk; i += kThreads) {
      const int token = i % kChunk, row = i / kChunk;
      float local = 0.0f, grouped = 0.0f;
      if (token < count && Sees(w, row_begin + row, begin + token)) {
        float score = 0.0f;
        for (int c = 0; c < d; c += 4) {
          score = Dot4(Load4(shared.q + row * kMaxHeadDim + c), Load4(shared.tile + token * kTileStride + c), score);
        }
        PairWeight(w, head, row_begin + row, begin + token, score, &local, &grouped);
      }
      shared.local[row * kChunk + token] = local;
      shared.grouped[row * kChunk + token] = grouped;
    }
  }

  LINSPEC_BLOCK void Accumulate(int thread, int row_begin, int rows, int count, Accumulator& sum) const {
    const int row = thread / (d / 4), c = thread % (d / 4) * 4;
    if (row >= rows) return;
    const bool crossed = w.Position(row_begin + row) >= w.layer.group_size;
    for (int token = 0; token < count; ++token) {
      const Vec4 v = Load4(shared.tile + token * kTileStride + c);
      Fma4(shared.local[row * kChunk + token], v, sum.local);
      if (crossed) Fma4(shared.grouped[row * kChunk + token], v, sum.grouped);
    }
  }

  LINSPEC_BLOCK void PartialState(int thread, int rows, const Fragment& s) const {
    const Grid grid(d);
    if (grid.Group(thread) >= grid.groups) return;
    for (int row = 0; row < rows; ++row) {
      Vec4 sum{0, 0, 0, 0};
      LINSPEC_UNROLL
      for (int r = 0; r < kFragmentRows; ++r) {
        if (grid.Owns(thread, r)) Fma4(shared.q[row * kMaxHeadDim + grid.Row(thread, r)], s.v[r], sum);
      }
      Store4(shared.tile + (grid.Group(thread) * kRowTile + row) * d + grid.Column(thread), sum);
    }
  }

  // z of the row, and its squares for the norm.
  LINSPEC_BLOCK void Grouped(int thread, int row_begin, int rows, Accumulator& sum) const {
    const Grid grid(d);
    const int row = thread / grid.columns, c = grid.Column(thread);
    if (row >= rows) return;
    if (w.folded) {
      Vec4 state{0, 0, 0, 0};
      for (int g = 0; g < grid.groups; ++g) Fma4(1.0f, Load4(shared.tile + (g * kRowTile + row) * d + c), state);
      const float decay = w.layer.decay != nullptr ? w.layer.decay[w.kv_head] : 1.0f;
      Fma4(Power(decay, w.Position(row_begin + row) / w.layer.group_size), state, sum.grouped);
    }
    shared.squares[row * (kMaxHeadDim / 4) + c / 4] = Dot4(sum.grouped, sum.grouped, 0.0f);
  }

  LINSPEC_BLOCK void Finish(int thread, int head, int row_begin, int rows, const Accumulator& sum) const {
    const int row = thread / (d / 4), c = thread % (d / 4) * 4;
    if (row >= rows) return;
    Vec4 y = sum.local;
    if (w.layer.global != Global::kNone) {
      float scale = w.layer.global_factor;
      if (w.layer.global == Global::kRmsNorm) {
        float squares = 0.0f;
        for (int i = 0; i < d / 4; ++i) squares += shared.squares[row * (kMaxHeadDim / 4) + i];
        scale = w.layer.global_gain[head] / sqrtf(squares / static_cast<float>(d) + w.layer.global_norm_eps);
      }
      Fma4(scale, sum.grouped, y);
    }
    const int64_t at = (w.first_out + row_begin + row) * w.layer.num_heads * d + static_cast<int64_t>(head) * d + c;
    if (params.out != nullptr) Store4(params.out + at, y);
    if (params.out_bf16 == nullptr) return;
    params.out_bf16[at] = RoundToBf16(y.x);
    params.out_bf16[at + 1] = RoundToBf16(y.y);
    params.out_bf16[at + 2] = RoundToBf16(y.z);
    params.out_bf16[at + 3] = RoundToBf16(y.w);
  }
};

// All query heads of the kv head, all rows of the window.
template <int kDim, typename Block>
LINSPEC_BLOCK void Attend(const Block& block, const Window& w, const AttentionParams& p, AttentionShared& shared,
                          typename Block::template PerThread<Fragment>& s) {
  const HeadProgram<kDim> program(w, p, shared);
  const int heads = w.layer.num_heads / w.layer.num_kv_heads;
  typename Block::template PerThread<Accumulator> sums;
  for (int h = 0; h < heads; ++h) {
    const int head = w.kv_head * heads + h;
    for (int row = w.first_query; row < w.num_rows; row += kRowTile) {
      const int rows = w.num_rows - row < kRowTile ? w.num_rows - row : kRowTile;
      const int tokens = w.ring_tokens() + row + rows;  // no row sees nodes after itself
      block.Phase([&](int t) {
        sums[t] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
        program.StageQueries(t, h, row, rows);
      });
      for (int begin = 0; begin < tokens; begin += kChunk) {
        const int count = tokens - begin < kChunk ? tokens - begin : kChunk;
        block.Phase([&](int t) { program.template Stage<true>(t, begin, count); });
        block.Phase([&](int t) { program.Score(t, head, row, rows, begin, count); });
        block.Phase([&](int t) { program.template Stage<false>(t, begin, count); });
        block.Phase([&](int t) { program.Accumulate(t, row, rows, count, sums[t]); });
      }
      if (w.layer.global != Global::kNone) {
        if (w.folded) block.Phase([&](int t) { program.PartialState(t, rows, s[t]); });
        block.Phase([&](int t) { program.Grouped(t, row, rows, sums[t]); });
      }
      block.Phase([&](int t) { program.Finish(t, head, row, rows, sums[t]); });
    }
  }
}

}  // namespace linspec::cuda
