// All levels of a recurrent head in one launch, against its levels launch by launch: the same bits, for any number of
// rows and levels, weights of every type, and sizes that fill no tile. The reference is held against the CPU's head by
// draft_test.cc.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/recurrent.h"
#include "kernels/cuda/window_attention.h"
#include "tests/cuda/device_buffers.h"
#include "tests/cuda/report.h"

namespace linspec::cuda {

// Random weights of a type; none is NaN.
class RandomMatrix {
 public:
  RandomMatrix(std::mt19937& random, int64_t rows, int64_t cols, int32_t type)
      : data_(Bytes(random, rows * cols, type)), scales_(Normal(random, rows, 0.002f)) {
    matrix_ = {data_.get(), type == kLinspecCudaBf16 ? nullptr : scales_.get(), rows, cols, type, 0};
  }
  const LinspecCudaMatrix& get() const { return matrix_; }

 private:
  static std::vector<uint8_t> Bytes(std::mt19937& random, int64_t count, int32_t type) {
    std::vector<uint8_t> bytes;
    for (int64_t i = 0; i < count; ++i) {
      if (type == kLinspecCudaBf16) {
        const uint16_t bits = RoundToBf16(static_cast<float>(random() % 4001) / 16000.0f - 0.125f);
        bytes.insert(bytes.end(), {static_cast<uint8_t>(bits), static_cast<uint8_t>(bits >> 8)});
      } else {
        const auto byte = static_cast<uint8_t>(random());
        bytes.push_back(type == kLinspecCudaFp8 && (byte & 0x7F) == 0x7F ? 0x30 : byte);
      }
    }
    return bytes;
  }
  DeviceArray<uint8_t> data_;
  DeviceArray<float> scales_;
  LinspecCudaMatrix matrix_;
};

struct RecurrentSize {
  int dim, inner, vocab;
  int32_t type;
  std::string Name() const {
    return "recurrent levels " + std::to_string(dim) + " x " + std::to_string(inner) + " x " + std::to_string(vocab) +
           " type " + std::to_string(type);
  }
};

class RecurrentCase {
 public:
  explicit RecurrentCase(const RecurrentSize& size)
      : size_(size),
        random_(size.vocab),
        embedding_(random_, size.vocab, size.dim, size.type == kLinspecCudaBf16 ? kLinspecCudaBf16 : kLinspecCudaI8),
        gate_up_(random_, 2 * size.inner, 2 * size.dim, size.type),
        down_(random_, size.dim, size.inner, size.type),
        lm_head_(random_, size.vocab, size.dim, size.type),
        state_norm_(Normal(random_, size.dim, 1.0f)),
        token_norm_(Normal(random_, size.dim, 1.0f)),
        hidden_(Normal(random_, kHidden * size.dim, 1.0f)),
        hidden_at_(std::vector<const float*>{hidden_.get()}),
        rows_(kMostLevelsRows),
        call_(1),
        logits_(int64_t{kMostLevelsRows} * LINSPEC_CUDA_MAX_DRAFT_LEVELS * size.vocab) {
    plan_ = PlanRecurrentLevels(Params(1, 1));
    mail_ = std::make_unique<DeviceArray<uint64_t>>(plan_.mail_bytes / sizeof(uint64_t));
    Check(cudaMemset(mail_->get(), 0, plan_.mail_bytes), "zero");
  }
  const RecurrentLevelsPlan& plan() const { return plan_; }

  // Requests at any hidden state, greedy, with the target's noise, and likeliest.
  void SetRows(int count) {
    host_rows_.assign(count, {});
    for (int r = 0; r < count; ++r) {
      host_rows_[r] = {.seed = random_(),
                       .position = static_cast<int64_t>(random_() % 5000),
                       .temperature = r % 3 == 0 ? 0.0f : 0.2f + 0.3f * static_cast<float>(r),
                       .coupled = r % 3 != 2,
                       .token = static_cast<int32_t>(random_() % size_.vocab),
                       .hidden_row = static_cast<int32_t>(random_() % kHidden)};
    }
    Check(cudaMemcpy(rows_.get(), host_rows_.data(), count * sizeof(LinspecCudaDraftRow), cudaMemcpyHostToDevice),
          "rows");
    ++number_;
    Check(cudaMemcpy(call_.get(), &number_, sizeof number_, cudaMemcpyHostToDevice), "call");
  }

  RecurrentLevelsParams Params(int rows, int levels) const {
    return {.input = Input(rows),
            .embedding = embedding_.get(),
            .gate_up = gate_up_.get(),
            .down = down_.get(),
            .lm_head = lm_head_.get(),
            .state_norm = state_norm_.get(),
            .token_norm = token_norm_.get(),
            .eps = 1e-5f,
            .num_levels = levels,
            .call = call_.get(),
            .mail = mail_ == nullptr ? nullptr : mail_->get(),
            .logits = logits_.get()};
  }
  void Launch(int rows, int levels, cudaStream_t stream) const {
    LaunchRecurrentLevels(Params(rows, levels), plan_, stream);
  }

  // Launch by launch into `logits` [levels, rows, V].
  void LaunchSteps(int rows, int levels, float* logits, cudaStream_t stream) {
    for (int level = 0; level < levels; ++level) {
      float* at = logits + int64_t{level} * rows * size_.vocab;
      LaunchRecurrentInput({.input = Input(rows),
                            .embedding = embedding_.get(),
                            .tokens = level == 0 ? nullptr : next_.get(),
                            .state = state_.get(),
                            .state_norm = state_norm_.get(),
                            .token_norm = token_norm_.get(),
                            .out = input_.get(),
                            .eps = 1e-5f},
                           stream);
      GemmParams gate_up{.w = gate_up_.get(), .x = input_.get(), .y = nullptr, .accumulate = false};
      gate_up.y_bf16 = activated_.get();
      gate_up.silu_mul = true;
      LaunchSmallGemm(gate_up, rows, stream);
      LaunchSmallGemm({.w = down_.get(), .x = activated_.get(), .y = state_.get(), .accumulate = true}, rows, stream);
      LaunchRound(state_.get(), rounded_.get(), int64_t{rows} * size_.dim, stream);
      LaunchSmallGemm({.w = lm_head_.get(), .x = rounded_.get(), .y = at, .accumulate = false}, rows, stream);
      LaunchChooseDraft({.input = Input(rows),
                         .logits = at,
                         .vocab = size_.vocab,
                         .first_level = level,
                         .num_levels = 1,
                         .top_k = 1,
                         .candidates = candidates_.get(),
                         .next_tokens = next_.get()},
                        stream);
    }
  }

  // Logits of one launch that are not those of the steps, to the bit.
  void Compare(int rows, int levels) {
    SetRows(rows);
    Check(cudaMemset(logits_.get(), 0xFF, logits_.size() * sizeof(float)), "poison");
    Launch(rows, levels, nullptr);
    Sync();
    Report(size_.Name() + " rows " + std::to_string(rows) + " levels " + std::to_string(levels),
           Different(rows, levels), 0);
  }

  // A captured launch serves other requests.
  void Replay() {
    constexpr int kRows = 3, kLevels = 4;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    Check(cudaStreamCreate(&stream), "stream");
    Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    Launch(kRows, kLevels, stream);
    Check(cudaStreamEndCapture(stream, &graph), "capture");
    Check(cudaGraphInstantiate(&exec, graph, 0), "graph");
    double different = 0;
    for (int repeat = 0; repeat < 3; ++repeat) {
      SetRows(kRows);
      Check(cudaGraphLaunch(exec, stream), "replay");
      Check(cudaStreamSynchronize(stream), "replay");
      different += Different(kRows, kLevels);
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    Report(size_.Name() + " replayed", different, 0);
  }

 private:
  static constexpr int64_t kHidden = 5;
  DraftInput Input(int rows) const { return {rows_.get(), hidden_at_.get(), rows}; }
  double Different(int rows, int levels) {
    const int64_t count = int64_t{rows} * levels * size_.vocab;
    const DeviceArray<float> expected(count);
    LaunchSteps(rows, levels, expected.get(), nullptr);
    Sync();
    const std::vector<float> a = expected.Read(), b = logits_.Read();
    double different = 0;
    for (int64_t i = 0; i < count; ++i) different += !(a[i] == b[i]);
    return different;
  }

  const RecurrentSize size_;
  std::mt19937 random_;
  const RandomMatrix embedding_, gate_up_, down_, lm_head_;
  const DeviceArray<float> state_norm_, token_norm_, hidden_;
  const DeviceArray<const float*> hidden_at_;
  const DeviceArray<LinspecCudaDraftRow> rows_;
  const DeviceArray<uint32_t> call_;
  const DeviceArray<float> logits_;
  RecurrentLevelsPlan plan_{};
  std::unique_ptr<DeviceArray<uint64_t>> mail_;
  std::vector<LinspecCudaDraftRow> host_rows_;
  uint32_t number_ = 0;
  // Of the steps.
  const DeviceArray<float> state_{static_cast<size_t>(kMostLevelsRows * size_.dim)};
  const DeviceArray<uint16_t> input_{static_cast<size_t>(kMostLevelsRows * 2 * size_.dim)};
  const DeviceArray<uint16_t> activated_{static_cast<size_t>(kMostLevelsRows * size_.inner)};
  const DeviceArray<uint16_t> rounded_{static_cast<size_t>(kMostLevelsRows * size_.dim)};
  const DeviceArray<int32_t> next_{kMostLevelsRows};
  const DeviceArray<LinspecCudaDraftCandidate> candidates_{kMostLevelsRows};
};

inline void TestRecurrentLevels(bool quick) {
  for (const int32_t type : {kLinspecCudaBf16, kLinspecCudaI8, kLinspecCudaFp8}) {
    for (RecurrentSize size :
         {RecurrentSize{16, 16, 33, 0}, {176, 80, 1001, 0}, {512, 512, 8192, 0}, {1024, 256, 4001, 0}}) {
      size.type = type;
      RecurrentCase test(size);
      Report(size.Name() + " runs", test.plan().blocks > 0 ? 0 : 1, 0);
      if (test.plan().blocks == 0) continue;
      for (int rows = 1; rows <= kMostLevelsRows; rows += quick ? 3 : 1) {
        for (const int levels : {1, 2, 5, LINSPEC_CUDA_MAX_DRAFT_LEVELS}) {
          if (!quick || levels < 5) test.Compare(rows, levels);
        }
      }
      test.Replay();
    }
  }
  // More than the multiprocessors hold.
  const RecurrentCase large({1024, 1024, 64'000, kLinspecCudaBf16});
  Report("a recurrent head that is too large goes step by step", large.plan().blocks, 0);
}

}  // namespace linspec::cuda
