// Speculation changes speed only: for every drafter, batch, prefill chunk and sampling parameter the requests receive
// what plain decoding gives them.
#include <string>

#include "fmt/format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "models/ngram_drafter.h"
#include "tests/scheduler/fake_drafters.h"
#include "tests/scheduler/samplings.h"
#include "tests/scheduler/test_engine.h"

namespace linspec {
namespace {

constexpr int64_t kVocab = 12;  // small, so that random drafts and n-grams are right now and then
constexpr int kTokens = 40;

std::vector<int32_t> Prompt(int request) {
  std::vector<int32_t> prompt;
  for (int i = 0; i < 1 + 6 * request; ++i) prompt.push_back((i * 5 + request) % kVocab);
  return prompt;
}

std::unique_ptr<FakeModel> Model(int eos) {
  auto model = std::make_unique<FakeModel>(kVocab, eos);
  model->spread = 5;
  return model;
}

std::map<uint64_t, Received> RunEngine(const NamedSampling& sampling, int batch, int max_step_tokens,
                                       std::unique_ptr<Drafter> drafter) {
  EngineOptions options = TestEngine::StaticOptions();
  options.max_step_tokens = max_step_tokens;
  std::vector<std::unique_ptr<Drafter>> drafters;
  if (drafter != nullptr) drafters.push_back(std::move(drafter));
  TestEngine engine(options, std::move(drafters), Model(/*eos=*/6));
  for (int r = 0; r < batch; ++r) {
    Request request = TestEngine::MakeRequest(r + 1, Prompt(r), kTokens, 1.0f);
    request.sampling.seed = 1000 + r;
    request.sampling.ignore_eos = r % 2 == 1;
    sampling.set(&request.sampling);
    EXPECT_TRUE(engine.Submit(std::move(request)).ok());
  }
  engine.RunAll();
  return engine.results;
}

Oracle OracleOf(const std::map<uint64_t, Received>& plain) {
  Oracle oracle;
  for (const auto& [id, received] : plain) {
    oracle.push_back(Prompt(static_cast<int>(id) - 1));
    oracle.back().insert(oracle.back().end(), received.tokens.begin(), received.tokens.end());
  }
  return oracle;
}

void ExpectSame(const Received& actual, const Received& expected) {
  EXPECT_EQ(actual.tokens, expected.tokens);
  EXPECT_EQ(actual.last.finish_reason, expected.last.finish_reason);
  EXPECT_EQ(actual.last.stop_token, expected.last.stop_token);
  EXPECT_EQ(actual.last.num_output_tokens, expected.last.num_output_tokens);
  ASSERT_EQ(actual.sampled.size(), expected.sampled.size());
  for (size_t i = 0; i < actual.sampled.size(); ++i) {
    EXPECT_EQ(actual.sampled[i].logprob, expected.sampled[i].logprob);
    ASSERT_EQ(actual.sampled[i].top_logprobs.size(), expected.sampled[i].top_logprobs.size());
  }
}

class SpeculationTest : public testing::TestWithParam<std::string> {};

TEST_P(SpeculationTest, ReceivesWhatPlainDecodingGives) {
  for (const NamedSampling& sampling : Samplings()) {
    for (const int batch : {1, 2, 5}) {
      const std::map<uint64_t, Received> plain = RunEngine(sampling, batch, 512, nullptr);
      for (const int max_step_tokens : {3, 17, 512}) {
        SCOPED_TRACE(fmt::format("{}, batch {}, budget {}", sampling.name, batch, max_step_tokens));
        std::unique_ptr<Drafter> drafter = std::make_unique<NgramDrafter>();
        if (GetParam() == "none") {
          drafter = nullptr;
        } else if (GetParam() != "ngram") {
          drafter = std::make_unique<FakeDrafter>(GetParam(), kVocab, OracleOf(plain));
        }
        const std::map<uint64_t, Received> actual = RunEngine(sampling, batch, max_step_tokens, std::move(drafter));
        for (const auto& [id, received] : plain) ExpectSame(actual.at(id), received);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Drafters, SpeculationTest,
                         testing::Values("none", "ngram", "right", "wrong", "random", "branching", "empty",
                                         "out_of_vocabulary", "no_root", "wrong_root", "cycle", "ragged", "too_big",
                                         "missing", "error"),
                         [](const auto& test) { return test.param; });

TEST(SpeculationStepsTest, ARightDrafterSavesSteps) {
  const NamedSampling greedy = Samplings()[0];
  const auto plain = RunEngine(greedy, 1, 512, nullptr);
  const auto fast = RunEngine(greedy, 1, 512, std::make_unique<FakeDrafter>("right", kVocab, OracleOf(plain)));
  const auto slow = RunEngine(greedy, 1, 512, std::make_unique<FakeDrafter>("wrong", kVocab, OracleOf(plain)));
  const int64_t tokens = plain.at(1).last.num_output_tokens;
  EXPECT_LE(fast.at(1).last.num_verify_steps, tokens / 8 + 1);
  EXPECT_EQ(fast.at(1).last.num_accepted_tokens, fast.at(1).last.num_draft_tokens);
  EXPECT_EQ(slow.at(1).last.num_verify_steps, plain.at(1).last.num_verify_steps);
  EXPECT_EQ(slow.at(1).last.num_accepted_tokens, 0);
}

TEST(SpeculationStepsTest, CountsPerDepthAddUp) {
  EngineOptions options = TestEngine::StaticOptions();
  std::vector<std::unique_ptr<Drafter>> drafters;
  drafters.push_back(std::make_unique<FakeDrafter>("random", kVocab));
  TestEngine engine(options, std::move(drafters), Model(-1));
  ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(1, Prompt(2), 200)).ok());
  engine.RunAll();
  int accepted = 0, per_depth = 0, proposed = 0;
  for (const StepStats& step : engine.steps) {
    accepted += step.num_accepted_tokens;
    proposed += step.num_draft_tokens;
    for (const int count : step.accepted_per_depth) per_depth += count;
    if (step.num_drafts > 0) {
      EXPECT_EQ(step.drafter, "draft");
    }
  }
  EXPECT_GT(accepted, 0);
  EXPECT_EQ(accepted, per_depth);
  EXPECT_EQ(engine.results[1].last.num_accepted_tokens, accepted);
  EXPECT_EQ(engine.results[1].last.num_draft_tokens, proposed);
}

TEST(SpeculationStepsTest, MalformedProposalsAreCountedAndForgotten) {
  for (const std::string kind : {"cycle", "out_of_vocabulary", "missing", "error", "too_big"}) {
    std::vector<std::unique_ptr<Drafter>> drafters;
    auto drafter = std::make_unique<FakeDrafter>(kind, kVocab);
    const FakeDrafter* observed = drafter.get();
    drafters.push_back(std::move(drafter));
    TestEngine engine(TestEngine::StaticOptions(), std::move(drafters), Model(-1));
    ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(1, Prompt(2), 10)).ok());
    engine.RunAll();
    EXPECT_EQ(engine->stats().drafter_errors, observed->num_calls) << kind;
    EXPECT_EQ(observed->num_forgotten, 1);
    EXPECT_FALSE(engine->stats().speculation_on);
  }
}

TEST(SpeculationStepsTest, ModesAndLimitsAreHonoured) {
  const auto calls = [](SpeculationMode mode, int spec_max_batch, int batch) {
    EngineOptions options = TestEngine::StaticOptions();
    options.spec_max_batch = spec_max_batch;
    std::vector<std::unique_ptr<Drafter>> drafters;
    auto drafter = std::make_unique<FakeDrafter>("random", kVocab);
    const FakeDrafter* observed = drafter.get();
    drafters.push_back(std::move(drafter));
    TestEngine engine(options, std::move(drafters), Model(-1));
    for (int r = 0; r < batch; ++r) {
      Request request = TestEngine::MakeRequest(r + 1, {1}, 5);
      request.speculation = mode;
      EXPECT_TRUE(engine.Submit(std::move(request)).ok());
    }
    engine.RunAll();
    return observed->num_calls;
  };
  EXPECT_EQ(calls(SpeculationMode::kOff, 0, 2), 0);
  EXPECT_GT(calls(SpeculationMode::kDraft, 0, 2), 0);
  EXPECT_GT(calls(SpeculationMode::kAuto, 2, 2), 0);
  EXPECT_EQ(calls(SpeculationMode::kAuto, 1, 2), 0);
}

TEST(SpeculationStepsTest, TenThousandTokensStayIdentical) {
  const auto run = [](std::unique_ptr<Drafter> drafter) {
    std::vector<std::unique_ptr<Drafter>> drafters;
    if (drafter != nullptr) drafters.push_back(std::move(drafter));
    TestEngine engine(TestEngine::StaticOptions(), std::move(drafters), Model(-1));
    Request request = TestEngine::MakeRequest(1, {3, 1, 4}, 10000, 0.8f);
    request.sampling.frequency_penalty = 0.01f;
    EXPECT_TRUE(engine.Submit(std::move(request)).ok());
    engine.RunAll();
    return engine.results[1].tokens;
  };
  const std::vector<int32_t> plain = run(nullptr);
  EXPECT_EQ(plain.size(), 10000u);
  EXPECT_EQ(run(std::make_unique<NgramDrafter>()), plain);
  EXPECT_EQ(run(std::make_unique<FakeDrafter>("random", kVocab)), plain);
}

// A batch's other members come, go, fail and are cancelled; the one observed does not notice.
TEST(SpeculationStepsTest, NeighboursDoNotMatter) {
  const auto run = [](bool crowded) {
    std::vector<std::unique_ptr<Drafter>> drafters;
    drafters.push_back(std::make_unique<FakeDrafter>("random", kVocab));
    EngineOptions options = TestEngine::StaticOptions();
    options.max_requests = 3;
    options.max_step_tokens = 20;
    TestEngine engine(options, std::move(drafters), Model(-1));
    EXPECT_TRUE(engine.Submit(TestEngine::MakeRequest(1, Prompt(3), 100, 1.0f)).ok());
    for (uint64_t id = 2; crowded && id < 40; ++id) {
      EXPECT_TRUE(
          engine.Submit(TestEngine::MakeRequest(id, Prompt(static_cast<int>(id) % 5), 9, 1.0f), id % 3 == 0 ? 2 : -1)
              .ok());
      engine->Step();
      if (id % 4 == 0) engine->Cancel(id - 1);
    }
    engine.RunAll();
    return engine.results[1].tokens;
  };
  EXPECT_EQ(run(true), run(false));
}

TEST(SpeculationStepsTest, CalibratedEngineGivesTheSameText) {
  const auto run = [](bool calibrate, std::unique_ptr<Drafter> drafter) {
    EngineOptions options = TestEngine::StaticOptions();
    options.calibrate = calibrate;
    std::vector<std::unique_ptr<Drafter>> drafters;
    drafters.push_back(std::move(drafter));
    drafters.push_back(std::make_unique<NgramDrafter>());
    TestEngine engine(options, std::move(drafters), Model(-1));
    for (int r = 0; r < 5; ++r) {
      Request request = TestEngine::MakeRequest(r + 1, Prompt(r), 300, 1.0f);
      if (r == 3) request.speculation = SpeculationMode::kNgram;
      EXPECT_TRUE(engine.Submit(std::move(request)).ok());
    }
    engine.RunAll();
    return engine.results;
  };
  const auto plain = run(false, std::make_unique<FakeDrafter>("empty", kVocab));
  for (const std::string kind : {"random", "wrong", "error"}) {
    const auto adaptive = run(true, std::make_unique<FakeDrafter>(kind, kVocab));
    for (const auto& [id, received] : plain) EXPECT_EQ(adaptive.at(id).tokens, received.tokens) << kind;
  }
}

}  // namespace
}  // namespace linspec
