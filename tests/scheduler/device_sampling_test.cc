// A model that chooses tokens itself gives every request what choosing on the host gives it, under speculation too.
#include "scheduler/device_sampling.h"

#include <map>
#include <memory>
#include <utility>

#include "gtest/gtest.h"
#include "models/ngram_drafter.h"
#include "tests/scheduler/choosing_model.h"
#include "tests/scheduler/fake_drafters.h"
#include "tests/scheduler/samplings.h"
#include "tests/scheduler/test_engine.h"

namespace linspec {
namespace {

constexpr int64_t kVocab = 12;

Request MakeRequest(uint64_t id, const NamedSampling& sampling) {
  Request request =
      TestEngine::MakeRequest(id, {1, static_cast<int32_t>(id), 3, 1, static_cast<int32_t>(id)}, 40, 1.0f);
  request.sampling.seed = 900 + id;
  sampling.set(&request.sampling);
  return request;
}

std::map<uint64_t, Received> RunAll(std::unique_ptr<FakeModel> model, const NamedSampling& sampling,
                                    std::unique_ptr<Drafter> drafter) {
  model->spread = 5;
  std::vector<std::unique_ptr<Drafter>> drafters;
  if (drafter != nullptr) drafters.push_back(std::move(drafter));
  TestEngine engine(TestEngine::StaticOptions(), std::move(drafters), std::move(model));
  for (uint64_t id = 1; id <= 4; ++id) EXPECT_TRUE(engine.Submit(MakeRequest(id, sampling)).ok());
  engine.RunAll();
  return std::move(engine.results);
}

TEST(DeviceSampling, EqualsTheHostForEverySamplingAndDrafter) {
  for (const NamedSampling& sampling : Samplings()) {
    const auto expected = RunAll(std::make_unique<FakeModel>(kVocab, 0), sampling, nullptr);
    for (const char* drafter : {"none", "random", "ngram"}) {
      SCOPED_TRACE(sampling.name + ", drafter " + drafter);
      std::unique_ptr<Drafter> made;
      if (std::string(drafter) == "random") made = std::make_unique<FakeDrafter>("random", kVocab);
      if (std::string(drafter) == "ngram") made = std::make_unique<NgramDrafter>();
      auto model = std::make_unique<ChoosingModel>(kVocab, 0);
      const auto got = RunAll(std::move(model), sampling, std::move(made));
      ASSERT_EQ(got.size(), expected.size());
      for (const auto& [id, received] : expected) {
        EXPECT_EQ(got.at(id).tokens, received.tokens) << "request " << id;
        EXPECT_EQ(got.at(id).last.finish_reason, received.last.finish_reason);
        EXPECT_EQ(got.at(id).last.stop_token, received.last.stop_token);
      }
    }
  }
}

TEST(DeviceSampling, LogitsAreFetchedOnlyForWhoNeedsThem) {
  auto model = std::make_unique<ChoosingModel>(kVocab);
  ChoosingModel* watched = model.get();
  TestEngine engine(TestEngine::StaticOptions(), {}, std::move(model));
  ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(1, {1, 2}, 5)).ok());
  engine.RunAll();
  EXPECT_EQ(watched->num_without_logits, 5);
  Request with_logprobs = TestEngine::MakeRequest(2, {1, 2}, 5);
  with_logprobs.sampling.logprobs = 2;
  ASSERT_TRUE(engine.Submit(std::move(with_logprobs)).ok());
  engine.RunAll();
  EXPECT_EQ(watched->num_without_logits, 5);
  EXPECT_EQ(engine.results[2].tokens, engine.results[1].tokens);
  EXPECT_EQ(engine.results[2].sampled[0].top_logprobs.size(), 2u);
}

TEST(DeviceSampling, ATokenThatCannotBeChosenFailsItsRequestOnly) {
  auto model = std::make_unique<ChoosingModel>(kVocab);
  model->poison_token = 7;
  TestEngine engine(TestEngine::StaticOptions(), {}, std::move(model));
  ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(1, {7}, 5)).ok());
  ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(2, {1}, 1)).ok());
  engine.RunAll();
  EXPECT_EQ(engine.results[1].last.finish_reason, FinishReason::kError);
  EXPECT_EQ(engine.results[2].last.finish_reason, FinishReason::kLength);
}

// The news of a step are delivered while the next one runs: a client that leaves then must not be committed or touched.
TEST(DeviceSampling, AClientThatLeavesDuringTheNextStepEndsCleanly) {
  TestEngine engine(TestEngine::StaticOptions(), {}, std::make_unique<ChoosingModel>(kVocab));
  ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(1, {1, 2}, 50), /*refuse_after_outputs=*/2).ok());
  ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(2, {1, 2}, 20)).ok());
  engine.RunAll();
  EXPECT_EQ(engine.results[1].num_outputs, 2);
  EXPECT_EQ(engine.results[2].tokens.size(), 20u);
  EXPECT_EQ(engine.results[2].last.finish_reason, FinishReason::kLength);
}

}  // namespace
}  // namespace linspec
