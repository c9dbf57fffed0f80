#include "models/ngram_drafter.h"

#include "gtest/gtest.h"

namespace linspec {
namespace {

DraftTree Propose(NgramDrafter* drafter, const std::vector<int32_t>& tokens, int max_nodes, uint64_t id = 1) {
  const SamplingParams params;
  const DraftContext context{.sequence_id = id,
                             .tokens = tokens,
                             .num_prompt_tokens = 1,
                             .sampling = &params,
                             .hidden = {},
                             .max_nodes = max_nodes};
  auto trees = drafter->Propose({&context, 1});
  EXPECT_TRUE(trees.ok());
  EXPECT_EQ(trees->size(), 1u);
  EXPECT_TRUE((*trees)[0].Validate(1000).ok());
  EXPECT_LE((*trees)[0].num_nodes(), std::max(max_nodes, 1));
  return (*trees)[0];
}

TEST(NgramDrafterTest, ContinuesTheLatestLongestMatch) {
  NgramDrafter drafter;
  // "2 3" occurs twice; after "1 2 3" came 4 5, which the longer match prefers over the later "9 2 3 -> 7".
  const DraftTree tree = Propose(&drafter, {1, 2, 3, 4, 5, 9, 2, 3, 7, 8, 1, 2, 3}, 3);
  EXPECT_EQ(tree.tokens, (std::vector<int32_t>{3, 4, 5}));
  EXPECT_EQ(tree.parents, (std::vector<int32_t>{-1, 0, 1}));
}

TEST(NgramDrafterTest, BranchesWhereTwoContinuationsDiffer) {
  NgramDrafter drafter;
  const DraftTree tree = Propose(&drafter, {1, 2, 5, 6, 1, 2, 7, 8, 1, 2}, 9);
  ASSERT_GE(tree.num_nodes(), 4);
  EXPECT_GE(tree.FindChild(0, 7), 1);
  EXPECT_GE(tree.FindChild(0, 5), 1);
}

TEST(NgramDrafterTest, RepetitionGoesOn) {
  NgramDrafter drafter;
  const DraftTree tree = Propose(&drafter, {4, 1, 2, 1, 2}, 6);
  EXPECT_EQ(tree.tokens, (std::vector<int32_t>{2, 1, 2, 1, 2, 1}));
}

TEST(NgramDrafterTest, NothingToSayIsAOneNodeTree) {
  NgramDrafter drafter;
  EXPECT_EQ(Propose(&drafter, {1}, 8).num_nodes(), 1);
  EXPECT_EQ(Propose(&drafter, {1, 2, 3, 4}, 8).num_nodes(), 1);
  EXPECT_EQ(Propose(&drafter, {1, 2, 1, 2, 1, 2}, 1, 2).num_nodes(), 1);
}

TEST(NgramDrafterTest, IncrementalEqualsFresh) {
  NgramDrafter incremental;
  std::vector<int32_t> tokens;
  for (int i = 0; i < 400; ++i) {
    tokens.push_back((i * i / 3 + i) % 7);
    if (i % 5 != 0) continue;
    NgramDrafter fresh;
    const DraftTree a = Propose(&incremental, tokens, 8), b = Propose(&fresh, tokens, 8);
    EXPECT_EQ(a.tokens, b.tokens);
    EXPECT_EQ(a.parents, b.parents);
  }
}

TEST(NgramDrafterTest, LongTextsStayBounded) {
  NgramDrafter drafter;
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < 1000000; ++i) tokens.push_back(static_cast<int32_t>(i * 2654435761 % 997));
  tokens.insert(tokens.end(), {5, 6, 7, 8, 1, 5, 6});
  EXPECT_EQ(Propose(&drafter, tokens, 3).tokens, (std::vector<int32_t>{6, 7, 8}));
  EXPECT_LT(drafter.bytes_per_request(), 1 << 20);
}

TEST(NgramDrafterTest, ForgetFreesAndSequencesAreApart) {
  NgramDrafter drafter;
  Propose(&drafter, {1, 2, 3, 1, 2}, 4, 1);
  EXPECT_EQ(Propose(&drafter, {9, 1, 2}, 4, 2).num_nodes(), 1);
  EXPECT_EQ(drafter.num_sequences(), 2u);
  drafter.Forget(1);
  drafter.Forget(2);
  drafter.Forget(3);
  EXPECT_EQ(drafter.num_sequences(), 0u);
}

}  // namespace
}  // namespace linspec
