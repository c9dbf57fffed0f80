#include "models/draft_vocabulary.h"

#include <algorithm>
#include <numeric>

#include "gtest/gtest.h"
#include "kernels/ops.h"

namespace linspec {
namespace {

constexpr int64_t kVocab = 8192;

std::vector<int32_t> BlocksFor(DraftVocabulary* vocabulary, const std::vector<int32_t>& tokens, float temperature) {
  SamplingParams sampling;
  sampling.temperature = temperature;
  const DraftContext context{
      .sequence_id = 1, .tokens = tokens, .num_prompt_tokens = 1, .sampling = &sampling, .hidden = {}, .max_nodes = 2};
  vocabulary->Add(context);
  const std::span<const int32_t> blocks = vocabulary->Blocks();
  return {blocks.begin(), blocks.end()};
}

std::vector<int32_t> HalfAnd(const std::vector<int32_t>& others) {
  std::vector<int32_t> blocks(kVocab / kOutputBlock / 2);
  std::iota(blocks.begin(), blocks.end(), 0);
  blocks.insert(blocks.end(), others.begin(), others.end());
  return blocks;
}

TEST(DraftVocabularyTest, TheFrequentHalfAndTheText) {
  DraftVocabulary vocabulary(kVocab);
  EXPECT_EQ(BlocksFor(&vocabulary, {8191, 3, 4096 + 17, 4096 + 16}, 0), HalfAnd({257, 511}));
  EXPECT_EQ(BlocksFor(&vocabulary, {8000}, 0), HalfAnd({257, 500, 511})) << "of all requests together";
  vocabulary.Clear();
  EXPECT_EQ(BlocksFor(&vocabulary, {5000}, 0), HalfAnd({312}));
}

TEST(DraftVocabularyTest, OfALongTextTheEnd) {
  std::vector<int32_t> tokens(600, 1);
  tokens.front() = 5000;
  tokens[100] = 6000;
  DraftVocabulary vocabulary(kVocab);
  EXPECT_EQ(BlocksFor(&vocabulary, tokens, 0), HalfAnd({375}));
}

TEST(DraftVocabularyTest, EverythingForSampledRequestsAndSmallVocabularies) {
  DraftVocabulary vocabulary(kVocab);
  EXPECT_FALSE(BlocksFor(&vocabulary, {1}, 0).empty());
  EXPECT_TRUE(BlocksFor(&vocabulary, {1}, 0.5f).empty());
  EXPECT_TRUE(BlocksFor(&vocabulary, {1}, 0).empty()) << "one of the requests is sampled";
  vocabulary.Clear();
  EXPECT_FALSE(BlocksFor(&vocabulary, {1}, 0).empty());
  DraftVocabulary small(4095);
  EXPECT_TRUE(BlocksFor(&small, {1}, 0).empty());
}

}  // namespace
}  // namespace linspec
