// What steps with drafts that run ahead take beside those that wait.
#include "gtest/gtest.h"
#include "scheduler/speculation_costs.h"

namespace linspec {
namespace {

TEST(AheadCostsTest, NothingIsSavedWhereNothingWasSeen) {
  const AheadCosts costs;
  for (const int requests : {1, 7, 4000}) {
    EXPECT_EQ(costs.Ratio(requests), 1);
    EXPECT_EQ(costs.Factor(requests), 1);
    EXPECT_EQ(costs.Saved(requests), 0);
  }
}

TEST(AheadCostsTest, ARunIsRatedByAllOfItsSteps) {
  AheadCosts costs;
  for (int step = 0; step < 80; ++step) costs.Observe(4, step % 8 != 0, 0.8, 1);
  EXPECT_NEAR(costs.Ratio(4), 0.8, 1e-9);
  EXPECT_NEAR(costs.Saved(4), 0.2, 1e-9);
  EXPECT_NEAR(costs.Factor(4), 1 - 7.0 / 8 * 0.2, 0.02);
  EXPECT_EQ(costs.Factor(16), 1);  // which are steps of their own
}

TEST(AheadCostsTest, StepsThatOnlyWaitedSaveNothing) {
  AheadCosts costs;
  costs.Observe(1, true, 0.5, 1);
  for (int step = 0; step < 200; ++step) costs.Observe(1, false, 3, 1);
  EXPECT_NEAR(costs.Factor(1), 1, 0.01);
  EXPECT_NEAR(costs.Ratio(1), 0.5, 1e-9);
}

TEST(AheadCostsTest, AnInterruptionCountsForLittle) {
  AheadCosts costs;
  for (int step = 0; step < 100; ++step) costs.Observe(1, true, 0.8, 1);
  costs.Observe(1, true, 50, 1);
  EXPECT_LT(costs.Ratio(1), 0.85);
  costs.Observe(1, true, 1, 0);  // no estimate to hold it against
  EXPECT_LT(costs.Ratio(1), 0.85);
}

}  // namespace
}  // namespace linspec
