#include "scheduler/speculation_controller.h"

#include <functional>

#include "gtest/gtest.h"
#include "tests/scheduler/speculation_simulator.h"

namespace linspec {
namespace {

// A machine with one drafter of sequential levels; milliseconds.
SimulatedMachine Machine(double row_ms, double level_ms, double base_ms = 1) {
  SimulatedMachine machine;
  for (int rows = 1; rows <= 64; rows *= 2) machine.row_ms.push_back(base_ms + row_ms * rows);
  machine.request_ms = 0.02;
  machine.drafters = {{.name = "draft", .first_ms = level_ms, .level_ms = level_ms, .catch_up_ms = 0.002}};
  return machine;
}

SpeculationController Calibrated(const SimulatedMachine& machine) {
  SpeculationController controller(std::vector<bool>(machine.drafters.size(), false));
  SpeculationSimulator(machine, {{0.5}}, 1, 1, 1).Calibrate(&controller, 0);
  return controller;
}

SpeculationRequest Request(uint64_t id, int max_nodes = 8, std::vector<int64_t> catch_up = {0}) {
  return {.sequence_id = id,
          .max_nodes = max_nodes,
          .drafter = kAnyDrafter,
          .catch_up_tokens = std::move(catch_up),
          .tokens_left = 1000};
}

// Plain steps tell what a plain step costs; before, nothing is drafted.
void Settle(SpeculationController* controller, int num_requests) {
  const std::vector<SpeculationRequest> requests(num_requests, Request(1, 1, {0, 0}));
  for (int step = 0; step < 8; ++step) {
    controller->Choose(requests, 0);
    const double seconds = controller->step_costs().Estimate(num_requests, num_requests);
    controller->ObserveStep({.rows = num_requests,
                             .requests = num_requests,
                             .tokens = static_cast<double>(num_requests),
                             .verify_seconds = seconds,
                             .seconds = seconds});
  }
}

// A chain whose drafter states the same probability for each token.
DraftTree Chain(int nodes, float stated) {
  DraftTree tree = DraftTree::Root(0);
  tree.probabilities = {1.0f};
  for (int node = 1; node < nodes; ++node) {
    tree.Add(1, node - 1);
    tree.probabilities.push_back(tree.probabilities.back() * stated);
  }
  return tree;
}

std::vector<int32_t> Path(int accepted) {
  std::vector<int32_t> path;
  for (int node = 0; node <= accepted; ++node) path.push_back(node);
  return path;
}

// Tells the controller of drafts of which `accepted` of four tokens held.
void Watch(SpeculationController* controller, int drafter, int times, const std::function<int(int)>& accepted) {
  for (int i = 0; i < times; ++i) {
    DraftTree tree = Chain(5, 0.7f);
    controller->Learn({1, drafter, false, &tree});
    const std::vector<int32_t> path = Path(accepted(i));
    controller->acceptance().Observe({1, drafter, &tree, path, true});
  }
}

TEST(SpeculationControllerTest, NoticesThatADrafterBecameGood) {
  SpeculationController controller = Calibrated(Machine(0.1, 0.1));
  SpeculationSimulator simulator(Machine(0.1, 0.1), {{0.02}, {0.9}}, 2, 128, 3);
  const double plain = simulator.RunFixed(-1, 1, 100).rate();
  simulator.Run(&controller, 3000, 0);
  simulator.Run(&controller, 6000, 1);
  EXPECT_GT(simulator.Run(&controller, 1000, 1).rate(), 1.3 * plain);
}

TEST(SpeculationControllerTest, RespectsRowBudgetModesAndLimits) {
  SpeculationController controller = Calibrated(Machine(0, 0.1));
  Settle(&controller, 4);
  std::vector<SpeculationRequest> requests;
  for (int r = 0; r < 4; ++r) requests.push_back(Request(r + 1, r == 0 ? 1 : 8));
  const auto drafted = [](const std::vector<SpeculationChoice>& choices) {
    int rows = 0;
    for (const SpeculationChoice& choice : choices) rows += choice.nodes - 1;
    return rows;
  };
  for (const int budget : {0, 1, 5, 100}) {
    const std::vector<SpeculationChoice> choices = controller.Choose(requests, budget);
    EXPECT_LE(drafted(choices), budget);
    EXPECT_EQ(choices[0].nodes, 1);
    for (const SpeculationChoice& choice : choices) EXPECT_LE(choice.nodes, 8);
  }
  EXPECT_GT(drafted(controller.Choose(requests, 100)), 0);
  EXPECT_EQ(drafted(controller.Choose(requests, 100, StepStart::kAhead)), 0);
  EXPECT_TRUE(controller.StaysPlain());  // until steps that are started ahead have a price
}

TEST(SpeculationControllerTest, NodesGoToTheRequestThatAcceptsThem) {
  SpeculationController controller = Calibrated(Machine(0.15, 0.1, 0.5));
  const DraftTree drafted = Chain(5, 0.7f);
  const std::vector<int32_t> all = Path(4), none = Path(0);
  for (int i = 0; i < 60; ++i) {
    controller.acceptance().Observe({1, 0, &drafted, all, true});
    controller.acceptance().Observe({2, 0, &drafted, none, true});
  }
  const std::vector<SpeculationRequest> requests = {Request(1), Request(2)};
  controller.Choose(requests, 100);
  std::vector<DraftTree> trees = {Chain(8, 0.7f), Chain(8, 0.7f)};
  const std::vector<SpeculationProposal> proposals = {{1, 0, false, &trees[0]}, {2, 0, false, &trees[1]}};
  controller.Prune(proposals, 2, 0);
  EXPECT_GT(trees[0].num_nodes(), 4);
  EXPECT_LE(trees[1].num_nodes(), 2);
}

TEST(SpeculationControllerTest, PruningKeepsTheLikeliestPathsOfATree) {
  SpeculationController controller =
      Calibrated(Machine(0.4, 10));  // too slow to be used: the price is plain decoding's
  const SpeculationRequest request = Request(1);
  controller.Choose({&request, 1}, 100);
  DraftTree tree = DraftTree::Root(5);
  const int likely = tree.Add(1, 0), unlikely = tree.Add(2, 0), below = tree.Add(3, likely);
  tree.Add(4, unlikely);
  tree.probabilities = {1.0f, 0.8f, 0.15f, 0.7f, 0.1f};
  const SpeculationProposal proposal{1, 0, false, &tree};
  const double row = 0.4 / 1.4;  // of a plain step
  EXPECT_NEAR(controller.Gain(proposal), 0.8 + 0.7 - 2 * row, 1e-6);
  controller.Prune({&proposal, 1}, 1, 0);
  EXPECT_EQ(tree.tokens, (std::vector<int32_t>{5, 1, 3}));
  EXPECT_EQ(tree.parents, (std::vector<int32_t>{-1, 0, 1}));
  EXPECT_EQ(tree.probabilities, (std::vector<float>{1.0f, 0.8f, 0.7f}));
  EXPECT_EQ(below, 3);
}

TEST(SpeculationControllerTest, OfATrialOneNodeStaysAndIndependentDrawsStayWhole) {
  SpeculationController controller = Calibrated(Machine(100, 0.1));
  const SpeculationRequest request = Request(1);
  controller.Choose({&request, 1}, 100);
  for (const bool trial : {false, true}) {
    DraftTree tree = Chain(4, 0.2f);
    if (!trial) tree.distributions.resize(4);
    const SpeculationProposal proposal{1, 0, trial, &tree};
    controller.Prune({&proposal, 1}, 1, 0);
    EXPECT_EQ(tree.num_nodes(), trial ? 2 : 4);
  }
}

TEST(SpeculationControllerTest, PicksTheBetterDrafter) {
  SimulatedMachine machine = Machine(0.01, 0.25);
  machine.drafters.push_back(machine.drafters[0]);
  machine.drafters[1].first_ms = machine.drafters[1].level_ms = 0.025;
  SpeculationController controller = Calibrated(machine);
  Settle(&controller, 1);
  const SpeculationRequest request = Request(1, 8, {3, 3});
  const auto chosen = [&] {
    for (int step = 0; step < 16; ++step) controller.Choose({&request, 1}, 100);
    return controller.Choose({&request, 1}, 100)[0].drafter;
  };
  Watch(&controller, 0, 200, [](int) { return 3; });
  Watch(&controller, 1, 200, [](int i) { return i * 0; });
  EXPECT_EQ(chosen(), 0);
  Watch(&controller, 0, 400, [](int) { return 0; });
  Watch(&controller, 1, 400, [](int i) { return i % 2 * 2; });
  EXPECT_EQ(chosen(), 1);
}

TEST(SpeculationControllerTest, ADrafterThatCostsNothingIsLeftToWhoeverAsksIt) {
  SpeculationController controller({true, false});
  for (int rows = 1; rows <= 64; rows *= 2) controller.step_costs().Calibrate(rows, 1e-3 + 1e-5 * rows);
  Settle(&controller, 1);
  const SpeculationRequest request = Request(1, 8, {3, 3});
  EXPECT_EQ(controller.Choose({&request, 1}, 100)[0].drafter, 1);
  SpeculationController alone(std::vector<bool>{true});
  for (int rows = 1; rows <= 64; rows *= 2) alone.step_costs().Calibrate(rows, 1e-3 + 1e-5 * rows);
  Settle(&alone, 1);
  const SpeculationRequest only = Request(1);
  EXPECT_EQ(alone.Choose({&only, 1}, 100)[0].nodes, 1);
  DraftTree tree = Chain(4, 0.9f);
  EXPECT_GT(alone.Gain({1, 0, false, &tree}), 1);
}

TEST(SpeculationControllerTest, ALongCatchUpMustPayOff) {
  SpeculationController controller = Calibrated(Machine(0.1, 0.1));
  Settle(&controller, 1);
  SpeculationRequest request = Request(1);
  request.catch_up_tokens = {4};
  EXPECT_GT(controller.Choose({&request, 1}, 100)[0].nodes, 1);
  request.catch_up_tokens = {20000};
  EXPECT_EQ(controller.Choose({&request, 1}, 100)[0].nodes, 1);
}

// Whatever a request may still produce: most replies end by themselves.
TEST(SpeculationControllerTest, ACatchUpMustPayOffBeforeRepliesUsuallyEnd) {
  SpeculationController controller = Calibrated(Machine(0.1, 0.1));
  Settle(&controller, 1);
  const SpeculationRequest request = Request(1, 8, {600});
  EXPECT_GT(controller.Choose({&request, 1}, 100)[0].nodes, 1);
  for (int i = 0; i < 60; ++i) controller.ObserveReply(3);
  EXPECT_EQ(controller.Choose({&request, 1}, 100)[0].nodes, 1);
}

TEST(SpeculationControllerTest, TrialsAreRunsAndCostTheirShare) {
  const SimulatedMachine machine = Machine(0.1, 0.5);
  SpeculationController controller = Calibrated(machine);
  Watch(&controller, 0, 200, [](int) { return 0; });  // it is no good
  Settle(&controller, 1);
  const SpeculationRequest request = Request(1);
  std::vector<int> runs = {0};
  const int steps = 20000;
  int tried = 0;
  for (int step = 0; step < steps; ++step) {
    const SpeculationChoice choice = controller.Choose({&request, 1}, 400)[0];
    ASSERT_TRUE(choice.nodes == 1 || choice.trial);
    runs.back() += choice.trial;
    tried += choice.trial;
    const double plain = controller.step_costs().Usual(1), seconds = choice.trial ? 1.5 * plain : plain;
    controller.ObserveStep({.rows = 1, .requests = 1, .tokens = 1, .verify_seconds = plain, .seconds = seconds});
    if (!choice.trial && runs.back() > 0) runs.push_back(0);
  }
  ASSERT_GT(runs.size(), 5u);
  runs.pop_back();
  EXPECT_EQ(runs, std::vector<int>(runs.size(), 8));
  EXPECT_LT(0.5 * tried, 0.01 * 1.1 * steps);  // a trial loses at least its level
}

SpeculationLedger::Step PlainStep(double seconds) {
  return {.requests = 4, .tokens = 4, .seconds = seconds, .usual_seconds = 1};
}

SpeculationLedger::Step DraftedStep(double tokens, double seconds) {
  return {.requests = 4,
          .tokens = tokens,
          .drafted = true,
          .seconds = seconds,
          .draft_seconds = 0.1,
          .expected_seconds = seconds,
          .usual_seconds = 1};
}

// Where plain steps run ahead, one that does not is a loss, whether it had drafts or not.
TEST(SpeculationLedgerTest, StepsThatWaitForDraftsAreChargedForIt) {
  SpeculationLedger ledger;
  const auto book = [&](StepStart start, double seconds) {
    const double saved = ledger.saved();
    ledger.Book({.requests = 4, .start = start, .tokens = 4, .seconds = seconds, .usual_seconds = 2});
    return ledger.saved() - saved;
  };
  for (int i = 0; i < 8; ++i) EXPECT_EQ(book(StepStart::kAlone, 3), 0);
  EXPECT_EQ(ledger.SavedAhead(4, 2), 0);  // not known yet
  EXPECT_FALSE(ledger.Open(4, StepStart::kWaited));
  for (int i = 0; i < 8; ++i) EXPECT_EQ(book(StepStart::kAhead, 2), 0);
  EXPECT_NEAR(ledger.AheadSeconds(4, 2), 2, 1e-6);
  EXPECT_NEAR(ledger.SavedAhead(4, 2), 1, 1e-6);
  ASSERT_TRUE(ledger.Open(4, StepStart::kWaited));
  EXPECT_NEAR(book(StepStart::kWaited, 3), -1, 1e-6);
  for (int i = 0; i < 20; ++i) book(StepStart::kWaited, 3);
  EXPECT_FALSE(ledger.Open(4, StepStart::kWaited));
}

TEST(SpeculationLedgerTest, LossesEndWithWhatWasAllowedAndStepsEarnItAgain) {
  SpeculationLedger ledger;
  EXPECT_FALSE(ledger.Open(4));  // no price yet
  for (int i = 0; i < 8; ++i) ledger.Book(PlainStep(2));
  EXPECT_TRUE(ledger.Open(4));
  EXPECT_FALSE(ledger.Open(64));
  const double before = ledger.saved();
  while (ledger.Open(4)) ledger.Book(DraftedStep(4, 2.5));  // as many tokens in 2.5 s as plainly in 2
  const double lost = before - ledger.saved();
  EXPECT_GT(lost, 4);
  EXPECT_LT(lost, 10);  // of 16, five plain steps at most
  int steps = 0;
  for (; !ledger.Open(4); ++steps) ledger.Book(PlainStep(2));
  EXPECT_GT(steps, 30);
  EXPECT_LT(steps, 120);
}

TEST(SpeculationLedgerTest, GainsAreCreditedUpToALimit) {
  SpeculationLedger ledger;
  for (int i = 0; i < 8; ++i) ledger.Book(PlainStep(2));
  for (int i = 0; i < 100; ++i) {
    const SpeculationLedger::Booking booking = ledger.Book(DraftedStep(12, 3));
    EXPECT_NEAR(booking.worth, 6, 1e-9);
    EXPECT_NEAR(booking.cost, 3, 1e-9);
  }
  EXPECT_NEAR(ledger.saved(), 300, 1e-6);
  EXPECT_EQ(ledger.fill(), 1);
  int steps = 0;
  for (; ledger.Open(4); ++steps) ledger.Book(DraftedStep(4, 3));
  EXPECT_LT(steps, 20);  // eight plain steps of 2 s, a loss of 1 s each
}

TEST(SpeculationLedgerTest, APriceGrowsOld) {
  SpeculationLedger ledger;
  for (int i = 0; i < 8; ++i) ledger.Book(PlainStep(2));
  int steps = 0;
  for (; ledger.Open(4); ++steps) ledger.Book(DraftedStep(12, 3));
  EXPECT_GT(steps, 200);
  EXPECT_LT(steps, 600);
}

// A device reads prompts beside the step, which is longer for it.
TEST(SpeculationLedgerTest, PromptsAreNotChargedToDrafts) {
  SpeculationLedger ledger;
  for (int i = 0; i < 40; ++i) {
    SpeculationLedger::Step step = PlainStep(2 + 0.01 * (i % 3 * 50));
    step.prompt_tokens = i % 3 * 50;
    ledger.Book(step);
  }
  ledger.Book(DraftedStep(8, 3));
  SpeculationLedger::Step step = DraftedStep(8, 4);
  step.prompt_tokens = 100;
  const SpeculationLedger::Booking booking = ledger.Book(step);
  EXPECT_NEAR(booking.worth, 4, 1e-6);
  EXPECT_NEAR(booking.cost, 3, 1e-6);
}

TEST(CalibrationTest, BelievesTheDrafterUntilItKnowsBetter) {
  Calibration calibration;
  EXPECT_NEAR(calibration.Correct(0.7), 0.7, 1e-9);
  for (int i = 0; i < 400; ++i) calibration.Observe(0.7, i % 4 == 0);
  EXPECT_NEAR(calibration.Correct(0.7), 0.25, 0.05);
  EXPECT_NEAR(calibration.Correct(0.2), 0.2, 1e-9);
  EXPECT_LE(calibration.Correct(1.0), 1.0);
}

TEST(StepCostsTest, InterpolatesExtrapolatesAndLearns) {
  StepCosts costs;
  EXPECT_EQ(costs.Estimate(4, 1), 0);
  for (int rows = 1; rows <= 64; rows *= 2) costs.Calibrate(rows, 1.0 + 0.01 * rows);
  EXPECT_NEAR(costs.Estimate(1, 1), 1.01, 1e-9);
  EXPECT_NEAR(costs.Estimate(24, 1), 1.24, 1e-9);
  EXPECT_NEAR(costs.Estimate(200, 1), 3.0, 1e-9);
  for (int i = 0; i < 400; ++i) costs.Observe(24, 1, 2.0);
  EXPECT_NEAR(costs.Estimate(24, 1), 2.0, 0.05);
}

TEST(StepCostsTest, WhatIsNotMeasuredFollowsTheMachine) {
  StepCosts costs;
  for (int rows = 1; rows <= 64; rows *= 2) costs.Calibrate(rows, 1.0 + 0.1 * rows);
  costs.CalibratePerRequest(0.2);
  for (int i = 0; i < 300; ++i) costs.Observe(1, 1, 0.55);  // twice as fast as before
  EXPECT_NEAR(costs.Estimate(1, 1), 0.55, 5e-3);
  EXPECT_NEAR(costs.Estimate(8, 1), 0.9, 1e-2);
  EXPECT_NEAR(costs.Estimate(8, 3), 1.1, 1e-2);

  SpeculationController controller({false});
  for (int rows = 1; rows <= 64; rows *= 2) controller.step_costs().Calibrate(rows, 1.0);
  controller.draft_costs(0).Observe(1, 2, 0, 0.4);
  const SpeculationRequest request = Request(1);
  for (int i = 0; i < 300; ++i) {
    controller.Choose({&request, 1}, 0);
    controller.ObserveStep({.rows = 1, .requests = 1, .tokens = 1, .verify_seconds = 2, .seconds = 2});
  }
  EXPECT_NEAR(controller.draft_costs(0).Seconds(1, 2), 0.8, 2e-2);
}

// Two rows really cost 1.3 times one, not 1.05 times, and the machine slows down meanwhile: some plain steps tell.
TEST(StepCostsTest, PlainStepsInBetweenCorrectTheRatioWhileTheMachineChanges) {
  StepCosts costs;
  for (int rows = 1; rows <= 64; rows *= 2) costs.Calibrate(rows, 1.0 + 0.05 * (rows - 1));
  for (int i = 0; i < 600; ++i) {
    const double machine = std::exp(0.001 * i);
    const bool plain = i % 60 < 8;
    costs.Observe(plain ? 1 : 2, 1, machine * (plain ? 1.0 : 1.3));
  }
  EXPECT_NEAR(costs.Estimate(2, 1) / costs.Estimate(1, 1), 1.3, 0.03);
  EXPECT_NEAR(costs.Estimate(1, 1), std::exp(0.6), 0.1);
}

TEST(DraftCostsTest, KnowsTheFirstLevelFromTheFurtherOnes) {
  DraftCosts costs;
  EXPECT_FALSE(costs.Knows(1));
  costs.Observe(1, 4, 0, 1.3);
  for (int i = 0; i < 300; ++i) costs.Observe(1, i % 2 == 0 ? 4 : 1, 0, i % 2 == 0 ? 1.3 : 1.0);
  EXPECT_NEAR(costs.Seconds(1, 1), 1.0, 0.02);
  EXPECT_NEAR(costs.PerLevel(1), 0.1, 0.01);
  EXPECT_NEAR(costs.Seconds(4, 1), 4.0, 0.1);  // not measured: the worst
  costs.Observe(4, 1, 0, 1.5);
  EXPECT_NEAR(costs.Seconds(4, 4), 1.5 * 1.3, 0.1);
  costs.Observe(1, 1, 1000, 3.0);
  EXPECT_NEAR(costs.PerCatchUpToken(), 0.002, 1e-4);
}

}  // namespace
}  // namespace linspec
