// How prompts are cut into the passes of a GPU's prefill.
#include "models/cuda_capacity.h"

#include <gtest/gtest.h>

namespace linspec {
namespace {

TEST(PrefillPassSizeTest, TakesRowsUpToTheLimit) {
  PrefillPassSize size;
  EXPECT_EQ(size.Take(0, kPrefillRows + 5, 64), kPrefillRows);
  EXPECT_TRUE(size.full());
}

TEST(PrefillPassSizeTest, ManyShortPiecesFillTheGroupsBeforeTheRows) {
  PrefillPassSize size;
  for (int64_t i = 0; i < kPrefillGroups; ++i) {
    EXPECT_FALSE(size.full());
    EXPECT_EQ(size.Take(64 * i, 1, 64), 1);
  }
  EXPECT_TRUE(size.full());
}

TEST(PrefillPassSizeTest, APieceEndsWithTheLastGroupThatFits) {
  PrefillPassSize size;
  for (int64_t i = 0; i < kPrefillGroups - 2; ++i) size.Take(0, 1, 64);
  EXPECT_EQ(size.Take(50, 1000, 64), 14 + 64);  // the rest of a group, and one more
  EXPECT_TRUE(size.full());
}

TEST(PrefillPassSizeTest, APieceAcrossAGroupsEndTouchesTwo) {
  PrefillPassSize size;
  for (int64_t i = 0; i < kPrefillGroups - 2; ++i) size.Take(0, 1, 64);
  EXPECT_EQ(size.Take(63, 2, 64), 2);
  EXPECT_TRUE(size.full());
}

}  // namespace
}  // namespace linspec
