#include "scheduler/speculation_controller.h"

#include <algorithm>
#include <functional>
#include <random>

#include "gtest/gtest.h"

namespace linspec {
namespace {

// A machine and a drafter with known truth; runs the controller's closed loop on simulated time.
struct World {
  double row_s = 0.1, base_s = 1, request_s = 0.02;  // verify: base + row * rows + request * requests, in ms below
  double level_s = 0.1, catch_up_s = 0.01;
  double acceptance = 0.7;

  double Verify(int rows, int requests) const { return 1e-3 * (base_s + row_s * rows + request_s * requests); }
};

struct Totals {
  double seconds = 0, tokens = 0;
  int drafts = 0;
  double rate() const { return tokens / seconds; }
};

SpeculationController Calibrated(const World& world) {
  SpeculationController controller(std::vector<bool>{false});
  for (int rows = 1; rows <= 64; rows *= 2) controller.step_costs().Calibrate(rows, world.Verify(rows, 1));
  controller.step_costs().CalibratePerRequest(1e-3 * world.request_s);
  controller.draft_costs(0).Observe(1, 4, 1, 4e-3 * world.level_s);
  controller.draft_costs(0).Observe(1, 4, 1000, 1e-3 * (4 * world.level_s + 1000 * world.catch_up_s));
  return controller;
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

// sure: the drafter states 90 %, else 50 %, whatever the truth is.
Totals Simulate(const World& world, int batch, int steps, SpeculationController* controller, bool sure = true) {
  std::minstd_rand random(5);
  std::uniform_real_distribution<double> uniform;
  std::vector<int64_t> unseen(batch, 100);
  Totals totals;
  for (int s = 0; s < steps; ++s) {
    std::vector<SpeculationRequest> requests;
    for (int r = 0; r < batch; ++r) {
      requests.push_back({.sequence_id = r + 1ull,
                          .max_nodes = 8,
                          .drafter = kAnyDrafter,
                          .catch_up_tokens = {unseen[r]},
                          .tokens_left = 1000});
    }
    const std::vector<SpeculationChoice> choices = controller->Choose(requests, 400);
    std::vector<DraftTree> trees(batch, DraftTree::Root(0));
    std::vector<SpeculationProposal> proposals;
    int levels = 0;
    int64_t catch_up = 0;
    for (int r = 0; r < batch; ++r) {
      if (choices[r].nodes <= 1) continue;
      trees[r] = Chain(choices[r].nodes, sure ? 0.9f : 0.5f);
      levels = std::max(levels, choices[r].nodes - 1);
      catch_up += unseen[r];
      unseen[r] = 0;
      proposals.push_back({requests[r].sequence_id, 0, choices[r].probe, &trees[r]});
      controller->Learn(proposals.back());
    }
    const double draft = 1e-3 * (world.level_s * levels + world.catch_up_s * catch_up);
    controller->Prune(proposals, batch, draft);
    if (levels > 0) {
      controller->draft_costs(0).Observe(static_cast<int>(proposals.size()), levels, catch_up, draft);
    }
    int rows = 0;
    for (int r = 0; r < batch; ++r) {
      const int nodes = trees[r].num_nodes();
      rows += nodes;
      int accepted = 0;
      while (accepted < nodes - 1 && uniform(random) < world.acceptance) ++accepted;
      totals.tokens += accepted + 1;
      totals.drafts += nodes > 1;
      unseen[r] += accepted + 1;
      if (nodes == 1) continue;
      const std::vector<int32_t> path = Path(accepted);
      controller->Observe({requests[r].sequence_id, 0, &trees[r], path, true});
    }
    const double verify = world.Verify(rows, batch);
    controller->ObserveStep(rows, batch, verify);
    totals.seconds += draft + verify;
  }
  return totals;
}

double PlainRate(const World& world, int batch) { return batch / world.Verify(batch, batch); }

TEST(SpeculationControllerTest, NeverMuchSlowerThanPlainAndFasterWhereItPays) {
  for (const double acceptance : {0.0, 0.3, 0.6, 0.9}) {
    for (const double row_s : {0.0, 0.1, 1.0}) {
      for (const double level_s : {0.01, 0.2, 2.0}) {
        for (const int batch : {1, 8}) {
          World world;
          world.acceptance = acceptance;
          world.row_s = row_s;
          world.level_s = level_s;
          SpeculationController controller = Calibrated(world);
          const Totals totals = Simulate(world, batch, 1500, &controller);
          EXPECT_GT(totals.rate(), 0.96 * PlainRate(world, batch))
              << "acceptance " << acceptance << " row " << row_s << " level " << level_s << " batch " << batch;
        }
      }
    }
  }
}

TEST(SpeculationControllerTest, FreeRowsAndAGoodDrafterGiveTheFullGain) {
  World world;
  world.acceptance = 0.8;
  world.row_s = 0.01;
  world.level_s = 0.02;
  SpeculationController controller = Calibrated(world);
  EXPECT_GT(Simulate(world, 1, 2000, &controller).rate(), 3 * PlainRate(world, 1));
}

TEST(SpeculationControllerTest, ExpensiveRowsTurnItOffAtLargeBatch) {
  World world;  // one row costs as much as a step: a draft can never pay
  world.row_s = 1.0;
  world.base_s = 0.1;
  SpeculationController controller = Calibrated(world);
  const Totals totals = Simulate(world, 16, 2000, &controller);
  EXPECT_LT(totals.drafts, 2000);  // of 32,000 chances: probes only
}

TEST(SpeculationControllerTest, NoticesThatADrafterBecameGood) {
  World world;
  world.acceptance = 0.0;
  SpeculationController controller = Calibrated(world);
  Simulate(world, 2, 3000, &controller);
  world.acceptance = 0.95;
  Simulate(world, 2, 6000, &controller);
  EXPECT_GT(Simulate(world, 2, 1000, &controller).rate(), 1.3 * PlainRate(world, 2));
}

TEST(SpeculationControllerTest, RespectsRowBudgetModesAndLimits) {
  World world;
  world.row_s = 0;
  SpeculationController controller = Calibrated(world);
  std::vector<SpeculationRequest> requests;
  for (int r = 0; r < 4; ++r) {
    requests.push_back({.sequence_id = r + 1ull,
                        .max_nodes = r == 0 ? 1 : 8,
                        .drafter = kAnyDrafter,
                        .catch_up_tokens = {3},
                        .tokens_left = 100});
  }
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
}

TEST(SpeculationControllerTest, NodesGoToTheRequestThatAcceptsThem) {
  World world;
  world.row_s = 0.15;
  world.base_s = 0.5;
  SpeculationController controller = Calibrated(world);
  const DraftTree drafted = Chain(5, 0.7f);
  const std::vector<int32_t> all = Path(4), none = Path(0);
  for (int i = 0; i < 60; ++i) {
    controller.Observe({1, 0, &drafted, all, true});
    controller.Observe({2, 0, &drafted, none, true});
  }
  std::vector<DraftTree> trees = {Chain(8, 0.7f), Chain(8, 0.7f)};
  const std::vector<SpeculationProposal> proposals = {{1, 0, false, &trees[0]}, {2, 0, false, &trees[1]}};
  controller.Prune(proposals, 2, 0);
  EXPECT_GT(trees[0].num_nodes(), 4);
  EXPECT_LE(trees[1].num_nodes(), 2);
}

TEST(SpeculationControllerTest, PruningKeepsTheLikeliestPathsOfATree) {
  World world;
  world.row_s = 0.3;
  SpeculationController controller = Calibrated(world);
  DraftTree tree = DraftTree::Root(5);
  const int likely = tree.Add(1, 0), unlikely = tree.Add(2, 0), below = tree.Add(3, likely);
  tree.Add(4, unlikely);
  tree.probabilities = {1.0f, 0.8f, 0.15f, 0.7f, 0.1f};
  const SpeculationProposal proposal{1, 0, false, &tree};
  EXPECT_NEAR(controller.ExpectedTokens(proposal, 0), 0.8 + 0.15 + 0.7 + 0.1, 1e-6);
  EXPECT_NEAR(controller.ExpectedTokens(proposal, 0.5f), 1.5, 1e-6);
  controller.Prune({&proposal, 1}, 1, 0);
  EXPECT_EQ(tree.tokens, (std::vector<int32_t>{5, 1, 3}));
  EXPECT_EQ(tree.parents, (std::vector<int32_t>{-1, 0, 1}));
  EXPECT_EQ(tree.probabilities, (std::vector<float>{1.0f, 0.8f, 0.7f}));
  EXPECT_EQ(below, 3);
}

TEST(SpeculationControllerTest, ProbesAndIndependentDrawsStayWhole) {
  World world;
  world.row_s = 100;
  SpeculationController controller = Calibrated(world);
  for (const bool probe : {false, true}) {
    DraftTree tree = Chain(4, 0.2f);
    if (!probe) tree.distributions.resize(4);
    const SpeculationProposal proposal{1, 0, probe, &tree};
    controller.Prune({&proposal, 1}, 1, 0);
    EXPECT_EQ(tree.num_nodes(), 4);
  }
}

TEST(CalibrationTest, BelievesTheDrafterUntilItKnowsBetter) {
  Calibration calibration;
  EXPECT_NEAR(calibration.Correct(0.7), 0.7, 1e-9);
  for (int i = 0; i < 400; ++i) calibration.Observe(0.7, i % 4 == 0);
  EXPECT_NEAR(calibration.Correct(0.7), 0.25, 0.05);
  EXPECT_NEAR(calibration.Correct(0.2), 0.2, 1e-9);
  EXPECT_LE(calibration.Correct(1.0), 1.0);
}

// Tells the controller of drafts of which `accepted` of four tokens held.
void Watch(SpeculationController* controller, int drafter, int times, const std::function<int(int)>& accepted) {
  for (int i = 0; i < times; ++i) {
    DraftTree tree = Chain(5, 0.7f);
    controller->Learn({1, drafter, false, &tree});
    const std::vector<int32_t> path = Path(accepted(i));
    controller->Observe({1, drafter, &tree, path, true});
  }
}

TEST(SpeculationControllerTest, PicksTheBetterDrafter) {
  SpeculationController controller({false, false});
  for (int rows = 1; rows <= 64; rows *= 2) controller.step_costs().Calibrate(rows, 1e-3 + 1e-5 * rows);
  controller.draft_costs(0).Observe(1, 4, 1, 1e-3);
  controller.draft_costs(1).Observe(1, 4, 1, 1e-4);
  Watch(&controller, 0, 200, [](int) { return 3; });
  Watch(&controller, 1, 200, [](int i) { return i * 0; });
  const SpeculationRequest request{
      .sequence_id = 1, .max_nodes = 8, .drafter = kAnyDrafter, .catch_up_tokens = {3, 3}, .tokens_left = 100};
  EXPECT_EQ(controller.Choose({&request, 1}, 100)[0].drafter, 0);
  Watch(&controller, 0, 400, [](int) { return 0; });
  Watch(&controller, 1, 400, [](int i) { return i % 2 * 2; });
  EXPECT_EQ(controller.Choose({&request, 1}, 100)[0].drafter, 1);
}

TEST(SpeculationControllerTest, ADrafterThatCostsNothingIsNoChoiceWhileThereIsAnother) {
  SpeculationController controller({true, false});
  for (int rows = 1; rows <= 64; rows *= 2) controller.step_costs().Calibrate(rows, 1e-3 + 1e-5 * rows);
  const SpeculationRequest request{
      .sequence_id = 1, .max_nodes = 8, .drafter = kAnyDrafter, .catch_up_tokens = {3, 3}, .tokens_left = 100};
  EXPECT_EQ(controller.Choose({&request, 1}, 100)[0].drafter, 1);
  SpeculationController alone(std::vector<bool>{true});
  for (int rows = 1; rows <= 64; rows *= 2) alone.step_costs().Calibrate(rows, 1e-3 + 1e-5 * rows);
  const SpeculationRequest only{
      .sequence_id = 1, .max_nodes = 8, .drafter = kAnyDrafter, .catch_up_tokens = {3}, .tokens_left = 100};
  EXPECT_EQ(alone.Choose({&only, 1}, 100)[0].drafter, 0);
  EXPECT_GT(alone.Choose({&only, 1}, 100)[0].nodes, 1);
}

TEST(SpeculationControllerTest, ALongCatchUpMustPayOff) {
  World world;
  world.acceptance = 0.5;
  world.catch_up_s = 0.1;
  SpeculationController controller = Calibrated(world);
  SpeculationRequest request{
      .sequence_id = 1, .max_nodes = 8, .drafter = kAnyDrafter, .catch_up_tokens = {4}, .tokens_left = 1000};
  EXPECT_GT(controller.Choose({&request, 1}, 100)[0].nodes, 1);
  request.catch_up_tokens = {20000};
  EXPECT_EQ(controller.Choose({&request, 1}, 100)[0].nodes, 1);
}

TEST(StepCostsTest, InterpolatesExtrapolatesAndLearns) {
  StepCosts costs;
  EXPECT_EQ(costs.Estimate(4, 1), 0);
  for (int rows = 1; rows <= 64; rows *= 2) costs.Calibrate(rows, 1.0 + 0.01 * rows);
  EXPECT_NEAR(costs.Estimate(1, 1), 1.01, 1e-9);
  EXPECT_NEAR(costs.Estimate(24, 1), 1.24, 1e-9);
  EXPECT_NEAR(costs.Estimate(200, 1), 3.0, 1e-9);
  for (int i = 0; i < 200; ++i) costs.Observe(24, 1, 2.0);
  EXPECT_NEAR(costs.Estimate(24, 1), 2.0, 0.4);
  for (int i = 0; i < 200; ++i) costs.Observe(512, 1, 9.0);
  EXPECT_NEAR(costs.Estimate(512, 1), 9.0, 0.1);
}

TEST(StepCostsTest, WhatIsNotMeasuredFollowsTheMachine) {
  StepCosts costs;
  for (int rows = 1; rows <= 64; rows *= 2) costs.Calibrate(rows, 1.0 + 0.1 * rows);
  costs.CalibratePerRequest(0.2);
  for (int i = 0; i < 300; ++i) costs.Observe(1, 1, 0.55);  // twice as fast as before
  EXPECT_NEAR(costs.Estimate(1, 1), 0.55, 1e-3);
  EXPECT_NEAR(costs.Estimate(8, 1), 0.9, 1e-2);
  EXPECT_NEAR(costs.Estimate(8, 3), 1.1, 1e-2);

  SpeculationController controller({false});
  for (int rows = 1; rows <= 64; rows *= 2) controller.step_costs().Calibrate(rows, 1.0);
  controller.draft_costs(0).Observe(1, 2, 0, 0.4);
  for (int i = 0; i < 300; ++i) controller.ObserveStep(1, 1, 2.0);
  EXPECT_NEAR(controller.draft_costs(0).PerLevel(1), 0.4, 1e-2);
}

TEST(SpeculationControllerTest, ADrafterIsTriedForSomeStepsInARow) {
  World world;
  world.row_s = 10;  // far too expensive to be used
  SpeculationController controller = Calibrated(world);
  const SpeculationRequest request{
      .sequence_id = 1, .max_nodes = 8, .drafter = kAnyDrafter, .catch_up_tokens = {0}, .tokens_left = 1000};
  std::vector<int> runs = {0};
  for (int step = 0; step < 20000; ++step) {
    const bool probe = controller.Choose({&request, 1}, 400)[0].probe;
    if (probe) ++runs.back();
    if (!probe && runs.back() > 0) runs.push_back(0);
  }
  ASSERT_GT(runs.size(), 3u);
  runs.pop_back();
  EXPECT_EQ(runs, std::vector<int>(runs.size(), 3));
}

}  // namespace
}  // namespace linspec
