#include "models/cuda_guesser.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "models/cuda_draft.h"
#include "models/cuda_memory.h"
#include "models/cuda_weights.h"
#include "models/medusa_heads.h"
#include "models/recurrent_head.h"

namespace linspec {
namespace {

constexpr size_t kRowsAtOnce = 256;  // bounds the heads' scratch, which holds logits of every row

const LinspecCudaMatrix& MatrixOf(const std::unique_ptr<PackedWeight>& weight) {
  return static_cast<const CudaMatrix&>(*weight).matrix();
}

class CudaGuesser : public DraftGuesser {
 public:
  explicit CudaGuesser(CudaHandle target) : target_(std::move(target)) {}
  ~CudaGuesser() override {
    if (drafter_ != nullptr) target_.device->api().destroy_drafter(drafter_);
  }

  int max_top_k() const override { return LINSPEC_CUDA_MAX_DRAFT_CANDIDATES; }
  bool reads_hidden() const override { return false; }
  LinspecCudaDrafter* cuda() const override { return drafter_; }
  bool CanGuess(const DraftContext& context) const override { return context.hidden_row >= 0; }

  absl::StatusOr<DraftGuesses> Guess(std::span<const DraftContext* const> contexts, int num_levels,
                                     int top_k) override {
    DraftGuesses guesses{num_levels, top_k, {}};
    guesses.candidates.resize(contexts.size() * num_levels * top_k);
    for (size_t begin = 0; begin < contexts.size(); begin += kRowsAtOnce) {
      const size_t count = std::min(kRowsAtOnce, contexts.size() - begin);
      if (absl::Status status = GuessSome(contexts, begin, count, &guesses); !status.ok()) return status;
    }
    return guesses;
  }

 protected:
  CudaHandle target_;
  DeviceVectors vectors_;
  LinspecCudaDrafter* drafter_ = nullptr;

 private:
  absl::Status GuessSome(std::span<const DraftContext* const> contexts, size_t begin, size_t count,
                         DraftGuesses* guesses) {
    rows_.clear();
    for (const DraftContext* context : contexts.subspan(begin, count)) {
      rows_.push_back(DraftRowOf(*context));
    }
    const LinspecCudaDraftStep step{.rows = rows_.data(),
                                    .num_rows = static_cast<int32_t>(count),
                                    .num_levels = guesses->num_levels,
                                    .top_k = guesses->top_k};
    LinspecCudaDraftResult result = {};
    absl::Status status = target_.device->Check(target_.device->api().draft(drafter_, &step, &result), "draft");
    if (!status.ok()) return status;
    ReadCandidates(result, begin, count, guesses);
    return absl::OkStatus();
  }

  std::vector<LinspecCudaDraftRow> rows_;
};

class CudaMedusa final : public CudaGuesser {
 public:
  CudaMedusa(CudaHandle target, MedusaWeights weights) : CudaGuesser(std::move(target)), weights_(std::move(weights)) {}
  int max_levels() const override { return static_cast<int>(weights_.heads.size()); }

  absl::Status Init() {
    std::vector<int64_t> biases;
    for (const MedusaWeights::Head& head : weights_.heads) {
      for (const MedusaWeights::Block& block : head.blocks) biases.push_back(vectors_.Add(block.bias));
    }
    if (absl::Status uploaded = vectors_.Upload(target_.device); !uploaded.ok()) return uploaded;
    std::vector<LinspecCudaMedusaBlock> blocks;
    std::vector<LinspecCudaMatrix> unembeddings;
    for (const MedusaWeights::Head& head : weights_.heads) {
      for (const MedusaWeights::Block& block : head.blocks) {
        blocks.push_back({MatrixOf(block.weight), vectors_.At(biases[blocks.size()])});
      }
      if (head.unembedding != nullptr) unembeddings.push_back(MatrixOf(head.unembedding));
    }
    const LinspecCudaMedusaHeads heads{.blocks = blocks.data(),
                                       .unembeddings = unembeddings.empty() ? nullptr : unembeddings.data(),
                                       .num_heads = max_levels(),
                                       .num_blocks = static_cast<int32_t>(weights_.heads.front().blocks.size())};
    return target_.device->Check(target_.device->api().create_medusa_drafter(target_.model, &heads, &drafter_),
                                 "Medusa heads on the GPU");
  }

 private:
  const MedusaWeights weights_;
};

class CudaRecurrent final : public CudaGuesser {
 public:
  CudaRecurrent(CudaHandle target, RecurrentWeights weights)
      : CudaGuesser(std::move(target)), weights_(std::move(weights)) {}
  int max_levels() const override { return kMaxLevels; }

  absl::Status Init() {
    const int64_t state_norm = vectors_.Add(weights_.state_norm), token_norm = vectors_.Add(weights_.token_norm);
    if (absl::Status uploaded = vectors_.Upload(target_.device); !uploaded.ok()) return uploaded;
    const LinspecCudaRecurrentHead head{.state_norm = vectors_.At(state_norm),
                                        .token_norm = vectors_.At(token_norm),
                                        .gate_up = MatrixOf(weights_.gate_up_proj),
                                        .down = MatrixOf(weights_.down_proj),
                                        .rms_norm_eps = weights_.rms_norm_eps,
                                        .reserved = 0};
    return target_.device->Check(target_.device->api().create_recurrent_drafter(target_.model, &head, &drafter_),
                                 "recurrent head on the GPU");
  }

 private:
  static constexpr int kMaxLevels = LINSPEC_CUDA_MAX_DRAFT_LEVELS;
  const RecurrentWeights weights_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<DraftGuesser>> LoadCudaMedusaGuesser(const std::string& folder, Model* target,
                                                                    const std::string& weight_dtype) {
  CudaHandle handle = target->cuda();
  const std::unique_ptr<MatrixPacker> packer = MakeCudaPacker(handle.device);
  auto weights = MedusaWeights::Load(folder, target->config(), weight_dtype, packer.get());
  if (!weights.ok()) return weights.status();
  auto guesser = std::make_unique<CudaMedusa>(std::move(handle), *std::move(weights));
  if (absl::Status status = guesser->Init(); !status.ok()) return status;
  return guesser;
}

absl::StatusOr<std::unique_ptr<DraftGuesser>> LoadCudaRecurrentGuesser(const std::string& folder, Model* target,
                                                                       const std::string& weight_dtype) {
  CudaHandle handle = target->cuda();
  const std::unique_ptr<MatrixPacker> packer = MakeCudaPacker(handle.device);
  auto weights = RecurrentWeights::Load(folder, target->config(), weight_dtype, packer.get());
  if (!weights.ok()) return weights.status();
  auto guesser = std::make_unique<CudaRecurrent>(std::move(handle), *std::move(weights));
  if (absl::Status status = guesser->Init(); !status.ok()) return status;
  return guesser;
}

}  // namespace linspec
