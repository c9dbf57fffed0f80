#include "models/cuda_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "models/cuda_capacity.h"
#include "models/cuda_followed.h"
#include "models/cuda_memory.h"
#include "models/cuda_step.h"
#include "models/cuda_warm_up.h"
#include "models/cuda_weights.h"
#include "models/draft_guesser.h"
#include "models/verify_batch.h"

namespace linspec {
namespace {

const LinspecCudaMatrix& MatrixOf(const std::unique_ptr<PackedWeight>& weight) {
  return static_cast<const CudaMatrix&>(*weight).matrix();
}

class CudaModel final : public Model {
 public:
  CudaModel(ModelConfig config, TransformerWeights weights, std::shared_ptr<CudaDevice> device, DType state_dtype)
      : config_(std::move(config)),
        weights_(std::move(weights)),
        device_(std::move(device)),
        state_dtype_(state_dtype) {}
  ~CudaModel() override {
    if (model_ != nullptr) device_->api().destroy_model(model_);
  }
  absl::Status Init(bool deterministic);

  const ModelConfig& config() const override { return config_; }
  int64_t streamed_bytes() const override;
  DType weight_dtype() const override { return weights_.lm_head->dtype(); }
  DType state_dtype() const override { return state_dtype_; }
  int64_t weight_bytes() const override { return streamed_bytes() + weights_.packed_embedding->bytes(); }
  std::string Describe() const override;
  CudaHandle cuda() const override { return {device_, model_}; }
  bool chooses_tokens() const override { return true; }
  bool exact_across_groups() const override { return false; }
  bool prefills_as_it_decodes() const override { return false; }
  absl::Status health() const override { return device_->health(); }
  std::vector<DeviceStats> device_stats() const override;
  absl::StatusOr<std::unique_ptr<StatePool>> CreatePool(int num_slots) const override;
  int64_t SlotsThatFit() const override;
  int64_t MaxVerifyRows(const StatePool& pool) const override { return StepSizeOf(pool.capacity()).verify_rows; }
  std::vector<VerifySize> WarmUpSizes(int max_requests, int max_rows, int max_nodes) const override {
    return VerifyGraphSizes(max_requests, max_rows, max_nodes);
  }
  int64_t free_device_bytes() const override;

  absl::Status Prefill(std::span<const PrefillChunk> chunks, StatePool* pool) override;
  absl::StatusOr<VerifyResult> Verify(const VerifyBatch& batch, const StatePool& pool) override;
  absl::Status StartVerify(const VerifyBatch& batch, const StatePool& pool) override;
  absl::StatusOr<VerifyResult> FinishVerify() override;
  bool CanRunAhead() const override { return true; }
  absl::Status StartNext(StatePool* pool) override;
  bool CanDraftWith(const DraftGuesser& heads, int64_t num_requests) const override {
    return heads.cuda() != nullptr && num_requests <= LINSPEC_CUDA_MAX_FOLLOW_TASKS;
  }
  absl::Status StartDrafted(const SelfDraft& draft, StatePool* pool) override;
  absl::StatusOr<VerifyResult> Extend(const VerifyBatch& batch, const StatePool& pool) override;
  absl::Status Commit(const VerifyBatch& batch, std::span<const std::vector<int32_t>> paths, StatePool* pool) override;
  absl::StatusOr<std::span<const float>> Unembed(std::span<const float> hidden) override;

 private:
  absl::Status PrefillPass(std::span<const PrefillChunk> pieces, StatePool* pool);
  absl::Status CheckIdle() const;  // no verify is started and not finished

  const ModelConfig config_;
  const TransformerWeights weights_;
  const std::shared_ptr<CudaDevice> device_;
  const DType state_dtype_;
  DeviceVectors vectors_;
  LinspecCudaModel* model_ = nullptr;
  std::string device_name_;

  VerifiedBatch verified_;  // what was started last; its tokens are those of the first in flight
  CudaStep step_;
  std::vector<LinspecCudaTask> tasks_;  // of a prefill
  std::vector<int64_t> positions_;
  int num_rows_ = 0;       // of the step that will be finished next, if the host made it or its trees are roots
  int num_in_flight_ = 0;  // started and not finished: at most 2
  bool drafted_ = false;   // the last of them has trees that the device makes
  bool followed_ = false;  // and the one ahead of it is not committed
  FollowedSteps followed_steps_;
  std::vector<float> logits_;  // of Extend's new rows, and of Unembed

  // For device_stats, which any thread may call. Seconds and bytes.
  std::atomic<double> verify_s_ = 0, prefill_s_ = 0;
  mutable std::atomic<int64_t> state_bytes_ = 0, used_bytes_ = 0, total_bytes_ = 0;
};

// Memory as it was when the last pool was made: nothing large is allocated later.
std::vector<DeviceStats> CudaModel::device_stats() const {
  const int64_t weights = weight_bytes(), states = state_bytes_, used = used_bytes_;
  return {{.device = "0",
           .name = device_name_,
           .memory_bytes = {{"weights", weights}, {"states", states}, {"used", used}, {"total", total_bytes_}},
           .busy_seconds = {{"prefill", prefill_s_}, {"verify", verify_s_}}}};
}

absl::Status CudaModel::Init(bool deterministic) {
  const auto info = device_->Info();
  if (!info.ok()) return info.status();
  device_name_ =
      fmt::format("{} (sm_{}{}{})", info->name, info->major, info->minor, info->has_cublas ? "" : ", without cuBLASLt");
  const LinearAttentionConfig& rule = config_.linear_attention;
  const LinspecCudaShape shape{.hidden_size = config_.hidden_size,
                               .intermediate_size = config_.intermediate_size,
                               .vocab_size = config_.vocab_size,
                               .num_layers = config_.num_layers,
                               .num_heads = config_.num_heads,
                               .num_kv_heads = config_.num_kv_heads,
                               .head_dim = config_.head_dim,
                               .group_size = rule.group_size,
                               .conv_kernel = rule.conv_kernel,
                               .local = rule.local,
                               .global = static_cast<int32_t>(rule.global),
                               .rms_norm_eps = config_.rms_norm_eps,
                               .rope_theta = config_.rope_theta,
                               .qk_norm_eps = rule.qk_norm_eps,
                               .global_norm_eps = rule.global_norm_eps,
                               .state_type = state_dtype_ == DType::kBF16 ? kLinspecCudaBf16 : kLinspecCudaF32,
                               .reserved = 0};
  struct Offsets {
    int64_t attention_norm, mlp_norm, global_gain, decay, conv_taps;
  };
  std::vector<Offsets> at;
  for (const TransformerLayer& layer : weights_.layers) {
    at.push_back({vectors_.Add(layer.attention_norm), vectors_.Add(layer.mlp_norm), vectors_.Add(layer.global_gain),
                  vectors_.Add(layer.decay), vectors_.Add(layer.conv_taps)});
  }
  const int64_t final_norm = vectors_.Add(weights_.final_norm);
  if (absl::Status uploaded = vectors_.Upload(device_); !uploaded.ok()) return uploaded;
  std::vector<LinspecCudaLayer> layers;
  for (int i = 0; i < config_.num_layers; ++i) {
    const TransformerLayer& layer = weights_.layers[i];
    layers.push_back({.attention_norm = vectors_.At(at[i].attention_norm),
                      .mlp_norm = vectors_.At(at[i].mlp_norm),
                      .global_gain = vectors_.At(at[i].global_gain),
                      .decay = vectors_.At(at[i].decay),
                      .conv_taps = vectors_.At(at[i].conv_taps),
                      .qkv = MatrixOf(layer.qkv),
                      .o = MatrixOf(layer.o),
                      .gate_up = MatrixOf(layer.gate_up),
                      .down = MatrixOf(layer.down),
                      .global_factor = layer.attention.global_factor,
                      .reserved = 0});
  }
  const LinspecCudaWeights weights{.embedding = MatrixOf(weights_.packed_embedding),
                                   .lm_head = MatrixOf(weights_.lm_head),
                                   .final_norm = vectors_.At(final_norm),
                                   .layers = layers.data()};
  return device_->Check(device_->api().create_model(device_->context(), &shape, &weights, deterministic, &model_),
                        "model on the GPU");
}

int64_t CudaModel::streamed_bytes() const {
  int64_t bytes = weights_.lm_head->bytes();
  for (const TransformerLayer& layer : weights_.layers) {
    bytes += layer.qkv->bytes() + layer.o->bytes() + layer.gate_up->bytes() + layer.down->bytes();
  }
  return bytes;
}

std::string CudaModel::Describe() const {
  return fmt::format("{:.1f} M parameters, {} layers of {} heads, {} weights ({:.1f} MiB) on {}",
                     static_cast<double>(config_.NumParameters()) / 1e6, config_.num_layers, config_.num_heads,
                     DTypeName(weights_.layers[0].qkv->dtype()), static_cast<double>(weight_bytes()) / (1 << 20),
                     device_name_);
}

absl::StatusOr<std::unique_ptr<StatePool>> CudaModel::CreatePool(int num_slots) const {
  const LinspecCudaStepSize size = StepSizeOf(num_slots);
  if (absl::Status reserved = device_->Check(device_->api().reserve(model_, &size), "scratch memory"); !reserved.ok()) {
    return reserved;
  }
  const auto allocate = [this](int64_t bytes) -> absl::StatusOr<std::unique_ptr<StateMemory>> {
    auto memory = CudaMemory::Allocate(device_, bytes);
    if (!memory.ok()) return memory.status();
    if (const auto info = device_->Info(); info.ok()) {
      state_bytes_ = bytes;
      used_bytes_ = info->total_bytes - info->free_bytes;
      total_bytes_ = info->total_bytes;
    }
    return std::make_unique<CudaStates>(device_, *std::move(memory));
  };
  return StatePool::Create(config_, num_slots, state_dtype_, allocate);
}

int64_t CudaModel::SlotsThatFit() const {
  return CudaSlotsThatFit(device_.get(), model_, config_.StateBytes(state_dtype_));
}

int64_t CudaModel::free_device_bytes() const {
  const auto info = device_->Info();
  return info.ok() ? info->free_bytes : 0;
}

absl::Status CudaModel::Prefill(std::span<const PrefillChunk> chunks, StatePool* pool) {
  for (const PrefillChunk& chunk : chunks) {
    if (absl::Status valid = CheckTokens(chunk.tokens, config_.vocab_size); !valid.ok()) return valid;
  }
  if (absl::Status valid = CheckDistinctSlots(chunks); !valid.ok()) return valid;
  std::vector<PrefillChunk> pieces;
  PrefillPassSize size;
  const auto flush = [&]() -> absl::Status {
    size = {};
    return pieces.empty() ? absl::OkStatus() : PrefillPass(std::exchange(pieces, {}), pool);
  };
  for (const PrefillChunk& chunk : chunks) {
    const int64_t length = pool->length(chunk.slot), total = std::ssize(chunk.tokens);
    for (int64_t done = 0, taken = 0; done < total; done += taken) {
      if (size.full()) {
        if (absl::Status status = flush(); !status.ok()) return status;
      }
      taken = size.Take(length + done, total - done, config_.linear_attention.group_size);
      pieces.push_back({.slot = chunk.slot, .tokens = chunk.tokens.subspan(done, taken)});
    }
  }
  return flush();
}

absl::Status CudaModel::PrefillPass(std::span<const PrefillChunk> pieces, StatePool* pool) {
  std::vector<int32_t> tokens;
  tasks_.clear();
  positions_.clear();
  for (const PrefillChunk& piece : pieces) {
    const int64_t length = pool->length(piece.slot);
    tasks_.push_back({.length = length,
                      .slot = piece.slot,
                      .row_begin = static_cast<int32_t>(tokens.size()),
                      .num_rows = static_cast<int32_t>(piece.tokens.size()),
                      .path_begin = 0,
                      .path_length = 0,
                      .reserved = 0});
    for (size_t i = 0; i < piece.tokens.size(); ++i) positions_.push_back(length + static_cast<int64_t>(i));
    tokens.insert(tokens.end(), piece.tokens.begin(), piece.tokens.end());
  }
  LinspecCudaStep step = {};
  step.states = StatesOf(*pool);
  step.tasks = tasks_.data();
  step.tokens = tokens.data();
  step.positions = positions_.data();
  step.num_tasks = static_cast<int32_t>(tasks_.size());
  step.num_rows = static_cast<int32_t>(tokens.size());
  if (absl::Status status = device_->Check(device_->api().prefill(model_, &step), "prefill"); !status.ok()) {
    return status;
  }
  for (const LinspecCudaTask& task : tasks_) pool->set_length(task.slot, task.length + task.num_rows);
  return absl::OkStatus();
}

absl::Status CudaModel::CheckIdle() const {
  return num_in_flight_ == 0 ? absl::OkStatus() : absl::InternalError("a verify was not finished");
}

absl::Status CudaModel::StartVerify(const VerifyBatch& batch, const StatePool& pool) {
  if (absl::Status idle = CheckIdle(); !idle.ok()) return idle;
  if (absl::Status valid = CheckBatch(batch, config_.vocab_size, pool.capacity()); !valid.ok()) return valid;
  if (!batch.sampling.empty() && static_cast<int>(batch.sampling.size()) != batch.num_rows()) {
    return absl::InternalError(
        fmt::format("verify: {} rows, but sampling for {}", batch.num_rows(), batch.sampling.size()));
  }
  verified_.Set(batch, pool);
  num_rows_ = batch.num_rows();
  const LinspecCudaStep step = step_.Fill(batch, pool);
  absl::Status started = device_->Check(device_->api().verify_start(model_, &step), "verify");
  num_in_flight_ += started.ok();
  return started;
}

absl::Status CudaModel::StartNext(StatePool* pool) {
  if (absl::Status valid = verified_.CheckRoots(*pool); !valid.ok()) return valid;
  absl::Status started = device_->Check(device_->api().verify_next(model_), "verify");
  if (!started.ok()) return started;
  ++num_in_flight_;
  for (size_t r = 0; r < verified_.lengths.size(); ++r) {
    pool->set_length(verified_.batch.slots[r], ++verified_.lengths[r]);
  }
  return absl::OkStatus();
}

absl::Status CudaModel::StartDrafted(const SelfDraft& draft, StatePool* /*pool*/) {
  if (verified_.batch.num_requests() == 0 && !drafted_) {
    return absl::InternalError("only a batch that was verified can be followed");
  }
  const LinspecCudaFollow follow = FollowedSteps::SizeOf(draft);
  const int32_t code = device_->api().verify_follow(model_, draft.heads->cuda(), &follow);
  if (absl::Status started = device_->Check(code, "verify"); !started.ok()) return started;
  ++num_in_flight_;
  followed_ = drafted_ = true;
  followed_steps_.Started(verified_.batch);
  return absl::OkStatus();
}

absl::StatusOr<VerifyResult> CudaModel::FinishVerify() {
  LinspecCudaVerifyResult result = {};
  if (num_in_flight_ > 0) --num_in_flight_;
  if (num_in_flight_ == 0) followed_ = drafted_ = false;  // unless it was committed, nobody wanted what followed
  absl::Status status = device_->Check(device_->api().verify_finish(model_, &result), "verify");
  if (!status.ok()) return status;
  verify_s_ = verify_s_ + result.verify_ms * 1e-3;
  prefill_s_ = prefill_s_ + result.prefill_ms * 1e-3;
  VerifyResult out;
  if (result.tasks != nullptr) {
    if (status = followed_steps_.Read(result, config_.vocab_size, &verified_); !status.ok()) return status;
    out.trees = followed_steps_.trees();
    out.drafts = followed_steps_.drafts();
    num_rows_ = verified_.batch.num_rows();
  }
  const auto rows = static_cast<size_t>(num_rows_);
  if (result.logits != nullptr) out.logits = {result.logits, rows * config_.vocab_size};
  if (result.hidden != nullptr) out.hidden = {result.hidden, rows * config_.hidden_size};
  if (result.sampled != nullptr) out.sampled = {result.sampled, rows};
  if (followed_) followed_steps_.Finished(out.sampled);
  if (num_in_flight_ > 0 && !followed_) verified_.batch.Advance(out.sampled);
  return out;
}

absl::StatusOr<VerifyResult> CudaModel::Verify(const VerifyBatch& batch, const StatePool& pool) {
  if (absl::Status started = StartVerify(batch, pool); !started.ok()) return started;
  return FinishVerify();
}

// The whole trees run again: a forward is bound by reading the weights, so the old rows ride along for nothing.
absl::StatusOr<VerifyResult> CudaModel::Extend(const VerifyBatch& batch, const StatePool& pool) {
  if (absl::Status valid = CheckBatch(batch, config_.vocab_size, pool.capacity()); !valid.ok()) return valid;
  if (absl::Status valid = verified_.CheckExtend(batch, pool); !valid.ok()) return valid;
  std::vector<int32_t> new_rows;
  for (int r = 0; r < batch.num_requests(); ++r) {
    for (int node = NumNodes(verified_.batch, r); node < NumNodes(batch, r); ++node) {
      new_rows.push_back(batch.row_starts[r] + node);
    }
  }
  VerifyBatch plain = batch;
  plain.sampling.clear();
  plain.want_logits = true;
  plain.want_hidden = false;
  absl::StatusOr<VerifyResult> all = Verify(plain, pool);
  if (!all.ok()) return all.status();
  const auto vocab = static_cast<size_t>(config_.vocab_size);
  logits_.resize(new_rows.size() * vocab);
  for (size_t i = 0; i < new_rows.size(); ++i) {
    std::copy_n(all->logits.data() + new_rows[i] * vocab, vocab, logits_.data() + i * vocab);
  }
  VerifyResult result;
  result.logits = logits_;
  return result;
}

absl::Status CudaModel::Commit(const VerifyBatch& batch, std::span<const std::vector<int32_t>> paths, StatePool* pool) {
  if (std::exchange(followed_, false)) {  // the device has committed what it accepted
    if (absl::Status valid = verified_.CheckCommit(batch, paths, *pool); !valid.ok()) return valid;
    followed_steps_.Accepted(verified_, paths);
    for (size_t r = 0; r < paths.size(); ++r) {
      if (!paths[r].empty()) pool->set_length(batch.slots[r], verified_.lengths[r] + std::ssize(paths[r]));
    }
    verified_ = {};
    return absl::OkStatus();
  }
  if (absl::Status idle = CheckIdle(); !idle.ok()) return idle;
  return CommitPaths(cuda(), &verified_, batch, paths, pool);
}

absl::StatusOr<std::span<const float>> CudaModel::Unembed(std::span<const float> hidden) {
  const int64_t rows = std::ssize(hidden) / config_.hidden_size;
  if (rows * config_.hidden_size != std::ssize(hidden)) {
    return absl::InternalError(fmt::format("unembed: {} values are no rows of {}", hidden.size(), config_.hidden_size));
  }
  logits_.resize(rows * config_.vocab_size);
  if (rows == 0) return std::span<const float>();
  const int32_t code = device_->api().unembed(model_, hidden.data(), static_cast<int32_t>(rows), logits_.data());
  if (absl::Status status = device_->Check(code, "unembed"); !status.ok()) return status;
  return std::span<const float>(logits_);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Model>> BuildCudaModel(const ModelConfig& config, WeightSource* source,
                                                      std::shared_ptr<CudaDevice> device, BuildOptions options,
                                                      DType state_dtype, bool deterministic) {
  options.pack_embedding = true;
  absl::StatusOr<TransformerWeights> weights = BuildTransformer(config, source, MakeCudaPacker(device).get(), options);
  if (!weights.ok()) return weights.status();
  auto model = std::make_unique<CudaModel>(config, *std::move(weights), std::move(device), state_dtype);
  if (absl::Status status = model->Init(deterministic); !status.ok()) return status;
  return model;
}

}  // namespace linspec
