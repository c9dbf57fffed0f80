// Logits against PyTorch in float64, at every position, for every group phase: tests/data/tiny (docs/model_format.md).
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "models/model.h"
#include "models/safetensors.h"
#include "models/weights.h"
#include "tests/models/model_test_util.h"

namespace linspec {
namespace {

constexpr double kTolerance = 1e-5;  // of the largest logit of the row; fp32 against float64 (measured: 1.1e-6)

struct Golden {
  std::vector<int32_t> tokens;  // [T]
  std::vector<float> logits;    // [T, V]
};

class GoldenTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const std::string folder = std::string(LINSPEC_SOURCE_DIR) + "/tests/data/tiny/" + GetParam();
    auto tensors = OpenSafetensors(folder + "/golden.safetensors");
    ASSERT_TRUE(tensors.ok()) << std::string(tensors.status().ToString());
    const TensorView& tokens = tensors->at("tokens");
    ASSERT_EQ(tokens.dtype, DType::kI32);
    const auto* ids = reinterpret_cast<const int32_t*>(tokens.data);
    golden_ = {{ids, ids + tokens.num_elements()}, ToFloats(tensors->at("logits"))};
    auto model = LoadModel({.path = folder, .weight_dtype = "f32", .num_threads = 1});
    ASSERT_TRUE(model.ok()) << std::string(model.status().ToString());
    model_ = *std::move(model);
    ASSERT_EQ(golden_.logits.size(), golden_.tokens.size() * model_->config().vocab_size);
    pool_ = *StatePool::Create(model_->config(), 2);
  }

  // Largest difference at a position, relative to the largest logit there.
  double Difference(const float* logits, size_t position) const {
    const size_t vocab = model_->config().vocab_size;
    const float* expected = golden_.logits.data() + position * vocab;
    double difference = 0, largest = 0;
    for (size_t v = 0; v < vocab; ++v) {
      difference = std::max(difference, std::abs(double{logits[v]} - expected[v]));
      largest = std::max(largest, std::abs(double{expected[v]}));
    }
    return difference / largest;
  }

  Golden golden_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<StatePool> pool_;
};

TEST_P(GoldenTest, TokenByTokenAtEveryPosition) {
  const StateSlot slot = pool_->Acquire();
  const auto logits = Sequential(*model_, *pool_, slot.id(), golden_.tokens);
  double worst = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double difference = Difference(logits[i].data(), i);
    worst = std::max(worst, difference);
    EXPECT_LT(difference, kTolerance) << "position " << i;
  }
  RecordProperty("worst_relative_difference", fmt::format("{:.2e}", worst));
}

TEST_P(GoldenTest, AfterPrefillOfEveryLength) {
  const size_t vocab = model_->config().vocab_size;
  for (size_t length = 0; length + 1 < golden_.tokens.size() && length <= 130; ++length) {
    StateSlot slot = pool_->Acquire();
    const std::span<const int32_t> tokens(golden_.tokens);
    const std::vector<PrefillChunk> chunks = {{.slot = slot.id(), .tokens = tokens.first(length)}};
    ASSERT_OK(model_->Prefill(chunks, pool_.get()));
    DraftTree chain = DraftTree::Root(tokens[length]);
    for (const int32_t token : tokens.subspan(length + 1, std::min<size_t>(9, tokens.size() - length - 1))) {
      chain.Add(token, chain.num_nodes() - 1);
    }
    VerifyBatch batch;
    batch.Add(slot.id(), chain);
    const auto result = model_->Verify(batch, *pool_);
    ASSERT_TRUE(result.ok()) << std::string(result.status().ToString());
    for (int node = 0; node < chain.num_nodes(); ++node) {
      ASSERT_LT(Difference(result->logits.data() + node * vocab, length + node), kTolerance)
          << "prompt of " << length << ", node " << node;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tiny, GoldenTest, ::testing::Values("paper", "full", "gqa", "full64"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace linspec
