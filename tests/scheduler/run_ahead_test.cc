// A model that starts steps ahead of its results gives every request what it gets without, whoever comes, goes or fails
// meanwhile; and no slot is lost.
#include <memory>
#include <random>
#include <utility>

#include "gtest/gtest.h"
#include "models/ngram_drafter.h"
#include "tests/scheduler/fake_drafters.h"
#include "tests/scheduler/run_ahead_model.h"
#include "tests/scheduler/samplings.h"
#include "tests/scheduler/test_engine.h"

namespace linspec {
namespace {

constexpr int64_t kVocab = 12;
constexpr int kEos = 9;

template <typename T>
std::unique_ptr<T> MakeModel() {
  auto model = std::make_unique<T>(kVocab, kEos);
  model->spread = 5;
  return model;
}

struct Planned {
  Request request;
  int arrives = 0, leaves = 1 << 30;  // steps; leaves: cancelled then
  int refuse_after = -1;
};

// drafts: in how many of four requests.
Planned RandomRequest(uint64_t id, int drafts, std::mt19937* random) {
  const auto below = [&](int limit) { return static_cast<int>((*random)() % limit); };
  static const std::vector<NamedSampling> samplings = Samplings();
  Planned planned;
  std::vector<int32_t> prompt(1 + below(9));
  for (int32_t& token : prompt) token = below(static_cast<int>(kVocab));
  planned.request = TestEngine::MakeRequest(id, std::move(prompt), 1 + below(25), 1.0f);
  planned.request.sampling.seed = (*random)();
  planned.request.sampling.ignore_eos = below(3) > 0;
  // Half of them plain, so that steps of plain ones alone are not rare.
  if (below(2) == 0) samplings[below(static_cast<int>(samplings.size()))].set(&planned.request.sampling);
  SamplingParams& sampling = planned.request.sampling;
  sampling.max_tokens = std::max<decltype(sampling.max_tokens)>(sampling.max_tokens, sampling.min_tokens);
  if (below(4) >= drafts) planned.request.speculation = SpeculationMode::kOff;
  planned.arrives = below(40);
  if (below(8) == 0) planned.request.deadline = Clock::now() + std::chrono::microseconds(below(500));
  if (below(5) == 0) planned.leaves = planned.arrives + below(20);
  if (below(6) == 0) planned.refuse_after = 1 + below(8);
  return planned;
}

Received Alone(Request request) {
  EngineOptions options = TestEngine::StaticOptions();
  options.run_ahead = false;
  TestEngine engine(options, {}, MakeModel<ChoosingModel>());
  const uint64_t id = request.id;
  request.speculation = SpeculationMode::kOff;
  request.deadline.reset();
  EXPECT_TRUE(engine.Submit(std::move(request)).ok());
  engine.RunAll();
  return engine.results[id];
}

constexpr int kHeads = 3;
std::vector<std::unique_ptr<Drafter>> SomeDrafters(int which) {
  std::vector<std::unique_ptr<Drafter>> drafters;
  if (which == 1) drafters.push_back(std::make_unique<NgramDrafter>());
  if (which == 2) drafters.push_back(std::make_unique<FakeDrafter>("random", kVocab));
  if (which == kHeads) drafters.push_back(std::make_unique<FakeHeadDrafter>("random", kVocab));
  return drafters;
}

void ExpectPrefix(const Received& received, const Received& alone) {
  ASSERT_LE(received.tokens.size(), alone.tokens.size());
  EXPECT_TRUE(std::equal(received.tokens.begin(), received.tokens.end(), alone.tokens.begin()));
}

struct Counts {
  int ahead = 0, drafted_ahead = 0, failures = 0;
};

void RunSchedule(uint32_t seed, Counts* counts) {
  static const char* const calls[] = {"prefill",
                                      "start",
                                      "next before its commit",
                                      "next after its commit",
                                      "drafted before its commit",
                                      "drafted after its commit",
                                      "finish",
                                      "commit"};
  std::mt19937 random(seed);
  EngineOptions options = TestEngine::StaticOptions();
  options.max_requests = 1 + static_cast<int>(random() % 4);
  options.max_step_tokens = 4 + static_cast<int>(random() % 12);
  options.prefix_cache_entries = static_cast<int>(random() % 3);
  options.calibrate = random() % 2 == 0;
  const int drafters = static_cast<int>(random() % 4);
  auto made = MakeModel<RunAheadModel>();
  RunAheadModel* model = made.get();
  TestEngine engine(options, SomeDrafters(drafters), std::move(made));
  if (random() % 3 == 0) {
    model->fails = calls[random() % std::size(calls)];
    model->fails_after = static_cast<int>(random() % 20);
  }
  std::vector<Planned> planned;
  for (uint64_t id = 1; id <= 8; ++id) planned.push_back(RandomRequest(id, drafters == kHeads ? 4 : 1, &random));
  const int steps = random() % 4 == 0 ? static_cast<int>(random() % 60) : 400;  // or the engine ends before they do
  for (int step = 0; step < steps; ++step) {
    for (Planned& p : planned) {
      if (p.arrives == step) {
        EXPECT_TRUE(engine.Submit(p.request, p.refuse_after).ok());
      }
      if (p.leaves == step) engine->Cancel(p.request.id);
    }
    engine->Step();
    const EngineStats stats = engine->stats();
    ASSERT_EQ(stats.slots_free + stats.num_running, stats.slots_total);
  }
  for (const Planned& p : planned) {
    const Received& received = engine.results[p.request.id];
    const Received alone = Alone(p.request);
    ExpectPrefix(received, alone);
    const FinishReason reason = received.last.finish_reason;
    if (reason == FinishReason::kLength || reason == FinishReason::kStop) {
      EXPECT_EQ(received.tokens, alone.tokens);
      EXPECT_EQ(reason, alone.last.finish_reason);
      EXPECT_EQ(received.last.stop_token, alone.last.stop_token);
    } else if (steps == 400 && model->num_failures == 0 && p.refuse_after < 0 && !p.request.deadline) {
      EXPECT_EQ(reason, p.leaves < steps ? FinishReason::kCancelled : alone.last.finish_reason);
    }
  }
  counts->ahead += model->num_ahead;
  counts->drafted_ahead += model->num_drafted_ahead;
  counts->failures += model->num_failures;
}

TEST(RunAhead, EveryRequestGetsWhatItGetsWithoutUnderRandomSchedules) {
  Counts counts;
  for (uint32_t seed = 1; seed <= 600; ++seed) {
    SCOPED_TRACE(seed);
    RunSchedule(seed, &counts);
    if (testing::Test::HasFailure()) return;
  }
  EXPECT_GT(counts.ahead, 4000);
  EXPECT_GT(counts.drafted_ahead, 1000);
  EXPECT_GT(counts.failures, 50);
}

// Steps that are started ahead for one request of 20 tokens.
int StartedAhead(const std::function<void(Request*)>& set, EngineOptions options = TestEngine::StaticOptions(),
                 int drafters = 0) {
  auto made = std::make_unique<RunAheadModel>(kVocab);
  RunAheadModel* model = made.get();
  TestEngine engine(options, SomeDrafters(drafters), std::move(made));
  Request request = TestEngine::MakeRequest(1, {1, 2, 3}, 20);
  set(&request);
  EXPECT_TRUE(engine.Submit(std::move(request)).ok());
  engine.RunAll();
  EXPECT_EQ(engine.results[1].tokens.size(), 20u);
  return model->num_ahead;
}

TEST(RunAhead, IsDoneWhereTheNextStepIsKnownAndNowhereElse) {
  const auto nothing = [](Request*) {};
  EngineOptions off = TestEngine::StaticOptions();
  off.run_ahead = false;
  EXPECT_EQ(StartedAhead(nothing, off), 0);
  EXPECT_EQ(StartedAhead(nothing), 19);
  EXPECT_EQ(StartedAhead([](Request* r) { r->sampling.logit_bias = {{3, 2.5f}}; }), 19);
  EXPECT_EQ(StartedAhead([](Request* r) { r->sampling.min_tokens = 7; }), 18);
  EXPECT_EQ(StartedAhead([](Request* r) { r->sampling.presence_penalty = 0.5f; }), 0);
  EXPECT_EQ(StartedAhead([](Request* r) { r->sampling.logprobs = 0; }), 0);
  EXPECT_EQ(StartedAhead([](Request* r) { r->sampling.banned_sequences = {{3, 4}}; }), 0);
  for (const int drafter : {1, 2}) {
    EXPECT_EQ(StartedAhead(nothing, TestEngine::StaticOptions(), drafter), 0);
    EXPECT_EQ(
        StartedAhead([](Request* r) { r->speculation = SpeculationMode::kOff; }, TestEngine::StaticOptions(), drafter),
        19);
  }
}

// Who joins has a slot at once, and is in the batch after the step that runs.
TEST(RunAhead, SomebodyWhoJoinsWaitsForOneStep) {
  auto made = std::make_unique<RunAheadModel>(kVocab);
  RunAheadModel* model = made.get();
  TestEngine engine(TestEngine::StaticOptions(), {}, std::move(made));
  ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(1, {1, 2}, 30)).ok());
  for (int i = 0; i < 6; ++i) engine->Step();  // the first reads the prompt
  EXPECT_EQ(model->num_ahead, 5);
  ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(2, {3, 4}, 30)).ok());
  engine->Step();  // finishes what runs
  EXPECT_EQ(model->num_ahead, 5);
  engine->Step();
  EXPECT_EQ(engine.steps.back().num_prefill_tokens, 1);
  engine->Step();
  EXPECT_EQ(engine.steps.back().num_decode_requests, 2);
  engine.RunAll();
}

TEST(RunAhead, ATokenThatCannotBeChosenFailsItsRequestOnly) {
  auto made = std::make_unique<RunAheadModel>(kVocab);
  RunAheadModel* model = made.get();
  TestEngine engine(TestEngine::StaticOptions(), {}, std::move(made));
  ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(1, {1, 2}, 30)).ok());
  ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(2, {3, 4}, 30)).ok());
  for (int i = 0; i < 4; ++i) engine->Step();
  model->poison_token = engine.results[1].tokens.back();
  engine.RunAll();
  EXPECT_EQ(engine.results[1].last.finish_reason, FinishReason::kError);
  EXPECT_GT(model->num_ahead, 4);
  for (const uint64_t id : {1, 2}) {
    TestEngine alone(TestEngine::StaticOptions(), {}, std::make_unique<ChoosingModel>(kVocab));
    ASSERT_TRUE(
        alone.Submit(TestEngine::MakeRequest(id, {static_cast<int32_t>(2 * id - 1), static_cast<int32_t>(2 * id)}, 30))
            .ok());
    alone.RunAll();
    ExpectPrefix(engine.results[id], alone.results[id]);
  }
}

}  // namespace
}  // namespace linspec
