#include "models/self_check.h"

#include <cmath>

#include "tests/models/model_test_util.h"

namespace linspec {
namespace {

// A real model with one thing wrong.
class BrokenModel : public Model {
 public:
  BrokenModel(std::unique_ptr<Model> model, std::string fault) : model_(std::move(model)), fault_(std::move(fault)) {}

  const ModelConfig& config() const override { return model_->config(); }
  int64_t weight_bytes() const override { return model_->weight_bytes(); }
  std::string Describe() const override { return model_->Describe(); }

  absl::Status Prefill(std::span<const PrefillChunk> chunks, StatePool* pool) override {
    if (fault_ == "error") return absl::UnavailableError("the device failed");
    std::vector<int32_t> tokens(chunks[0].tokens.begin(), chunks[0].tokens.end());
    if (fault_ == "prefill") tokens[tokens.size() / 2] ^= 1;
    const PrefillChunk changed[] = {{chunks[0].slot, tokens}};
    return model_->Prefill(changed, pool);
  }
  absl::StatusOr<VerifyResult> Verify(const VerifyBatch& batch, const StatePool& pool) override {
    VerifyBatch changed = batch;
    if (fault_ == "tree") std::fill(changed.tokens.begin() + 1, changed.tokens.end(), 0);
    absl::StatusOr<VerifyResult> result = model_->Verify(changed, pool);
    if (!result.ok()) return result;
    logits_.assign(result->logits.begin(), result->logits.end());
    if (fault_ == "many" && batch.num_requests() > 3) logits_[3 * config().vocab_size + 5] += 1e3f;
    if (fault_ == "now and then" && batch.num_rows() == 64 && ++steps_ == 5) logits_[20 * config().vocab_size] = NAN;
    if (fault_ == "nan") logits_[0] = std::nanf("");
    result->logits = logits_;
    return result;
  }
  absl::Status Commit(const VerifyBatch& batch, std::span<const std::vector<int32_t>> paths, StatePool* pool) override {
    std::vector<std::vector<int32_t>> changed(paths.begin(), paths.end());
    if (fault_ == "commit" && changed[0].size() > 1) changed[0].pop_back();
    return model_->Commit(batch, changed, pool);
  }

 private:
  const std::unique_ptr<Model> model_;
  const std::string fault_;
  int steps_ = 0;
  std::vector<float> logits_;
};

absl::Status Check(const std::string& fault, int slots, const ModelConfig& config = TinyConfig()) {
  BrokenModel model(*BuildRandomModel(config, 3), fault);
  const auto pool = *StatePool::Create(config, slots);
  const absl::Status status = CheckSelf(&model, pool.get());
  EXPECT_EQ(pool->num_free(), slots);
  return status;
}

TEST(SelfCheckTest, AModelThatIsRightPasses) {
  for (const ModelConfig& config : {TinyConfig(), PaperConfig()}) {
    for (const int slots : {1, 3, 200}) ASSERT_OK(Check("", slots, config));
  }
}

TEST(SelfCheckTest, EveryFaultIsNamed) {
  ExpectError(Check("prefill", 8), absl::StatusCode::kInternal, "self-check: prefill gives logits");
  ExpectError(Check("tree", 8), absl::StatusCode::kInternal, "self-check: a tree gives logits");
  ExpectError(Check("commit", 8), absl::StatusCode::kInternal, "after a path of a tree gives logits");
  ExpectError(Check("many", 8), absl::StatusCode::kInternal, "request 3 of 8");
  ExpectError(Check("now and then", 40), absl::StatusCode::kInternal, "a tree among many gives logits");
  ExpectError(Check("nan", 8), absl::StatusCode::kInternal, "not finite");
  ExpectError(Check("error", 8), absl::StatusCode::kUnavailable, "the device failed");
}

}  // namespace
}  // namespace linspec
