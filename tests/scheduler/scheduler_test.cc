#include "scheduler/scheduler.h"

#include "gtest/gtest.h"

namespace linspec {
namespace {

TEST(SchedulerTest, NothingToDoIsEmpty) { EXPECT_TRUE(Scheduler(8, 1).Plan({}).empty()); }

TEST(SchedulerTest, DecodesFirstThenPromptsInOrder) {
  const std::vector<SequenceView> views = {{.prefill_left = 10}, {}, {.prefill_left = 10}, {}};
  const StepPlan plan = Scheduler(16, 1).Plan(views);
  EXPECT_EQ(plan.decode, (std::vector<int>{1, 3}));
  ASSERT_EQ(plan.prefill.size(), 2u);
  EXPECT_EQ(plan.prefill[0].sequence, 0);
  EXPECT_EQ(plan.prefill[0].num_tokens, 10);
  EXPECT_EQ(plan.prefill[1].sequence, 2);
  EXPECT_EQ(plan.prefill[1].num_tokens, 4);
  EXPECT_EQ(plan.draft_rows, 0);
}

TEST(SchedulerTest, NeitherPromptsNorDraftsStarve) {
  const std::vector<SequenceView> views = {{}, {}, {.prefill_left = 1000}};
  StepPlan plan = Scheduler(64, 8).Plan(views);
  EXPECT_EQ(plan.draft_rows, 14);
  EXPECT_EQ(plan.prefill[0].num_tokens, 64 - 2 - 14);
  plan = Scheduler(64, 64).Plan(views);  // drafts get at most half
  EXPECT_EQ(plan.prefill[0].num_tokens, 64 - 2 - 32);
  plan = Scheduler(1, 8).Plan(views);  // a budget below the running streams still lets the prompt advance
  EXPECT_EQ(plan.decode.size(), 2u);
  EXPECT_EQ(plan.prefill[0].num_tokens, 1);
  EXPECT_EQ(plan.draft_rows, 0);
}

TEST(SchedulerTest, ScoredPromptsGoThroughVerifyInTreeSizedChunks) {
  const std::vector<SequenceView> views = {{.prefill_left = 100, .score_prompt = true}, {.prefill_left = 100}};
  const StepPlan plan = Scheduler(128, 1).Plan(views);
  ASSERT_EQ(plan.score.size(), 1u);
  EXPECT_EQ(plan.score[0].num_tokens, 64);
  ASSERT_EQ(plan.prefill.size(), 1u);
  EXPECT_EQ(plan.prefill[0].num_tokens, 64);
}

TEST(SchedulerTest, TenantsSharePromptTokens) {
  const std::vector<SequenceView> views = {{.prefill_left = 1000, .tenant = "a"},
                                           {.prefill_left = 1000, .tenant = "a"},
                                           {.prefill_left = 1000, .tenant = "b"},
                                           {.prefill_left = 10, .tenant = "c"},
                                           {.prefill_left = 10, .tenant = "c"}};
  StepPlan plan = Scheduler(90, 1).Plan(views);
  ASSERT_EQ(plan.prefill.size(), 4u);
  EXPECT_EQ(plan.prefill[0].num_tokens, 40);  // its third, and the ten that c has no use for
  EXPECT_EQ(plan.prefill[1].sequence, 2);
  EXPECT_EQ(plan.prefill[1].num_tokens, 30);
  EXPECT_EQ(plan.prefill[2].num_tokens, 10);
  EXPECT_EQ(plan.prefill[3].num_tokens, 10);

  plan = Scheduler(1, 1).Plan(views);  // everybody advances, in however small a budget
  ASSERT_EQ(plan.prefill.size(), 3u);
  for (const PromptChunk& chunk : plan.prefill) EXPECT_EQ(chunk.num_tokens, 1);
}

}  // namespace
}  // namespace linspec
