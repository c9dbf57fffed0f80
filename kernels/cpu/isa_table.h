// The innermost loops, one table per instruction set; CpuOpsImpl (cpu_ops.cc) does blocking and threads around them.
//
// Every table gives the same bits: floating-point reductions run in 16 logical lanes with fused multiply-adds and a
// fixed tree at the end, int8 dots are exact. The scalar table is the readable reference.
#pragma once

#include <cstdint>

namespace linspec::cpu {

inline constexpr int kLanes = 16;            // outputs per packed block, and lanes of a reduction
inline constexpr int kMaxWindow = 256 + 32;  // largest group plus the longest convolution: tokens of a row or a tile

// Weights of 16 output rows, interleaved so that one pass over k feeds 16 outputs:
//   f32, bf16: [block][k][16]          i8: [block][k / 4][16][4], k padded with zeros to a multiple of 4
struct PackedMatrix {
  const void* data;
  const float* scales;      // i8: [rows padded to 16]
  const int32_t* row_sums;  // i8: [rows padded to 16] sum of the row's weights
  int64_t rows, cols;
};

// x quantised per row for i8 weights to integers in [-127, 127], cols padded with zeros to a multiple of 4.
struct QuantizedRows {
  const uint8_t* values;  // [num_rows, stride] bytes as the table's own dots take them: signed, or plus 128
  const float* scales;    // [num_rows]
  int64_t stride;
};

// Up to kMaxQueryRows query rows of one head whose positions lie in one group. A row sees the shared tokens from
// `first` on, then tokens of its own (ancestors in the call, itself last), in ascending position. Shared ones are
// loaded once. T: what keys, values and S are held in, float or the bits of bf16 (uint16_t).
inline constexpr int kMaxQueryRows = 4;
template <typename T>
struct QueryRow {
  const float* q;  // [d]
  float* out;      // [d]
  int first;       // first shared token seen; num_shared if own tokens skip some
  int num_own;
  int own_local_begin;    // first own token of the row's group (num_own: no local branch)
  const T* const* own_k;  // [num_own]
  const T* const* own_v;  // [num_own]
};
template <typename T>
struct AttentionTile {
  QueryRow<T> rows[kMaxQueryRows];
  int num_rows;
  const T* const* k;  // [num_shared]; entries before local_begin are unused
  const T* const* v;  // [num_shared]
  int num_shared;
  int local_begin;    // first shared token of the rows' group (num_shared: no local branch)
  const float* taps;  // [num_taps] tap l weighs the token l before a row's last one; null: none
  int num_taps;
  const T* s;          // [d, d] folded state; null: no global branch
  float global_scale;  // factor (scaled) or gain (rms norm)
  bool rms_norm;
  float eps;
  int head_dim;
  float* scratch;  // [kMaxQueryRows, kMaxWindow + d]: weights of the tokens, then q S
};

// s <- decay * s + sum_j k_j^T v_j, j ascending; of a T of 16 bits the sum is rounded by state_rounding.h, its first
// element with key rounding_key.
template <typename T>
struct FoldParams {
  T* s;  // [d, d]
  float decay;
  const T* const* k;  // [num_tokens]
  const T* const* v;  // [num_tokens]
  int num_tokens;
  int head_dim;
  uint32_t rounding_key;
};

template <typename T>
struct StateTable {
  void (*attention_tile)(const AttentionTile<T>&);
  void (*fold)(const FoldParams<T>&);
};

struct IsaTable {
  // y[m, n] for rows [m_begin, m_end) and blocks [block_begin, block_end) of 16 outputs.
  void (*matmul_f32)(const PackedMatrix&, const float* x, float* y, int64_t num_rows, int64_t block_begin,
                     int64_t block_end, bool accumulate);
  void (*matmul_bf16)(const PackedMatrix&, const float* x, float* y, int64_t num_rows, int64_t block_begin,
                      int64_t block_end, bool accumulate);
  void (*matmul_i8)(const PackedMatrix&, const QuantizedRows&, float* y, int64_t num_rows, int64_t block_begin,
                    int64_t block_end, bool accumulate);
  void (*quantize_row)(const float* x, int64_t cols, int64_t padded_cols, uint8_t* values, float* scale);
  void (*rms_norm)(const float* x, const float* weight, float* out, int64_t dim, float eps);
  void (*silu_mul)(const float* gate, const float* up, float* out, int64_t dim);
  void (*rope_normalize)(float* x, const float* cosines, const float* sines, int head_dim, float eps);
  void (*to_bf16)(const float* x, uint16_t* out, int64_t n);  // to nearest even
  StateTable<float> f32_state;
  StateTable<uint16_t> bf16_state;
};

template <typename T>
const StateTable<T>& StateTableOf(const IsaTable& table);
template <>
inline const StateTable<float>& StateTableOf(const IsaTable& table) {
  return table.f32_state;
}
template <>
inline const StateTable<uint16_t>& StateTableOf(const IsaTable& table) {
  return table.bf16_state;
}

const IsaTable& ScalarTable();
const IsaTable& Avx2Table();
const IsaTable& Avx512Table();
const IsaTable& AmxTable();

}  // namespace linspec::cpu
