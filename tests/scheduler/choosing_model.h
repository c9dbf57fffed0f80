// A fake model that chooses tokens itself from RowSampling, as a device does: what it chooses must be what the host
// would have chosen from its logits.
#pragma once

#include <utility>
#include <vector>

#include "models/sampler.h"
#include "tests/scheduler/fake_model.h"

namespace linspec {

class ChoosingModel : public FakeModel {
 public:
  using FakeModel::FakeModel;
  bool chooses_tokens() const override { return true; }

  absl::StatusOr<VerifyResult> Verify(const VerifyBatch& batch, const StatePool& pool) override {
    absl::StatusOr<VerifyResult> result = FakeModel::Verify(batch, pool);
    if (!result.ok() || batch.sampling.empty()) return result;
    EXPECT_EQ(std::ssize(batch.sampling), batch.num_rows());
    logits_.assign(result->logits.begin(), result->logits.end());
    sampled_.clear();
    for (int row = 0; row < batch.num_rows(); ++row) sampled_.push_back(Choose(batch, row));
    if (batch.want_logits) {
      result->logits = logits_;
    } else {
      ++num_without_logits;
      result->logits = {};
    }
    result->sampled = sampled_;
    return result;
  }

  int num_without_logits = 0;

 private:
  int32_t Choose(const VerifyBatch& batch, int row) {
    const RowSampling& how = batch.sampling[row];
    const auto vocab = static_cast<size_t>(config().vocab_size);
    const std::span<float> logits = std::span(logits_).subspan(row * vocab, vocab);
    for (int i = 0; i < how.edits_count; ++i) {
      const LogitEdit& edit = batch.edits[how.edits_begin + i];
      float& logit = logits[edit.token];
      logit += edit.bias;
      logit = (logit < 0 ? logit * edit.repetition : logit / edit.repetition) - edit.subtract;
    }
    SamplingParams params;
    params.seed = how.seed;
    params.temperature = how.temperature;
    params.top_p = how.top_p;
    params.min_p = how.min_p;
    params.top_k = how.top_k;
    const PenaltyHistory none({});
    const SampleResult result =
        SampleToken(logits, {.params = &params, .history = &none, .banned = {}, .position = how.position});
    return result.ok ? result.token.token : -1;
  }

  std::vector<float> logits_;
  std::vector<int32_t> sampled_;
};

}  // namespace linspec
