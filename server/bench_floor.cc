#include "server/bench_floor.h"

#include <algorithm>

#include "kernels/cpu/peak.h"

namespace linspec {

Work StepWork(const ModelConfig& config, double weight_bytes, int batch, int rows) {
  const LinearAttentionConfig& attention = config.linear_attention;
  const double d = config.head_dim, heads = config.num_heads, kv_heads = config.num_kv_heads,
               layers = config.num_layers;
  double keys = 0, values = 0;  // tokens in the window, mean over the phases of a group
  for (int phase = 0; phase < attention.group_size; ++phase) {
    const int local = attention.local ? phase + 1 : 1;
    keys += attention.local ? local : 0;
    values += std::max(local, attention.conv_kernel);
  }
  keys /= attention.group_size;
  values /= attention.group_size;
  const double state = attention.global == GlobalBranch::kNone ? 0 : d * d;
  const double dim = static_cast<double>(config.hidden_size), inner = static_cast<double>(config.intermediate_size);
  const double layer_macs = dim * (heads + 2 * kv_heads) * d + heads * d * dim + 3 * dim * inner;
  const double num_rows = static_cast<double>(batch) * rows;
  return {.bytes = weight_bytes + batch * layers * kv_heads * (state + (keys + values) * d) * sizeof(float),
          .weight_macs = num_rows * (layers * layer_macs + static_cast<double>(config.vocab_size) * dim),
          .float_macs = num_rows * layers * heads * (state + (keys + values) * d)};
}

Peaks MeasurePeaks(Isa isa, DType weight_dtype, int num_threads) {
  const double floats = MeasureMultiplyAddPeak(isa, DType::kF32, num_threads);
  if (weight_dtype != DType::kI8) return {.weights = floats, .floats = floats};
  return {.weights = MeasureMultiplyAddPeak(isa, DType::kI8, num_threads), .floats = floats};
}

double ArithmeticSeconds(const Work& work, const Peaks& peaks) {
  return work.weight_macs / peaks.weights + work.float_macs / peaks.floats;
}

}  // namespace linspec
