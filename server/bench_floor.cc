#include "server/bench_floor.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>

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

absl::StatusOr<Machinery> Machinery::Measure(const Machine& machine, DType weights) {
  Machinery result;
  result.isa_ = machine.ops->isa();
  result.threads_ = machine.ops->num_threads();
  if (machine.cuda != nullptr) {
    const auto ceilings = machine.cuda->Measure();
    if (!ceilings.ok()) return ceilings.status();
    result.cuda_ = true;
    result.bytes_per_s_ = ceilings->read_bytes_per_s;
    result.weight_macs_per_s_ = ceilings->bf16_flops_per_s / 2;
    return result;
  }
  result.float_macs_per_s_ = MeasureMultiplyAddPeak(result.isa_, DType::kF32, result.threads_);
  result.weight_macs_per_s_ = weights == DType::kI8 ? MeasureMultiplyAddPeak(result.isa_, DType::kI8, result.threads_)
                                                    : result.float_macs_per_s_;
  return result;
}

double Machinery::ReadBandwidth(double bytes) const {
  return cuda_ ? bytes_per_s_ : MeasureReadBandwidth(isa_, threads_, static_cast<int64_t>(bytes));
}

double Machinery::ArithmeticSeconds(const Work& work) const {
  const auto seconds = [](double macs, double per_s) { return per_s > 0 ? macs / per_s : 0; };
  return seconds(work.weight_macs, weight_macs_per_s_) + seconds(work.float_macs, float_macs_per_s_);
}

std::string Machinery::Describe() const {
  return fmt::format("\"threads\": {}, \"weight_gmac_s\": {:.1f}, \"float_gmac_s\": {:.1f}", threads_,
                     weight_macs_per_s_ / 1e9, float_macs_per_s_ / 1e9);
}

}  // namespace linspec
