// The forward pass of DeviceModel: which kernels a step queues, in the order of docs/cuda.md.
#include "kernels/cuda/device_model.h"

namespace linspec::cuda {
LayerParams DeviceModel::ShapeOf(int index) const {
  const LinspecCudaLayer& layer = layers_[index];
  return {.num_heads = shape_.num_heads,
          .num_kv_heads = shape_.num_kv_heads,
          .head_dim = shape_.head_dim,
          .group_size = shape_.group_size,
          .conv_kernel = shape_.conv_kernel,
          .local = shape_.local,
          .global = static_cast<Global>(shape_.global),
          .global_factor = layer.global_factor,
          .global_norm_eps = shape_.global_norm_eps,
          .global_gain = layer.global_gain,
          .decay = layer.decay,
          .conv_taps = layer.conv_taps,
          .index = index};
}

AttentionParams DeviceModel::AttentionOf(int index, const LinspecCudaStates& states) const {
  return {.layer = ShapeOf(index),
          .states = {.base = states.base,
                     .per_slot = states.bytes_per_slot / state_element_bytes(),
                     .layer_offset = index * states.bytes_per_layer / state_element_bytes(),
                     .bf16 = bf16_states()},
          .tasks = nullptr,
          .qkv = qkv(),
          .ancestors = nullptr,
          .paths = nullptr,
          .out = nullptr,
          .out_bf16 = attention_.as<uint16_t>()};
}

// The residual stream of every row, in x_ at the end.
void DeviceModel::Layers(const StepInput& input, const LinspecCudaStates& states, Attention attention) {
  const cudaStream_t stream = context_->stream();
  const int rows = input.num_rows;
  float* x = x_.as<float>();
  uint16_t* normed = normed_.as<uint16_t>();
  // The tasks of trees may be written by the kernel ahead, and attention reads them early.
  const bool overlapped = input.ancestors == nullptr;
  LaunchEmbed({.table = weights_.embedding, .tokens = input.tokens, .out = x}, rows, stream, overlapped);
  LaunchRopeTable(input.positions, shape_.rope_theta, shape_.head_dim, angles_.as<float2>(), rows, stream);
  // A norm runs with the products around it where that can be.
  const auto norm = [&](const float* weight) {
    return NormAfter{.weight = weight, .out = normed, .squares = squares_.as<float>()};
  };
  NormBefore before = products_.Norm(x, norm(layers_[0].attention_norm), shape_.rms_norm_eps, layers_[0].qkv, rows);
  // Rows are turned at the end of qkv; where that cannot be, single ones of few requests inside verification, others by
  // a launch.
  const bool raw = attention == Attention::kVerify && input.kept_rows == nullptr && input.last_rows == 0 &&
                   VerifyTakesRawRows(ShapeOf(0), input.num_tasks, input.max_rows) &&
                   !products_.TurnsHeads(layers_[0].qkv, shape_.head_dim, rows);
  for (int i = 0; i < shape_.num_layers; ++i) {
    const LinspecCudaLayer& layer = layers_[i];
    void* kept = attention == Attention::kVerify ? kept_kv(i) : nullptr;
    const RopeRows rope{.qkv = qkv(),
                        .angles = angles_.as<float2>(),
                        .num_heads = shape_.num_heads,
                        .num_kv_heads = shape_.num_kv_heads,
                        .head_dim = shape_.head_dim,
                        .eps = shape_.qk_norm_eps,
                        .kv = kept,
                        .bf16 = bf16_states(),
                        .kv_rows = input.kept_rows};
    if (raw) {
      products_.Matmul(layer.qkv, normed, qkv(), false, rows, before);
    } else {
      products_.Qkv(layer.qkv, normed, rope, rows, before);
    }
    AttentionParams params = AttentionOf(i, states);
    params.kv = kept;
    if (raw) params.raw = {.angles = angles_.as<float>(), .eps = shape_.qk_norm_eps, .kv = kept};
    params.tasks = input.tasks;
    params.ancestors = input.ancestors;
    params.max_rows = input.max_rows;
    params.last_rows = input.last_rows;
    params.scratch = prefill_states(rows);
    params.num_groups = input.num_groups;
    params.exact_prefill = products_.deterministic();
    (attention == Attention::kPrefill ? LaunchPrefill : LaunchVerify)(params, input.num_tasks, stream);
    before = products_.AddAndNorm(layer.o, attention_.as<uint16_t>(), x, norm(layer.mlp_norm), shape_.rms_norm_eps,
                                  layer.gate_up, rows);
    products_.GateUp(layer.gate_up, normed, gate_up(), activated(rows), rows, before);
    if (i + 1 == shape_.num_layers) {
      products_.Matmul(layer.down, activated(rows), x, true, rows);
      break;
    }
    const LinspecCudaLayer& next = layers_[i + 1];
    before = products_.AddAndNorm(layer.down, activated(rows), x, norm(next.attention_norm), shape_.rms_norm_eps,
                                  next.qkv, rows);
  }
}

// Final norm and logits. hidden: the normed states too, or null.
void DeviceModel::Logits(int rows, float* hidden) {
  LaunchRmsNorm({.x = x_.as<float>(),
                 .weight = weights_.final_norm,
                 .out = hidden,
                 .out_bf16 = normed_.as<uint16_t>(),
                 .dim = shape_.hidden_size,
                 .eps = shape_.rms_norm_eps},
                rows, context_->stream());
  products_.Matmul(weights_.lm_head, normed_.as<uint16_t>(), logits(), false, rows);
}

// Final norm, logits, and the token after each row.
void DeviceModel::Head(const StepInput& input) {
  const cudaStream_t stream = context_->stream();
  Logits(input.num_rows, hidden_.as<float>());
  if (input.sampling == nullptr) return;
  LaunchSample({.logits = logits(),
                .sampling = input.sampling,
                .edits = input.edits,
                .sampled = sampled_.as<int32_t>(),
                .vocab = shape_.vocab_size},
               input.num_rows, stream);
}

}  // namespace linspec::cuda
