// One step for each CUDA graph that a server's steps need, and each of them a step that can be.
#include "models/cuda_warm_up.h"

#include <gtest/gtest.h>

#include <array>
#include <set>

#include "kernels/cuda/step_buckets.h"

namespace linspec {
namespace {

using Bucket = std::array<int, 3>;

Bucket BucketOf(int requests, int rows, int largest_tree) {
  return {cuda::PowerOfTwo(requests), cuda::RowBucket(rows), cuda::TreeBucket(largest_tree)};
}

// Of every step that there can be.
std::set<Bucket> AllBuckets(int max_requests, int max_rows, int max_nodes) {
  std::set<Bucket> buckets;
  for (int requests = 1; requests <= max_requests; ++requests) {
    for (int tree = 1; tree <= max_nodes; ++tree) {
      const int most = std::min(max_rows, requests * tree);
      for (int rows = requests - 1 + tree; rows <= most; ++rows) buckets.insert(BucketOf(requests, rows, tree));
    }
  }
  return buckets;
}

void ExpectEachOnce(int max_requests, int max_rows, int max_nodes) {
  std::set<Bucket> found;
  const std::vector<VerifySize> sizes = VerifyGraphSizes(max_requests, max_rows, max_nodes);
  for (const VerifySize& size : sizes) {
    EXPECT_LE(size.requests, max_requests);
    EXPECT_LE(size.rows, max_rows);
    EXPECT_LE(size.largest_tree, max_nodes);
    EXPECT_GE(size.rows, size.requests - 1 + size.largest_tree);
    EXPECT_LE(size.rows, size.requests * size.largest_tree);
    EXPECT_TRUE(found.insert(BucketOf(size.requests, size.rows, size.largest_tree)).second);
    EXPECT_LE(size.rows, sizes.front().rows) << "the largest comes first";
  }
  EXPECT_EQ(found, AllBuckets(max_requests, max_rows, max_nodes));
}

TEST(VerifyGraphSizesTest, EachGraphOfAServersStepsOnce) {
  ExpectEachOnce(1, 64, 16);
  ExpectEachOnce(4, 64, 64);
  ExpectEachOnce(64, 1024, 16);
  ExpectEachOnce(100, 300, 8);
}

TEST(VerifyGraphSizesTest, WithoutDraftsOneRowARequest) {
  for (const VerifySize& size : VerifyGraphSizes(1000, 1024, 1)) {
    EXPECT_EQ(size.rows, size.requests);
    EXPECT_EQ(size.largest_tree, 1);
  }
}

TEST(VerifyGraphSizesTest, NoMoreRowsThanGraphsServe) {
  for (const VerifySize& size : VerifyGraphSizes(2048, 4096, 16)) EXPECT_LE(size.rows, cuda::kMaxGraphRows);
}

}  // namespace
}  // namespace linspec
