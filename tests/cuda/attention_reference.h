// Linearized attention in double from its definition (docs/math.md, section 1), over the whole history of a request:
// no state, no ring, no folds. What the kernels must equal up to rounding.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace linspec::cuda {

struct ReferenceLayer {
  int heads, kv_heads, d, group, conv;
  bool local;
  int global;  // 0 none, 1 scaled, 2 RMS norm
  float factor, norm_eps;
  std::vector<float> gain, decay, taps;  // [heads], [kv_heads], [heads, conv]; gain and decay may be empty

  int stride() const { return (heads + 2 * kv_heads) * d; }
  double Decay(int kv_head) const { return decay.empty() ? 1.0 : double{decay[kv_head]}; }
};

// Rows of [q: H,d | k: Hkv,d | v: Hkv,d], one a token; row i of `path` stands at position i.
using TokenPath = std::vector<const float*>;

// Output [H, d] of the last token of the path.
inline std::vector<float> ReferenceOutput(const ReferenceLayer& layer, const TokenPath& path) {
  const int d = layer.d, last = static_cast<int>(path.size()) - 1, group = last / layer.group;
  std::vector<float> out(static_cast<size_t>(layer.heads) * d);
  for (int head = 0; head < layer.heads; ++head) {
    const int kv = head / (layer.heads / layer.kv_heads);
    const float* q = path[last] + static_cast<int64_t>(head) * d;
    std::vector<double> y(d), z(d);
    for (int j = 0; j <= last; ++j) {
      const float* k = path[j] + static_cast<int64_t>(layer.heads + kv) * d;
      const float* v = k + static_cast<int64_t>(layer.kv_heads) * d;
      double score = 0, weight = 0, grouped = 0;
      for (int c = 0; c < d; ++c) score += double{q[c]} * k[c];
      if (j / layer.group < group) {
        grouped = score * std::pow(layer.Decay(kv), group - 1 - j / layer.group);
      } else if (layer.local && score > 0) {
        weight = score * score;
      }
      if (last - j < layer.conv) weight += double{layer.taps[head * layer.conv + last - j]};
      for (int c = 0; c < d; ++c) {
        y[c] += weight * v[c];
        z[c] += grouped * v[c];
      }
    }
    double scale = layer.global == 0 ? 0.0 : double{layer.factor};
    if (layer.global == 2) {
      double squares = 0;
      for (const double value : z) squares += value * value;
      scale = layer.gain[head] / std::sqrt(squares / d + layer.norm_eps);
    }
    for (int c = 0; c < d; ++c) out[static_cast<size_t>(head) * d + c] = static_cast<float>(y[c] + scale * z[c]);
  }
  return out;
}

// State after the path: [S: Hkv,d,d | ring_k: Hkv,G,d | ring_v: Hkv,G,d]; NaN where nothing was written yet.
inline std::vector<float> ReferenceState(const ReferenceLayer& layer, const TokenPath& path) {
  const int64_t d = layer.d, g = layer.group, tokens = static_cast<int64_t>(path.size()), folded = tokens / g;
  std::vector<float> state(layer.kv_heads * (d * d + 2 * g * d), NAN);
  for (int kv = 0; kv < layer.kv_heads; ++kv) {
    std::vector<double> s(d * d);
    for (int64_t j = 0; j < tokens; ++j) {
      const float* k = path[j] + (layer.heads + kv) * d;
      const float* v = k + layer.kv_heads * d;
      std::copy(k, k + d, &state[layer.kv_heads * d * d + (kv * g + j % g) * d]);
      std::copy(v, v + d, &state[layer.kv_heads * (d + g) * d + (kv * g + j % g) * d]);
      if (j >= folded * g) continue;
      const double weight = std::pow(layer.Decay(kv), folded - 1 - j / g);
      for (int64_t r = 0; r < d; ++r) {
        for (int64_t c = 0; c < d; ++c) s[r * d + c] += weight * k[r] * v[c];
      }
    }
    if (folded == 0) continue;
    std::transform(s.begin(), s.end(), state.begin() + kv * d * d, [](double x) { return static_cast<float>(x); });
  }
  return state;
}

}  // namespace linspec::cuda
