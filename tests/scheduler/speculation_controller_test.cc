#include "scheduler/speculation_controller.h"

#include <algorithm>
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
  SpeculationController controller(1);
  for (int rows = 1; rows <= 64; rows *= 2) controller.step_costs().Calibrate(rows, world.Verify(rows, 1));
  controller.step_costs().CalibratePerRequest(1e-3 * world.request_s);
  controller.draft_costs(0).Observe(1, 4, 1, 4e-3 * world.level_s);
  controller.draft_costs(0).Observe(1, 4, 1000, 1e-3 * (4 * world.level_s + 1000 * world.catch_up_s));
  return controller;
}

Totals Simulate(const World& world, int batch, int steps, SpeculationController* controller, bool speculate = true) {
  std::minstd_rand random(5);
  std::uniform_real_distribution<double> uniform;
  std::vector<int64_t> unseen(batch, 100);
  Totals totals;
  for (int s = 0; s < steps; ++s) {
    std::vector<SpeculationRequest> requests;
    for (int r = 0; r < batch; ++r) {
      requests.push_back({.sequence_id = r + 1ull,
                          .max_nodes = speculate ? 8 : 1,
                          .drafter = kAnyDrafter,
                          .catch_up_tokens = {unseen[r]},
                          .tokens_left = 1000});
    }
    const std::vector<SpeculationChoice> choices = controller->Choose(requests, 400);
    int rows = batch, levels = 0, contexts = 0;
    int64_t catch_up = 0;
    for (int r = 0; r < batch; ++r) {
      const int nodes = choices[r].nodes;
      rows += nodes - 1;
      int accepted = 0;
      while (accepted < nodes - 1 && uniform(random) < world.acceptance) ++accepted;
      totals.tokens += accepted + 1;
      unseen[r] += accepted + 1;
      if (nodes == 1) continue;
      ++contexts;
      levels = std::max(levels, nodes - 1);
      catch_up += unseen[r];
      unseen[r] = 0;
      controller->Observe({requests[r].sequence_id, 0, nodes, nodes, nodes - 1, accepted, true});
    }
    totals.drafts += contexts;
    const double draft = 1e-3 * (world.level_s * levels * (contexts > 0) + world.catch_up_s * catch_up);
    const double verify = world.Verify(rows, batch);
    if (contexts > 0) controller->draft_costs(0).Observe(contexts, levels, catch_up, draft);
    controller->step_costs().Observe(rows, batch, verify);
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
          EXPECT_GT(totals.rate(), 0.97 * PlainRate(world, batch))
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
  for (int i = 0; i < 60; ++i) {
    controller.Observe({1, 0, 5, 5, 4, 4, true});
    controller.Observe({2, 0, 5, 5, 4, 0, true});
  }
  const std::vector<SpeculationRequest> requests = {
      {.sequence_id = 1, .max_nodes = 8, .drafter = 0, .catch_up_tokens = {3}, .tokens_left = 100},
      {.sequence_id = 2, .max_nodes = 8, .drafter = 0, .catch_up_tokens = {3}, .tokens_left = 100}};
  const std::vector<SpeculationChoice> choices = controller.Choose(requests, 100);
  EXPECT_GT(choices[0].nodes, 4);
  EXPECT_LE(choices[1].nodes, 2);
}

TEST(SpeculationControllerTest, PicksTheBetterDrafter) {
  SpeculationController controller(2);
  for (int rows = 1; rows <= 64; rows *= 2) controller.step_costs().Calibrate(rows, 1e-3 + 1e-5 * rows);
  controller.draft_costs(0).Observe(1, 4, 1, 1e-3);
  controller.draft_costs(1).Observe(1, 4, 1, 1e-4);
  for (int i = 0; i < 200; ++i) {
    controller.Observe({1, 0, 5, 5, 4, 3, true});
    controller.Observe({1, 1, 5, 5, 4, i % 2, true});
  }
  const SpeculationRequest request{
      .sequence_id = 1, .max_nodes = 8, .drafter = kAnyDrafter, .catch_up_tokens = {3, 3}, .tokens_left = 100};
  EXPECT_EQ(controller.Choose({&request, 1}, 100)[0].drafter, 0);
  for (int i = 0; i < 400; ++i) controller.Observe({1, 0, 5, 5, 4, 0, true});
  EXPECT_EQ(controller.Choose({&request, 1}, 100)[0].drafter, 1);
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

}  // namespace
}  // namespace linspec
