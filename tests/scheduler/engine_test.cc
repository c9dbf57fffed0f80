#include "scheduler/engine.h"

#include <cmath>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/scheduler/test_engine.h"

namespace linspec {
namespace {

using std::chrono::milliseconds;

Request Simple(uint64_t id, int max_tokens = 5) { return TestEngine::MakeRequest(id, {1, 2, 3}, max_tokens); }

// What one-token-at-a-time decoding of the fake model gives.
std::vector<int32_t> GreedyByHand(const FakeModel& model, const std::vector<int32_t>& prompt, int count) {
  std::vector<int32_t> output;
  std::vector<float> logits(model.config().vocab_size);
  uint64_t hash = 0;
  for (const int32_t token : prompt) hash = FakeModel::Extend(hash, token);
  for (int i = 0; i < count; ++i) {
    model.Logits(hash, logits.data());
    output.push_back(static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
    hash = FakeModel::Extend(hash, output.back());
  }
  return output;
}

TEST(EngineTest, DecodesGreedilyWhateverThePrefillChunk) {
  const std::vector<int32_t> prompt = {5, 6, 7, 8, 9, 10, 11, 12, 13};
  for (const int max_step_tokens : {1, 2, 3, 8, 512}) {
    EngineOptions options = TestEngine::StaticOptions();
    options.max_step_tokens = max_step_tokens;
    TestEngine engine(options);
    ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(1, prompt, 12)).ok());
    ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(2, {4}, 12)).ok());
    engine.RunAll();
    EXPECT_EQ(engine.results[1].tokens, GreedyByHand(engine.model(), prompt, 12));
    EXPECT_EQ(engine.results[2].tokens, GreedyByHand(engine.model(), {4}, 12));
    EXPECT_EQ(engine.results[1].last.finish_reason, FinishReason::kLength);
    EXPECT_EQ(engine.results[1].last.num_prompt_tokens, 9);
    EXPECT_EQ(engine.results[1].last.num_output_tokens, 12);
  }
}

TEST(EngineTest, EndOfSequenceEndsUnlessIgnored) {
  const std::vector<int32_t> plain = GreedyByHand(FakeModel(), {1, 2, 3}, 20);
  const int32_t eos = plain[6];
  const int64_t first = std::find(plain.begin(), plain.end(), eos) - plain.begin();
  TestEngine engine(TestEngine::StaticOptions(), {}, std::make_unique<FakeModel>(32, eos));
  Request ignoring = Simple(2, 20);
  ignoring.sampling.ignore_eos = true;
  Request patient = Simple(3, 20);
  patient.sampling.min_tokens = 10;
  ASSERT_TRUE(engine.Submit(Simple(1, 20)).ok());
  ASSERT_TRUE(engine.Submit(ignoring).ok());
  ASSERT_TRUE(engine.Submit(patient).ok());
  engine.RunAll();
  EXPECT_EQ(engine.results[1].tokens, std::vector<int32_t>(plain.begin(), plain.begin() + first));
  EXPECT_EQ(engine.results[1].last.finish_reason, FinishReason::kStop);
  EXPECT_EQ(engine.results[1].last.stop_token, eos);
  EXPECT_EQ(engine.results[2].tokens, plain);
  EXPECT_GE(engine.results[3].tokens.size(), 10u);
}

TEST(EngineTest, SubmitNamesWhatIsWrong) {
  TestEngine engine;
  const auto message = [&](Request request) { return std::string(engine.Submit(std::move(request)).message()); };
  Request empty = Simple(1);
  empty.prompt_tokens.clear();
  EXPECT_THAT(message(empty), testing::HasSubstr("prompt is empty"));
  Request outside = Simple(1);
  outside.prompt_tokens[1] = 32;
  EXPECT_THAT(message(outside), testing::HasSubstr("prompt token 1 = 32"));
  Request hot = Simple(1);
  hot.sampling.temperature = NAN;
  EXPECT_THAT(message(hot), testing::HasSubstr("temperature = nan"));
  Request medusa = Simple(1);
  medusa.speculation = SpeculationMode::kMedusa;
  EXPECT_THAT(message(medusa), testing::HasSubstr("speculation = medusa is not available; available: off, auto"));
  ASSERT_TRUE(engine.Submit(Simple(1)).ok());
  EXPECT_EQ(engine.Submit(Simple(1)).code(), absl::StatusCode::kInvalidArgument);
  Request no_sink = Simple(7);
  EXPECT_EQ(engine->Submit(no_sink).code(), absl::StatusCode::kInvalidArgument);
  engine.RunAll();
}

TEST(EngineTest, CreateRejectsBadOptions) {
  EngineOptions options = TestEngine::StaticOptions();
  options.max_draft_nodes = 65;
  auto engine = Engine::Create(std::make_unique<FakeModel>(), {}, options, nullptr);
  EXPECT_THAT(std::string(engine.status().message()), testing::HasSubstr("max_draft_nodes = 65"));
  options = TestEngine::StaticOptions();
  options.max_draft_slowdown = 0.5;
  engine = Engine::Create(std::make_unique<FakeModel>(), {}, options, nullptr);
  EXPECT_THAT(std::string(engine.status().message()), testing::HasSubstr("max_draft_slowdown = 0.5"));
  options = TestEngine::StaticOptions();
  options.speculation = SpeculationMode::kDraft;
  engine = Engine::Create(std::make_unique<FakeModel>(), {}, options, nullptr);
  EXPECT_EQ(engine.status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(EngineTest, QueueIsBoundedInRequestsAndTokens) {
  EngineOptions options = TestEngine::StaticOptions();
  options.max_queue_requests = 2;
  options.max_queue_tokens = 10;
  TestEngine engine(options);
  EXPECT_TRUE(engine.Submit(TestEngine::MakeRequest(1, std::vector<int32_t>(8, 1), 2)).ok());
  EXPECT_EQ(engine.Submit(Simple(2)).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(engine.Submit(TestEngine::MakeRequest(3, {1}, 2)).ok());
  EXPECT_EQ(engine.Submit(TestEngine::MakeRequest(4, {1}, 2)).code(), absl::StatusCode::kResourceExhausted);
  engine.RunAll();
  EXPECT_TRUE(engine.Submit(Simple(2)).ok());
  engine.RunAll();
  EXPECT_EQ(engine.results[2].tokens.size(), 5u);
}

TEST(EngineTest, LowerPriorityNumberRunsFirstThenFirstComeFirstServed) {
  EngineOptions options = TestEngine::StaticOptions();
  options.max_requests = 1;
  TestEngine engine(options);
  std::vector<uint64_t> order;
  const std::vector<std::pair<uint64_t, int>> submitted = {{1, 5}, {2, 0}, {3, -1}, {4, 0}};
  for (const auto& [id, priority] : submitted) {
    Request request = Simple(id, 1);
    request.priority = priority;
    request.sink = [&order](RequestOutput&& output) {
      order.push_back(output.request_id);
      return true;
    };
    ASSERT_TRUE(engine->Submit(std::move(request)).ok());
  }
  engine.RunAll();
  EXPECT_EQ(order, (std::vector<uint64_t>{3, 2, 4, 1}));
}

TEST(EngineTest, CancelFreesTheSlotInEveryPhase) {
  for (int steps_before = 0; steps_before < 8; ++steps_before) {  // waiting, prefill (4 steps), decode
    EngineOptions options = TestEngine::StaticOptions();
    options.max_requests = 1;
    options.max_step_tokens = 2;
    TestEngine engine(options);
    ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(1, std::vector<int32_t>(9, 1), 50)).ok());
    ASSERT_TRUE(engine.Submit(Simple(2)).ok());
    for (int i = 0; i < steps_before; ++i) engine->Step();
    engine->Cancel(1);
    engine->Cancel(1);
    engine->Cancel(999);
    engine->Step();
    EXPECT_EQ(engine.results[1].last.finish_reason, FinishReason::kCancelled);
    engine->Step();
    EXPECT_EQ(engine->stats().num_running, 1);
    engine.RunAll();
    EXPECT_EQ(engine.results[2].tokens, GreedyByHand(engine.model(), {1, 2, 3}, 5));
  }
}

TEST(EngineTest, CancelOfAWaitingRequestIsDeliveredWithoutASlot) {
  EngineOptions options = TestEngine::StaticOptions();
  options.max_requests = 1;
  TestEngine engine(options);
  ASSERT_TRUE(engine.Submit(Simple(1, 50)).ok());
  engine->Step();
  ASSERT_TRUE(engine.Submit(Simple(2)).ok());
  engine->Cancel(2);
  engine->Step();
  EXPECT_EQ(engine.results[2].last.finish_reason, FinishReason::kCancelled);
  EXPECT_EQ(engine->stats().num_running, 1);
  engine.RunAll();
}

TEST(EngineTest, DeadlinesEndWaitingAndRunningRequests) {
  EngineOptions options = TestEngine::StaticOptions();
  options.max_requests = 1;
  TestEngine engine(options);
  Request running = Simple(1, 1000000);
  running.deadline = Clock::now() + milliseconds(30);
  Request late = Simple(2);
  late.deadline = Clock::now() - milliseconds(1);
  ASSERT_TRUE(engine.Submit(running).ok());
  ASSERT_TRUE(engine.Submit(late).ok());
  engine->Step();
  EXPECT_EQ(engine.results[2].last.finish_reason, FinishReason::kDeadline);
  engine.RunAll();
  EXPECT_EQ(engine.results[1].last.finish_reason, FinishReason::kDeadline);
  EXPECT_GT(engine.results[1].tokens.size(), 0u);
}

TEST(EngineTest, SinkThatRefusesIsNotCalledAgain) {
  TestEngine engine;
  ASSERT_TRUE(engine.Submit(Simple(1, 50), 3).ok());
  ASSERT_TRUE(engine.Submit(Simple(2, 10)).ok());
  engine.RunAll();
  EXPECT_EQ(engine.results[1].num_outputs, 3);
  EXPECT_EQ(engine.results[2].tokens.size(), 10u);
  EXPECT_EQ(engine->stats().requests_finished, 2);
}

TEST(EngineTest, AfterDeliveryRunsOnceAStepAfterTheLastSink) {
  EngineOptions options = TestEngine::StaticOptions();
  options.max_step_tokens = 2;  // prompts take steps of their own, of which nobody is told anything
  TestEngine engine(options);
  const auto num_outputs = [&] {
    int sum = 0;
    for (auto& [id, result] : engine.results) sum += result.num_outputs;
    return sum;
  };
  int calls = 0, told = 0;
  engine->SetAfterDelivery([&] {
    ++calls;
    told = num_outputs();
  });
  for (const uint64_t id : {1, 2, 3}) ASSERT_TRUE(engine.Submit(Simple(id)).ok());
  int expected_calls = 0, silent_steps = 0;
  for (int before = 0; engine->Step(); before = num_outputs()) {
    (num_outputs() > before ? expected_calls : silent_steps) += 1;
    EXPECT_EQ(calls, expected_calls);
    EXPECT_EQ(told, num_outputs());
  }
  EXPECT_GT(silent_steps, 0);
  EXPECT_GT(calls, 0);
}

TEST(EngineTest, ModelErrorsEndTheAffectedRequestsOnly) {
  TestEngine engine;
  ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(1, {9}, 5)).ok());
  engine->Step();
  ASSERT_TRUE(engine.Submit(Simple(2)).ok());
  engine.model().prefill_error = absl::InternalError("prefill broke");
  engine.RunAll();
  EXPECT_EQ(engine.results[1].last.finish_reason, FinishReason::kLength);
  EXPECT_EQ(engine.results[2].last.finish_reason, FinishReason::kError);
  EXPECT_EQ(engine.results[2].last.status.message(), "prefill broke");

  for (const bool commit : {false, true}) {
    ASSERT_TRUE(engine.Submit(Simple(3)).ok());
    (commit ? engine.model().commit_error : engine.model().verify_error) = absl::InternalError("broke");
    engine.RunAll();
    EXPECT_EQ(engine.results[3].last.finish_reason, FinishReason::kError);
    engine.results.erase(3);
    ASSERT_TRUE(engine.Submit(Simple(4)).ok());
    engine.RunAll();
    EXPECT_EQ(engine.results[4].tokens, GreedyByHand(engine.model(), {1, 2, 3}, 5));
    engine.results.erase(4);
  }
}

TEST(EngineTest, NanLogitsEndThatRequestOnly) {
  TestEngine engine;
  engine.model().poison_token = GreedyByHand(engine.model(), {1, 2, 3}, 5)[2];
  ASSERT_TRUE(engine.Submit(Simple(1, 5)).ok());
  ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(2, {7, 7}, 1)).ok());
  engine.RunAll();
  EXPECT_EQ(engine.results[1].last.finish_reason, FinishReason::kError);
  EXPECT_EQ(engine.results[1].tokens.size(), 3u);
  EXPECT_EQ(engine.results[2].last.finish_reason, FinishReason::kLength);
}

TEST(EngineTest, BanningEveryTokenIsAnErrorOfThatRequest) {
  TestEngine engine(TestEngine::StaticOptions(), {}, std::make_unique<FakeModel>(4));
  Request request = TestEngine::MakeRequest(1, {1}, 5);
  request.sampling.min_tokens = 2;
  request.sampling.stop_token_ids = {0, 1, 2, 3};
  ASSERT_TRUE(engine.Submit(request).ok());
  engine.RunAll();
  EXPECT_EQ(engine.results[1].last.finish_reason, FinishReason::kError);
}

TEST(EngineTest, PromptLogprobsMatchTheModelAtAnyBudget) {
  std::vector<int32_t> prompt;
  for (int i = 0; i < 150; ++i) prompt.push_back(i % 31);
  for (const int max_step_tokens : {5, 70, 512}) {
    EngineOptions options = TestEngine::StaticOptions();
    options.max_step_tokens = max_step_tokens;
    TestEngine engine(options);
    Request request = TestEngine::MakeRequest(1, prompt, 3);
    request.prompt_logprobs = true;
    request.sampling.logprobs = 2;
    ASSERT_TRUE(engine.Submit(request).ok());
    engine.RunAll();
    const Received& received = engine.results[1];
    ASSERT_EQ(received.tokens.size(), prompt.size() + 3);
    EXPECT_TRUE(std::equal(prompt.begin(), prompt.end(), received.tokens.begin()));
    EXPECT_TRUE(std::isnan(received.sampled[0].logprob));
    uint64_t hash = 0;
    std::vector<float> logits(32);
    for (size_t i = 1; i < received.tokens.size(); ++i) {
      hash = FakeModel::Extend(hash, received.tokens[i - 1]);
      engine.model().Logits(hash, logits.data());
      double sum = 0;
      for (const float logit : logits) sum += std::exp(logit);
      EXPECT_NEAR(received.sampled[i].logprob, logits[received.tokens[i]] - std::log(sum), 1e-4);
      ASSERT_EQ(received.sampled[i].top_logprobs.size(), 2u);
    }
  }
}

TEST(EngineTest, DrainFinishesOrAborts) {
  TestEngine engine;
  ASSERT_TRUE(engine.Submit(Simple(1)).ok());
  EXPECT_TRUE(engine->Drain(milliseconds(5000)));
  EXPECT_EQ(engine.results[1].tokens.size(), 5u);
  EXPECT_EQ(engine.Submit(Simple(2)).code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(engine->Drain(milliseconds(0)));

  TestEngine slow;
  ASSERT_TRUE(slow.Submit(Simple(1, 1000000)).ok());
  EXPECT_FALSE(slow->Drain(milliseconds(20)));
  EXPECT_EQ(slow.results[1].last.finish_reason, FinishReason::kCancelled);
  slow.ExpectNoLeak();
}

TEST(EngineTest, DestructionCancelsWhatIsLeft) {
  Received waiting, running;
  {
    EngineOptions options = TestEngine::StaticOptions();
    options.max_requests = 1;
    auto engine = *Engine::Create(std::make_unique<FakeModel>(), {}, options, nullptr);
    for (Received* received : {&running, &waiting}) {
      Request request = Simple(received == &running ? 1 : 2, 1000);
      request.sink = [received](RequestOutput&& output) {
        received->last = std::move(output);
        return true;
      };
      ASSERT_TRUE(engine->Submit(std::move(request)).ok());
      engine->Step();
    }
  }
  EXPECT_EQ(running.last.finish_reason, FinishReason::kCancelled);
  EXPECT_EQ(waiting.last.finish_reason, FinishReason::kCancelled);
}

TEST(EngineTest, AFailedDeviceTakesNoMoreRequests) {
  auto model = std::make_unique<FakeModel>();
  FakeModel* device = model.get();
  TestEngine engine(TestEngine::StaticOptions(), {}, std::move(model));
  EXPECT_TRUE(engine->health().ok());
  ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(1, {1}, 5)).ok());
  device->verify_error = absl::InternalError("the GPU failed: an illegal address");
  device->failed = true;
  engine.RunAll();
  EXPECT_EQ(engine.results[1].last.finish_reason, FinishReason::kError);
  EXPECT_FALSE(engine->health().ok());
  EXPECT_EQ(engine.Submit(TestEngine::MakeRequest(2, {1}, 5)).code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace linspec
