#include "models/draft_tree.h"

#include "models/model.h"
#include "tests/models/model_test_util.h"

namespace linspec {
namespace {

using ::absl::StatusCode;

TEST(DraftTreeTest, DepthsAndChildren) {
  DraftTree tree = DraftTree::Root(5);
  const int a = tree.Add(6, 0), b = tree.Add(7, 0), c = tree.Add(6, b);
  EXPECT_EQ(tree.Depths(), (std::vector<int>{0, 1, 1, 2}));
  EXPECT_EQ(tree.FindChild(0, 6), a);
  EXPECT_EQ(tree.FindChild(0, 7), b);
  EXPECT_EQ(tree.FindChild(b, 6), c);
  EXPECT_EQ(tree.FindChild(a, 6), -1);
  EXPECT_EQ(tree.FindChild(0, 5), -1) << "a node is not its own child";
  EXPECT_TRUE(tree.Validate(8).ok());
}

TEST(DraftTreeTest, ValidateNamesWhatIsWrong) {
  const auto error = [](const DraftTree& tree, const char* part) {
    ExpectError(tree.Validate(100), StatusCode::kInvalidArgument, part);
  };
  error(DraftTree{}, "0 nodes");
  error(DraftTree{{1, 2}, {-1}}, "2 tokens but 1 parents");
  error(DraftTree{{1}, {0}}, "node 0 has parent 0");
  error(DraftTree{{1, 2}, {-1, -1}}, "node 1 has parent -1");
  error(DraftTree{{1, 2}, {-1, 1}}, "node 1 has parent 1");
  error(DraftTree{{1, 2, 3}, {-1, 2, 0}}, "node 1 has parent 2");
  error(DraftTree{{1, 100}, {-1, 0}}, "token 100");
  error(DraftTree{{-1}, {-1}}, "token -1");
  DraftTree tree = DraftTree::Root(0);
  while (tree.num_nodes() < kMaxTreeNodes) tree.Add(1, tree.num_nodes() - 1);
  EXPECT_TRUE(tree.Validate(100).ok());
  tree.Add(1, 0);
  error(tree, "65 nodes");
  error(DraftTree{{1, 2}, {-1, 0}, {1.0f}}, "2 tokens but 1 probabilities");
  error(DraftTree{{1, 2}, {-1, 0}, {0.5f, 0.6f}}, "node 1 has probability 0.6, its parent 0.5");
  error(DraftTree{{1, 2}, {-1, 0}, {1.0f, NAN}}, "node 1 has probability nan");
  EXPECT_TRUE((DraftTree{{1, 2}, {-1, 0}, {1.0f, 0.2f}}.Validate(100).ok()));
}

TEST(DraftTreeTest, KeepCarriesEverythingAlong) {
  DraftTree tree{{5, 6, 7, 8}, {-1, 0, 0, 2}, {1.0f, 0.5f, 0.4f, 0.3f}};
  tree.distributions = {{}, {{6, 1.0f}}, {{7, 0.25f}, {9, 0.75f}}, {{8, 1.0f}}};
  const DraftTree kept = tree.Keep({true, false, true, true});
  EXPECT_EQ(kept.tokens, (std::vector<int32_t>{5, 7, 8}));
  EXPECT_EQ(kept.parents, (std::vector<int32_t>{-1, 0, 1}));
  EXPECT_EQ(kept.probabilities, (std::vector<float>{1.0f, 0.4f, 0.3f}));
  ASSERT_EQ(kept.distributions.size(), 3u);
  EXPECT_EQ(kept.distributions[1].size(), 2u);
  const DraftTree cut = tree.CutBelow(1);
  EXPECT_EQ(cut.tokens, (std::vector<int32_t>{5, 6, 7}));
  EXPECT_EQ(cut.distributions.size(), 3u);
}

TEST(DraftTreeTest, BatchIsRagged) {
  VerifyBatch batch;
  DraftTree tree = DraftTree::Root(3);
  tree.Add(4, 0);
  batch.Add(2, tree);
  batch.Add(7, DraftTree::Root(9));
  EXPECT_EQ(batch.num_requests(), 2);
  EXPECT_EQ(batch.num_rows(), 3);
  EXPECT_EQ(batch.tokens, (std::vector<int32_t>{3, 4, 9}));
  EXPECT_EQ(batch.parents, (std::vector<int32_t>{-1, 0, -1}));
  EXPECT_EQ(batch.row_starts, (std::vector<int32_t>{0, 2, 3}));
  EXPECT_EQ(batch.slots, (std::vector<int32_t>{2, 7}));
}

TEST(DraftTreeTest, CutBelowKeepsWhatIsShallowEnough) {
  DraftTree tree = DraftTree::Root(1);
  const int a = tree.Add(2, 0), b = tree.Add(3, a);
  tree.Add(4, b);
  const int c = tree.Add(5, 0);
  tree.Add(6, c);
  const DraftTree cut = tree.CutBelow(1);
  EXPECT_EQ(cut.tokens, (std::vector<int32_t>{1, 2, 5}));
  EXPECT_EQ(cut.parents, (std::vector<int32_t>{-1, 0, 0}));
  EXPECT_EQ(tree.CutBelow(0).num_nodes(), 1);
  EXPECT_EQ(tree.CutBelow(9).tokens, tree.tokens);
}

}  // namespace
}  // namespace linspec
