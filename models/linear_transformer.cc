#include "models/linear_transformer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/check.h"

namespace linspec {
namespace {

// Long prompts run in blocks so that activations stay in the second-level caches; the bits do not depend on it.
constexpr int64_t kPrefillRows = 128;

// Scratch only grows: a smaller batch reuses what a larger one allocated.
float* Grow(AlignedVector<float>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

int64_t FloatBytes(const std::vector<float>& values) { return static_cast<int64_t>(values.size() * sizeof(float)); }

}  // namespace

void EmbeddingTable::Lookup(int32_t token, float* out) const {
  const std::byte* row = data.data() + token * dim * static_cast<int64_t>(DTypeSize(dtype));
  switch (dtype) {
    case DType::kF32:
      std::memcpy(out, row, dim * sizeof(float));
      return;
    case DType::kI8: {
      const auto* values = reinterpret_cast<const int8_t*>(row);
      for (int64_t i = 0; i < dim; ++i) out[i] = static_cast<float>(values[i]) * row_scales[token];
      return;
    }
    default: {
      const auto* bits = reinterpret_cast<const uint16_t*>(row);
      std::transform(bits, bits + dim, out, dtype == DType::kF16 ? HalfToFloat : BFloat16ToFloat);
    }
  }
}

LinearTransformer::LinearTransformer(ModelConfig config, TransformerWeights weights, std::shared_ptr<CpuOps> ops,
                                     DType state_dtype)
    : config_(std::move(config)),
      weights_(std::move(weights)),
      ops_(std::move(ops)),
      state_dtype_(state_dtype),
      kept_qkv_(config_.num_layers) {}

int64_t LinearTransformer::streamed_bytes() const {
  int64_t bytes = FloatBytes(weights_.final_norm) + weights_.lm_head->bytes();
  for (const TransformerLayer& layer : weights_.layers) {
    bytes += layer.qkv->bytes() + layer.o->bytes() + layer.gate_up->bytes() + layer.down->bytes();
    bytes += FloatBytes(layer.attention_norm) + FloatBytes(layer.mlp_norm) + FloatBytes(layer.global_gain) +
             FloatBytes(layer.decay) + FloatBytes(layer.conv_taps);
  }
  return bytes;
}

int64_t LinearTransformer::weight_bytes() const {
  return streamed_bytes() + static_cast<int64_t>(weights_.embedding.data.size()) +
         FloatBytes(weights_.embedding.row_scales);
}

std::string LinearTransformer::Describe() const {
  return fmt::format("{:.1f} M parameters, {} layers of {} heads, {} weights ({:.1f} MiB), {} with {} thread{}",
                     static_cast<double>(config_.NumParameters()) / 1e6, config_.num_layers, config_.num_heads,
                     DTypeName(weights_.layers[0].qkv->dtype()), static_cast<double>(weight_bytes()) / (1 << 20),
                     IsaName(ops_->isa()), ops_->num_threads(), ops_->num_threads() == 1 ? "" : "s");
}

void LinearTransformer::Forward(std::span<const int32_t> tokens, std::span<const int64_t> positions, Purpose purpose,
                                Attention attention) {
  const int64_t n = static_cast<int64_t>(tokens.size()), dim = config_.hidden_size;
  float* x = Grow(x_, n * dim);
  for (int64_t i = 0; i < n; ++i) weights_.embedding.Lookup(tokens[i], x + i * dim);
  float* scratch_qkv = purpose == Purpose::kKeptOutput ? nullptr : Grow(qkv_, n * qkv_width());
  float* attended = Grow(attention_, n * attention_width());
  for (int i = 0; i < config_.num_layers; ++i) {
    const TransformerLayer& layer = weights_.layers[i];
    float* qkv = purpose == Purpose::kKeptOutput ? kept_qkv_[i].data() : scratch_qkv;
    ops_->ProjectQkv({.x = x_.data(),
                      .w = layer.qkv.get(),
                      .y = qkv,
                      .num_rows = n,
                      .norm_weight = layer.attention_norm.data(),
                      .norm_eps = config_.rms_norm_eps},
                     {.qkv = qkv,
                      .positions = positions.data(),
                      .num_rows = n,
                      .num_heads = config_.num_heads,
                      .num_kv_heads = config_.num_kv_heads,
                      .head_dim = config_.head_dim,
                      .rope_theta = config_.rope_theta,
                      .qk_norm_eps = config_.linear_attention.qk_norm_eps});
    attention(i, qkv, attended);
    if (purpose == Purpose::kState && i + 1 == config_.num_layers) return;  // nothing reads what would follow
    ops_->Matmul({.x = attended, .w = layer.o.get(), .y = x_.data(), .num_rows = n, .accumulate = true});
    Mlp(layer, n);
  }
}

void LinearTransformer::Mlp(const TransformerLayer& layer, int64_t n) {
  const int64_t inner = config_.intermediate_size;
  float* gate_up = Grow(gate_up_, n * 2 * inner);
  float* activated = Grow(mlp_, n * inner);
  ops_->GatedMatmul({.product = {.x = x_.data(),
                                 .w = layer.gate_up.get(),
                                 .y = gate_up,
                                 .num_rows = n,
                                 .norm_weight = layer.mlp_norm.data(),
                                 .norm_eps = config_.rms_norm_eps},
                     .out = activated});
  ops_->Matmul({.x = activated, .w = layer.down.get(), .y = x_.data(), .num_rows = n, .accumulate = true});
}

VerifyResult LinearTransformer::Head(int64_t n) {
  const int64_t dim = config_.hidden_size, vocab = config_.vocab_size;
  float* logits = Grow(logits_, n * vocab);
  float* hidden = Grow(hidden_, n * dim);
  ops_->RmsNorm({.x = x_.data(),
                 .weight = weights_.final_norm.data(),
                 .out = hidden,
                 .num_rows = n,
                 .dim = dim,
                 .eps = config_.rms_norm_eps});
  ops_->Matmul({.x = hidden, .w = weights_.lm_head.get(), .y = logits, .num_rows = n});
  return {.logits = {logits, static_cast<size_t>(n * vocab)},
          .hidden = {hidden, static_cast<size_t>(n * dim)},
          .sampled = {}};
}

absl::Status LinearTransformer::Prefill(std::span<const PrefillChunk> chunks, StatePool* pool) {
  for (const PrefillChunk& chunk : chunks) {
    if (absl::Status valid = CheckTokens(chunk.tokens, config_.vocab_size); !valid.ok()) return valid;
  }
  if (absl::Status valid = CheckDistinctSlots(chunks); !valid.ok()) return valid;

  std::vector<PrefillChunk> pieces;
  int64_t num_rows = 0;
  for (const PrefillChunk& chunk : chunks) {
    for (size_t done = 0; done < chunk.tokens.size();) {
      const size_t take = std::min<size_t>(chunk.tokens.size() - done, kPrefillRows - num_rows);
      pieces.push_back({.slot = chunk.slot, .tokens = chunk.tokens.subspan(done, take)});
      done += take;
      num_rows += static_cast<int64_t>(take);
      if (num_rows == kPrefillRows) {
        PrefillBlock(pieces, pool);
        pieces.clear();
        num_rows = 0;
      }
    }
  }
  if (!pieces.empty()) PrefillBlock(pieces, pool);
  return absl::OkStatus();
}

void LinearTransformer::PrefillBlock(std::span<const PrefillChunk> pieces, StatePool* pool) {
  std::vector<int32_t> tokens;
  std::vector<int64_t> positions;
  requests_.clear();
  for (const PrefillChunk& piece : pieces) {
    const int64_t length = pool->length(piece.slot);
    requests_.push_back({.state = {},
                         .length = length,
                         .row_begin = static_cast<int64_t>(tokens.size()),
                         .num_rows = static_cast<int>(piece.tokens.size()),
                         .parents = nullptr});
    for (size_t i = 0; i < piece.tokens.size(); ++i) positions.push_back(length + static_cast<int64_t>(i));
    tokens.insert(tokens.end(), piece.tokens.begin(), piece.tokens.end());
  }
  Forward(tokens, positions, Purpose::kState, [&](int layer, const float* qkv, float* out) {
    for (size_t r = 0; r < pieces.size(); ++r) requests_[r].state = pool->layer(pieces[r].slot, layer);
    ops_->PrefillAttention({.layer = &weights_.layers[layer].attention, .qkv = qkv, .out = out, .requests = requests_});
  });
  for (size_t r = 0; r < pieces.size(); ++r) {
    pool->set_length(pieces[r].slot, requests_[r].length + requests_[r].num_rows);
  }
}

absl::StatusOr<VerifyResult> LinearTransformer::Verify(const VerifyBatch& batch, const StatePool& pool) {
  if (absl::Status valid = CheckBatch(batch, config_.vocab_size, pool.capacity()); !valid.ok()) return valid;
  verified_ = {};
  verified_.batch.row_starts.assign(batch.row_starts.size(), 0);
  verified_.batch.slots = batch.slots;
  return VerifyNewNodes(batch, pool);
}

absl::StatusOr<VerifyResult> LinearTransformer::Extend(const VerifyBatch& batch, const StatePool& pool) {
  if (absl::Status valid = CheckBatch(batch, config_.vocab_size, pool.capacity()); !valid.ok()) return valid;
  if (absl::Status valid = verified_.CheckExtend(batch, pool); !valid.ok()) return valid;
  return VerifyNewNodes(batch, pool);
}

VerifyResult LinearTransformer::VerifyNewNodes(const VerifyBatch& batch, const StatePool& pool) {
  MoveKeptRows(batch);
  std::vector<int32_t> new_rows, tokens;
  std::vector<int64_t> positions;
  std::vector<int> depths(batch.num_rows(), 0);
  requests_.clear();
  for (int r = 0; r < batch.num_requests(); ++r) {
    const int32_t begin = batch.row_starts[r];
    const int64_t length = pool.length(batch.slots[r]);
    requests_.push_back({.state = {},
                         .length = length,
                         .row_begin = begin,
                         .num_rows = NumNodes(batch, r),
                         .parents = batch.parents.data() + begin});
    for (int32_t row = begin; row < batch.row_starts[r + 1]; ++row) {
      if (row > begin) depths[row] = depths[begin + batch.parents[row]] + 1;
      if (row - begin < NumNodes(verified_.batch, r)) continue;
      new_rows.push_back(row);
      tokens.push_back(batch.tokens[row]);
      positions.push_back(length + depths[row]);
    }
  }
  verified_.Set(batch, pool);

  // Attention needs the k and v of all nodes, so it runs over the kept rows; the rest of a layer sees new rows only.
  const int64_t width = qkv_width(), out_width = attention_width(), num_new = static_cast<int64_t>(new_rows.size());
  const bool all_new = num_new == batch.num_rows();
  if (num_new == 0) return {};
  const Purpose purpose = all_new ? Purpose::kKeptOutput : Purpose::kOutput;
  Forward(tokens, positions, purpose, [&](int layer, const float* qkv, float* out) {
    float* kept = kept_qkv_[layer].data();
    for (int64_t i = 0; i < num_new && !all_new; ++i) std::copy_n(qkv + i * width, width, kept + new_rows[i] * width);
    for (int r = 0; r < batch.num_requests(); ++r) requests_[r].state = pool.layer(batch.slots[r], layer);
    float* tree_out = all_new ? out : Grow(tree_attention_, batch.num_rows() * out_width);
    ops_->VerifyAttention(
        {.layer = &weights_.layers[layer].attention, .qkv = kept, .out = tree_out, .requests = requests_});
    if (all_new) return;
    for (int64_t i = 0; i < num_new; ++i) {
      std::copy_n(tree_out + new_rows[i] * out_width, out_width, out + i * out_width);
    }
  });
  return Head(num_new);
}

// Makes room for the nodes that batch adds: moves the kept rows of each request to where batch has them.
void LinearTransformer::MoveKeptRows(const VerifyBatch& batch) {
  const int64_t width = qkv_width();
  for (AlignedVector<float>& layer_qkv : kept_qkv_) {
    float* kept = Grow(layer_qkv, batch.num_rows() * width);
    for (int r = batch.num_requests() - 1; r >= 0; --r) {  // rows only move up: last request first
      std::memmove(kept + batch.row_starts[r] * width, kept + verified_.batch.row_starts[r] * width,
                   NumNodes(verified_.batch, r) * width * sizeof(float));
    }
  }
}

absl::Status LinearTransformer::Commit(const VerifyBatch& batch, std::span<const std::vector<int32_t>> paths,
                                       StatePool* pool) {
  if (absl::Status valid = verified_.CheckCommit(batch, paths, *pool); !valid.ok()) return valid;
  std::vector<CommitRequest> requests;
  std::vector<int32_t> slots;
  for (int r = 0; r < batch.num_requests(); ++r) {
    if (paths[r].empty()) continue;
    slots.push_back(batch.slots[r]);
    requests.push_back(
        {.state = {}, .length = verified_.lengths[r], .row_begin = batch.row_starts[r], .path = paths[r]});
  }
  std::vector<std::vector<CommitRequest>> states(config_.num_layers, requests);
  std::vector<CommitAttentionParams> layers;
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    for (size_t i = 0; i < requests.size(); ++i) states[layer][i].state = pool->layer(slots[i], layer);
    layers.push_back(
        {.layer = &weights_.layers[layer].attention, .qkv = kept_qkv_[layer].data(), .requests = states[layer]});
  }
  ops_->CommitAttention(layers);
  for (size_t i = 0; i < requests.size(); ++i) {
    pool->set_length(slots[i], requests[i].length + static_cast<int64_t>(requests[i].path.size()));
  }
  verified_ = {};
  return absl::OkStatus();
}

absl::Status LinearTransformer::Embed(std::span<const int32_t> tokens, std::span<float> out) {
  if (absl::Status valid = CheckTokens(tokens, config_.vocab_size); !valid.ok()) return valid;
  if (std::ssize(out) != std::ssize(tokens) * config_.hidden_size) {
    return absl::InternalError(fmt::format("embed: {} values for {} tokens", out.size(), tokens.size()));
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    weights_.embedding.Lookup(tokens[i], out.data() + i * config_.hidden_size);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::span<const float>> LinearTransformer::Unembed(std::span<const float> hidden) {
  const int64_t dim = config_.hidden_size, num_rows = std::ssize(hidden) / dim;
  if (std::ssize(hidden) != num_rows * dim) {
    return absl::InternalError(fmt::format("unembed: {} values are not rows of {}", hidden.size(), dim));
  }
  float* logits = Grow(logits_, num_rows * config_.vocab_size);
  if (num_rows > 0) {
    ops_->Matmul({.x = hidden.data(), .w = weights_.lm_head.get(), .y = logits, .num_rows = num_rows});
  }
  return std::span<const float>(logits, num_rows * config_.vocab_size);
}

}  // namespace linspec
