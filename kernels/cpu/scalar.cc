// The reference: plain loops, written to be read. SIMD tables must give the same bits (tests/kernels/ops_test.cc).
#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/cpu/isa_table.h"
#include "kernels/dtype.h"
#include "kernels/state_rounding.h"

namespace linspec::cpu {
namespace {

// 16 partial sums, then halves onto halves: the one reduction order of this library.
float ReduceLanes(float (&lanes)[kLanes]) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

float Widen(float value) { return value; }
float Widen(uint16_t bf16) { return BFloat16ToFloat(bf16); }

template <typename T>
float Dot(const float* a, const T* b, int64_t n) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i % kLanes] = std::fma(a[i], Widen(b[i]), lanes[i % kLanes]);
  return ReduceLanes(lanes);
}

// exp by 2^n * polynomial (Cephes coefficients), relative error under 2e-7; the same operations in every table.
float Exp(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float shifted = std::fma(x, 1.44269504f, 12582912.0f);  // adds 1.5 * 2^23: the low bits hold round(x log2 e)
  const float n = shifted - 12582912.0f;
  float r = std::fma(n, -0.693359375f, x);
  r = std::fma(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  const float y = std::fma(p * r, r, r) + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) << 23;
  return std::bit_cast<float>(std::bit_cast<int32_t>(y) + exponent);
}

template <typename T>
void MatmulFloat(const PackedMatrix& w, const float* x, float* y, int64_t num_rows, int64_t block_begin,
                 int64_t block_end, bool accumulate) {
  const T* data = static_cast<const T*>(w.data);
  for (int64_t m = 0; m < num_rows; ++m) {
    for (int64_t n = block_begin * kLanes; n < std::min(block_end * kLanes, w.rows); ++n) {
      const int64_t block = n / kLanes, lane = n % kLanes;
      float sum = 0;
      for (int64_t k = 0; k < w.cols; ++k) {
        sum = std::fma(x[m * w.cols + k], Widen(data[(block * w.cols + k) * kLanes + lane]), sum);
      }
      float& out = y[m * w.rows + n];
      out = accumulate ? out + sum : sum;
    }
  }
}

void MatmulI8(const PackedMatrix& w, const QuantizedRows& x, float* y, int64_t num_rows, int64_t block_begin,
              int64_t block_end, bool accumulate) {
  const int8_t* data = static_cast<const int8_t*>(w.data);
  for (int64_t m = 0; m < num_rows; ++m) {
    for (int64_t n = block_begin * kLanes; n < std::min(block_end * kLanes, w.rows); ++n) {
      const int64_t block = n / kLanes, lane = n % kLanes;
      int32_t sum = 0;
      for (int64_t k = 0; k < x.stride; ++k) {
        sum += static_cast<int8_t>(x.values[m * x.stride + k]) *
               data[((block * x.stride + k / 4 * 4) * kLanes) + lane * 4 + k % 4];
      }
      const float value = static_cast<float>(sum) * x.scales[m] * w.scales[n];
      float& out = y[m * w.rows + n];
      out = accumulate ? out + value : value;
    }
  }
}

void QuantizeRow(const float* x, int64_t cols, int64_t padded_cols, uint8_t* values, float* scale) {
  float max_abs = 0;
  for (int64_t i = 0; i < cols; ++i) max_abs = std::max(max_abs, std::fabs(x[i]));
  *scale = max_abs / 127.0f;
  const float inverse = max_abs > 0 ? 127.0f / max_abs : 0.0f;
  for (int64_t i = 0; i < padded_cols; ++i) {
    // The clamp also turns NaN into a number; the scale or the sampler's check still tells of it.
    const float value = i < cols ? std::min(std::max(-127.0f, std::nearbyint(x[i] * inverse)), 127.0f) : 0.0f;
    values[i] = static_cast<uint8_t>(static_cast<int8_t>(value));
  }
}

void RmsNorm(const float* x, const float* weight, float* out, int64_t dim, float eps) {
  const float scale = 1.0f / std::sqrt(Dot(x, x, dim) / static_cast<float>(dim) + eps);
  for (int64_t i = 0; i < dim; ++i) out[i] = x[i] * scale * weight[i];
}

void SiluMul(const float* gate, const float* up, float* out, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) out[i] = gate[i] / (1.0f + Exp(-gate[i])) * up[i];
}

void RopeNormalize(float* x, const float* cosines, const float* sines, int head_dim, float eps) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = std::fma(a, cosines[i], -(b * sines[i]));
    x[i + half] = std::fma(b, cosines[i], a * sines[i]);
  }
  const float scale = 1.0f / std::sqrt(Dot(x, x, head_dim) + eps);
  for (int i = 0; i < head_dim; ++i) x[i] *= scale;
}

// y = sum_j ([j in group] relu(q.k_j)^2 + tap_{p-j}) v_j, ascending j; then the grouped branch on top.
template <typename T>
void ComputeAttentionRow(const AttentionTile<T>& tile, const QueryRow<T>& row) {
  const int d = tile.head_dim;
  std::fill(row.out, row.out + d, 0.0f);
  const auto add_token = [&](const T* k, const T* v, bool local, int lag) {
    float weight = 0;
    if (local) {
      const float dot = Dot(row.q, k, d), score = dot > 0 ? dot : 0.0f;
      weight = score * score;
    }
    if (lag < tile.num_taps) weight += tile.taps[lag];
    for (int c = 0; c < d; ++c) row.out[c] = std::fma(weight, Widen(v[c]), row.out[c]);
  };
  for (int j = row.first; j < tile.num_shared; ++j) {
    add_token(tile.k[j], tile.v[j], j >= tile.local_begin, tile.num_shared - 1 - j + row.num_own);
  }
  for (int j = 0; j < row.num_own; ++j) {
    add_token(row.own_k[j], row.own_v[j], j >= row.own_local_begin, row.num_own - 1 - j);
  }
  if (tile.s == nullptr) return;
  float* global = tile.scratch;
  std::fill(global, global + d, 0.0f);
  for (int i = 0; i < d; ++i) {
    for (int c = 0; c < d; ++c) global[c] = std::fma(row.q[i], Widen(tile.s[i * d + c]), global[c]);
  }
  float scale = tile.global_scale;
  if (tile.rms_norm) scale /= std::sqrt(Dot(global, global, d) / static_cast<float>(d) + tile.eps);
  for (int c = 0; c < d; ++c) row.out[c] = std::fma(scale, global[c], row.out[c]);
}

template <typename T>
void ComputeAttentionTile(const AttentionTile<T>& tile) {
  for (int r = 0; r < tile.num_rows; ++r) ComputeAttentionRow(tile, tile.rows[r]);
}

void StoreSum(float sum, uint32_t, float* out) { *out = sum; }
void StoreSum(float sum, uint32_t rounding_key, uint16_t* out) { *out = StochasticBFloat16(sum, rounding_key); }

template <typename T>
void Fold(const FoldParams<T>& p) {
  for (int i = 0; i < p.head_dim; ++i) {
    for (int c = 0; c < p.head_dim; ++c) {
      const int element = i * p.head_dim + c;
      float sum = Widen(p.s[element]) * p.decay;
      for (int j = 0; j < p.num_tokens; ++j) sum = std::fma(Widen(p.k[j][i]), Widen(p.v[j][c]), sum);
      StoreSum(sum, p.rounding_key + element, p.s + element);
    }
  }
}

void ToBFloat16(const float* x, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = FloatToBFloat16(x[i]);
}

}  // namespace

const IsaTable& ScalarTable() {
  static constexpr IsaTable kTable = {MatmulFloat<float>,
                                      MatmulFloat<uint16_t>,
                                      MatmulI8,
                                      QuantizeRow,
                                      RmsNorm,
                                      SiluMul,
                                      RopeNormalize,
                                      ToBFloat16,
                                      {ComputeAttentionTile<float>, Fold<float>},
                                      {ComputeAttentionTile<uint16_t>, Fold<uint16_t>}};
  return kTable;
}

}  // namespace linspec::cpu
