#include "kernels/cuda/device_drafter.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/cuda/recurrent.h"

namespace linspec::cuda {
namespace {

constexpr int64_t kF32 = sizeof(float), kBf16 = sizeof(uint16_t);
constexpr int64_t kCallAt = 8, kRowsAt = 32;  // in the input block, behind the pointer to the hidden states

class RecurrentDrafter final : public DeviceDrafter {
 public:
  RecurrentDrafter(DeviceModel* target, const LinspecCudaRecurrentHead& head) : DeviceDrafter(target), head_(head) {}

  // Decides how few rows are drafted: by one launch where the shape has one, else launch by launch.
  int32_t Init() {
    plan_ = PlanRecurrentLevels(Levels());
    if (plan_.blocks == 0) return kLinspecCudaOk;
    LINSPEC_CUDA_TRY(mail_.Reserve(context(), plan_.mail_bytes));
    return context()->Check(cudaMemsetAsync(mail_.as<void>(), 0, plan_.mail_bytes, stream()), "zero");
  }
  int max_levels() const override { return LINSPEC_CUDA_MAX_DRAFT_LEVELS; }

 private:
  bool is_chain() const override { return true; }
  bool OneLaunch(int num_rows) const { return plan_.blocks > 0 && num_rows <= kMostLevelsRows; }
  bool ReadsHostBlock(int num_rows) const override { return OneLaunch(num_rows); }
  RecurrentLevelsParams Levels() const {
    return {.input = {},
            .embedding = target_->weights().embedding,
            .gate_up = head_.gate_up,
            .down = head_.down,
            .lm_head = target_->weights().lm_head,
            .state_norm = head_.state_norm,
            .token_norm = head_.token_norm,
            .eps = head_.rms_norm_eps,
            .num_levels = 0,
            .call = nullptr,
            .mail = mail_.as<uint64_t>(),
            .logits = logits_.as<float>()};
  }

  int32_t Reserve(int num_rows, int num_levels) override {
    if (OneLaunch(num_rows)) return logits_.Reserve(context(), int64_t{num_rows} * num_levels * vocab() * kF32);
    const int64_t inner = head_.down.cols;
    LINSPEC_CUDA_TRY(state_.Reserve(context(), num_rows * dim() * kF32));
    LINSPEC_CUDA_TRY(input_.Reserve(context(), num_rows * 2 * dim() * kBf16));
    LINSPEC_CUDA_TRY(gate_up_.Reserve(context(), num_rows * 2 * inner * kBf16));
    LINSPEC_CUDA_TRY(activated_.Reserve(context(), num_rows * inner * kBf16));
    LINSPEC_CUDA_TRY(rounded_.Reserve(context(), num_rows * dim() * kBf16));
    LINSPEC_CUDA_TRY(tokens_.Reserve(context(), num_rows * int64_t{sizeof(int32_t)}));
    return logits_.Reserve(context(), num_rows * vocab() * kF32);
  }

  uint64_t Stamp() const override {
    uint64_t stamp = 0;
    for (const Buffer* buffer : {&state_, &input_, &gate_up_, &activated_, &rounded_, &tokens_, &logits_}) {
      stamp += buffer->generation();
    }
    return stamp;
  }

  void Enqueue(const Work& work) override {
    const int rows = work.input.num_rows;
    if (OneLaunch(rows)) {
      RecurrentLevelsParams levels = Levels();
      levels.input = work.input;
      levels.num_levels = work.num_levels;
      levels.call = work.call;
      LaunchRecurrentLevels(levels, plan_, stream());
      return Choose(work, logits_.as<float>(), 0, work.num_levels, nullptr);
    }
    Products& products = target_->products();
    for (int level = 0; level < work.num_levels; ++level) {
      LaunchRecurrentInput({.input = work.input,
                            .embedding = target_->weights().embedding,
                            .tokens = level == 0 ? nullptr : tokens_.as<int32_t>(),
                            .state = state_.as<float>(),
                            .state_norm = head_.state_norm,
                            .token_norm = head_.token_norm,
                            .out = input_.as<uint16_t>(),
                            .eps = head_.rms_norm_eps},
                           stream());
      products.GateUp(head_.gate_up, input_.as<uint16_t>(), gate_up_.as<uint16_t>(), activated_.as<uint16_t>(), rows);
      products.Matmul(head_.down, activated_.as<uint16_t>(), state_.as<float>(), /*accumulate=*/true, rows);
      LaunchRound(state_.as<float>(), rounded_.as<uint16_t>(), rows * dim(), stream());
      products.Matmul(target_->weights().lm_head, rounded_.as<uint16_t>(), logits_.as<float>(), false, rows);
      Choose(work, logits_.as<float>(), level, 1, tokens_.as<int32_t>());
    }
  }

  const LinspecCudaRecurrentHead head_;
  RecurrentLevelsPlan plan_{};
  Buffer mail_;
  Buffer state_, input_, gate_up_, activated_, rounded_, tokens_, logits_;
};

class MedusaDrafter final : public DeviceDrafter {
 public:
  MedusaDrafter(DeviceModel* target, const LinspecCudaMedusaHeads& heads)
      : DeviceDrafter(target),
        blocks_(heads.blocks, heads.blocks + heads.num_heads * heads.num_blocks),
        num_heads_(heads.num_heads),
        num_blocks_(heads.num_blocks) {
    if (heads.unembeddings != nullptr) unembeddings_.assign(heads.unembeddings, heads.unembeddings + heads.num_heads);
  }
  int max_levels() const override { return num_heads_; }

 private:
  bool is_chain() const override { return false; }

  int32_t Reserve(int num_rows, int num_levels) override {
    const int64_t all = int64_t{num_rows} * num_levels;
    LINSPEC_CUDA_TRY(hidden_.Reserve(context(), num_rows * dim() * kBf16));
    LINSPEC_CUDA_TRY(state_.Reserve(context(), num_rows * dim() * kF32));
    LINSPEC_CUDA_TRY(product_.Reserve(context(), num_rows * dim() * kF32));
    LINSPEC_CUDA_TRY(rounded_.Reserve(context(), all * dim() * kBf16));
    return logits_.Reserve(context(), all * vocab() * kF32);
  }

  uint64_t Stamp() const override {
    uint64_t stamp = 0;
    for (const Buffer* buffer : {&hidden_, &state_, &product_, &rounded_, &logits_}) stamp += buffer->generation();
    return stamp;
  }

  void Enqueue(const Work& work) override {
    const int rows = work.input.num_rows;
    Products& products = target_->products();
    for (int head = 0; head < work.num_levels; ++head) {
      uint16_t* rounded = rounded_.as<uint16_t>() + head * rows * dim();
      LaunchGatherHidden(work.input, state_.as<float>(), hidden_.as<uint16_t>(), dim(), stream());
      for (int b = 0; b < num_blocks_; ++b) {
        const LinspecCudaMedusaBlock& block = blocks_[head * num_blocks_ + b];
        products.Matmul(block.weight, b == 0 ? hidden_.as<uint16_t>() : rounded, product_.as<float>(), false, rows);
        LaunchMedusaBlock({.product = product_.as<float>(),
                           .bias = block.bias,
                           .state = state_.as<float>(),
                           .out = rounded,
                           .dim = dim()},
                          rows, stream());
      }
      if (unembeddings_.empty()) continue;
      products.Matmul(unembeddings_[head], rounded, logits_.as<float>() + head * rows * vocab(), false, rows);
    }
    if (unembeddings_.empty()) {
      products.Matmul(target_->weights().lm_head, rounded_.as<uint16_t>(), logits_.as<float>(), false,
                      rows * work.num_levels);
    }
    Choose(work, logits_.as<float>(), 0, work.num_levels, nullptr);
  }

  const std::vector<LinspecCudaMedusaBlock> blocks_;
  std::vector<LinspecCudaMatrix> unembeddings_;
  const int num_heads_, num_blocks_;
  Buffer hidden_, state_, product_, rounded_, logits_;
};

}  // namespace

int32_t DeviceDrafter::CreateRecurrent(DeviceModel* target, const LinspecCudaRecurrentHead& head,
                                       std::unique_ptr<DeviceDrafter>* drafter) {
  const int64_t dim = target->shape().hidden_size;
  if (head.gate_up.cols != 2 * dim || head.gate_up.rows != 2 * head.down.cols || head.down.rows != dim ||
      head.down.cols % 16 != 0) {
    return target->context()->Fail(kLinspecCudaUnsupported,
                                   "a recurrent head on the GPU needs an inner width that is a multiple of 16");
  }
  LINSPEC_CUDA_TRY(target->context()->Enter());
  auto made = std::make_unique<RecurrentDrafter>(target, head);
  LINSPEC_CUDA_TRY(made->Init());
  *drafter = std::move(made);
  return kLinspecCudaOk;
}

int32_t DeviceDrafter::CreateMedusa(DeviceModel* target, const LinspecCudaMedusaHeads& heads,
                                    std::unique_ptr<DeviceDrafter>* drafter) {
  if (heads.num_heads < 1 || heads.num_blocks < 1) {
    return target->context()->Fail(kLinspecCudaInvalid, "no Medusa heads, or heads without a block");
  }
  *drafter = std::make_unique<MedusaDrafter>(target, heads);
  return kLinspecCudaOk;
}

void DeviceDrafter::Choose(const Work& work, const float* logits, int first_level, int num_levels,
                           int32_t* next_tokens) {
  LaunchChooseDraft({.input = work.input,
                     .logits = logits,
                     .vocab = vocab(),
                     .first_level = first_level,
                     .num_levels = num_levels,
                     .top_k = work.top_k,
                     .candidates = work.candidates + int64_t{first_level} * work.input.num_rows * work.top_k,
                     .next_tokens = next_tokens},
                    stream());
}

int32_t DeviceDrafter::CheckStep(const LinspecCudaDraftStep& step) const {
  bool valid = !target_->in_flight() && step.num_rows >= 1 && step.num_levels >= 1 && step.num_levels <= max_levels() &&
               step.top_k >= 1 && step.top_k <= LINSPEC_CUDA_MAX_DRAFT_CANDIDATES;
  for (int i = 0; valid && i < step.num_rows; ++i) {
    const LinspecCudaDraftRow& row = step.rows[i];
    valid = row.hidden_row >= 0 && row.hidden_row < target_->hidden_rows() && row.token >= 0 && row.token < vocab();
  }
  if (valid) return kLinspecCudaOk;
  return context()->Fail(kLinspecCudaInvalid, "draft: rows, levels, candidates, a token or a hidden row out of range");
}

void DeviceDrafter::Pack(const LinspecCudaDraftStep& step, int num_rows) {
  auto* host = host_block_.as<std::byte>();
  *reinterpret_cast<const float**>(host) = target_->hidden();
  *reinterpret_cast<uint32_t*>(host + kCallAt) = NextCall();
  auto* rows = reinterpret_cast<LinspecCudaDraftRow*>(host + kRowsAt);
  std::copy_n(step.rows, step.num_rows, rows);
  std::fill(rows + step.num_rows, rows + num_rows, LinspecCudaDraftRow{});
}

int32_t DeviceDrafter::ReserveAll(int num_rows, int num_levels, int top_k) {
  const int64_t block_bytes = kRowsAt + num_rows * static_cast<int64_t>(sizeof(LinspecCudaDraftRow));
  const int64_t candidate_bytes =
      int64_t{num_levels} * num_rows * top_k * static_cast<int64_t>(sizeof(LinspecCudaDraftCandidate));
  LINSPEC_CUDA_TRY(target_->products().Reserve());
  LINSPEC_CUDA_TRY(Reserve(num_rows, num_levels));
  LINSPEC_CUDA_TRY(block_.Reserve(context(), block_bytes));
  LINSPEC_CUDA_TRY(host_block_.Reserve(context(), block_bytes));
  LINSPEC_CUDA_TRY(kept_candidates_.Reserve(context(), candidate_bytes));
  return candidates_.Reserve(context(), candidate_bytes);
}

uint64_t DeviceDrafter::GraphStamp() const {
  uint64_t stamp = Stamp() + input_stamp_;
  for (const Buffer* buffer : {&block_, &host_block_, &candidates_, &kept_candidates_}) stamp += buffer->generation();
  return stamp;
}

int32_t DeviceDrafter::Draft(const LinspecCudaDraftStep& step, LinspecCudaDraftResult* result) {
  LINSPEC_CUDA_TRY(context()->Enter());
  LINSPEC_CUDA_TRY(CheckStep(step));
  const int num_rows = RowBucket(step.num_rows);
  LINSPEC_CUDA_TRY(ReserveAll(num_rows, step.num_levels, step.top_k));
  Pack(step, num_rows);
  const bool from_host = ReadsHostBlock(num_rows);
  const auto enqueue = [&]() -> int32_t {
    if (!from_host) {
      const int64_t bytes = kRowsAt + num_rows * static_cast<int64_t>(sizeof(LinspecCudaDraftRow));
      LINSPEC_CUDA_TRY(context()->Check(
          cudaMemcpyAsync(block_.as<void>(), host_block_.as<void>(), bytes, cudaMemcpyHostToDevice, stream()),
          "upload a draft"));
    }
    auto* block = (from_host ? host_block_ : block_).as<std::byte>();
    Enqueue({.input = {.rows = reinterpret_cast<const LinspecCudaDraftRow*>(block + kRowsAt),
                       .hidden = reinterpret_cast<const float* const*>(block),
                       .num_rows = num_rows},
             .call = reinterpret_cast<const uint32_t*>(block + kCallAt),
             .num_levels = step.num_levels,
             .top_k = step.top_k,
             .candidates = candidates_.as<LinspecCudaDraftCandidate>()});
    return context()->CheckLaunch("draft");
  };
  LINSPEC_CUDA_TRY(graphs_.Run({num_rows, step.num_levels, step.top_k, 0}, /*kernels=*/num_rows * 64 + step.num_levels,
                               GraphStamp(), enqueue));
  LINSPEC_CUDA_TRY(context()->Sync("draft"));
  *result = {.candidates = candidates_.as<LinspecCudaDraftCandidate>(), .row_stride = num_rows, .reserved = 0};
  return kLinspecCudaOk;
}

int32_t DeviceDrafter::Guess(const Input& input, int num_rows, int num_levels, int top_k, DraftGuesses* guesses) {
  const int padded = RowBucket(num_rows);
  LINSPEC_CUDA_TRY(ReserveAll(padded, num_levels, top_k));
  input_stamp_ = input.stamp;
  auto* candidates = kept_candidates_.as<LinspecCudaDraftCandidate>();
  const auto enqueue = [&]() -> int32_t {
    Enqueue({.input = {.rows = input.rows, .hidden = input.hidden, .num_rows = padded},
             .call = input.call,
             .num_levels = num_levels,
             .top_k = top_k,
             .candidates = candidates});
    return context()->CheckLaunch("draft");
  };
  *guesses = {.candidates = candidates, .row_stride = padded, .chain = is_chain()};
  return graphs_.Run({padded, num_levels, top_k, 1}, /*kernels=*/padded * 64 + num_levels, GraphStamp(), enqueue);
}

}  // namespace linspec::cuda
