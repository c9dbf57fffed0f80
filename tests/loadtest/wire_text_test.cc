#include "loadtest/wire_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace linspec::loadtest {
namespace {

using ::testing::ElementsAre;

constexpr std::string_view kStream =
    "data: {\"a\":1}\n\n: a comment\nevent: x\r\ndata:two\r\ndata: lines\r\n\r\ndata: [DONE]\n\n";

TEST(SseParser, Events) {
  SseParser parser;
  EXPECT_THAT(parser.Push(kStream), ElementsAre("{\"a\":1}", "two\nlines", "[DONE]"));
}

TEST(SseParser, AnyChoppingGivesTheSameEvents) {
  for (size_t piece = 1; piece < kStream.size(); ++piece) {
    SseParser parser;
    std::vector<std::string> events;
    for (size_t at = 0; at < kStream.size(); at += piece) {
      for (std::string& event : parser.Push(kStream.substr(at, piece))) events.push_back(std::move(event));
    }
    EXPECT_THAT(events, ElementsAre("{\"a\":1}", "two\nlines", "[DONE]")) << "pieces of " << piece;
  }
}

TEST(SseParser, AnUnfinishedEventWaits) {
  SseParser parser;
  EXPECT_TRUE(parser.Push("data: x\n").empty());
  EXPECT_THAT(parser.Push("\n"), ElementsAre("x"));
}

TEST(ParseStreamEvent, TextsOfBothDialects) {
  StreamEvent event;
  ASSERT_TRUE(
      ParseStreamEvent(R"({"id":"text","choices":[{"index":0,"text":"a\n","logprobs":{"text":"no"}},{"text":""},)"
                       R"({"text":"b"}],"text":"no"})",
                       &event));
  EXPECT_THAT(event.texts, ElementsAre("a\n", "b"));
  ASSERT_TRUE(ParseStreamEvent(R"({"choices":[{"delta":{"role":"assistant","content":"c"},"finish_reason":null}],)"
                               R"("delta":{"content":"no"},"other":[{"delta":{"content":"no"}}]})",
                               &event));
  EXPECT_THAT(event.texts, ElementsAre("c"));
  EXPECT_FALSE(event.has_usage);
  EXPECT_FALSE(event.is_error);
}

TEST(ParseStreamEvent, UsageAndErrors) {
  StreamEvent event;
  ASSERT_TRUE(ParseStreamEvent(
      R"({"choices":[],"usage":{"completion_tokens":5,"prompt_tokens":3,"details":{"prompt_tokens":9}}})", &event));
  EXPECT_TRUE(event.has_usage && event.texts.empty());
  EXPECT_EQ(event.prompt_tokens, 3);
  EXPECT_EQ(event.completion_tokens, 5);
  ASSERT_TRUE(ParseStreamEvent(R"({"choices":[{"text":"x"}],"usage":null})", &event));
  EXPECT_FALSE(event.has_usage);
  ASSERT_TRUE(ParseStreamEvent(R"({"error":{"message":"no"}})", &event));
  EXPECT_TRUE(event.is_error);
  for (const std::string_view bad : {"", "[]", "1", "{", "{} x", "[{\"choices\":[{\"text\":\"x\"}]}]", "\"a\""}) {
    EXPECT_FALSE(ParseStreamEvent(bad, &event)) << bad;
  }
}

constexpr std::string_view kMetrics = R"(# HELP linspec_spec_decode_num_drafts_total drafts
linspec_spec_decode_num_drafts_total{model_name="a",drafter="draft"} 10
linspec_spec_decode_num_drafts_total{model_name="a",drafter="ngram"} 2
linspec_spec_decode_num_draft_tokens_total{model_name="a"} 48
linspec_spec_decode_num_accepted_tokens_total{model_name="a"} 1.8e1
linspec_spec_decode_num_accepted_tokens_per_pos_total{model_name="a",position="0"} 12
linspec_spec_decode_num_accepted_tokens_per_pos_total{model_name="a",position="1"} 6
linspec_spec_decode_num_accepted_tokens_per_pos_total{model_name="a",position="99999999"} 6
linspec_num_requests_running 3
)";

TEST(SpeculationCounters, SumsLabelsAndIgnoresTheRest) {
  const SpeculationCounters counters = ParseSpeculationCounters(kMetrics);
  EXPECT_TRUE(counters.found);
  EXPECT_EQ(counters.drafts, 12);
  EXPECT_EQ(counters.draft_tokens, 48);
  EXPECT_EQ(counters.accepted_tokens, 18);
  EXPECT_THAT(counters.accepted_per_position, ElementsAre(12, 6));
}

TEST(SpeculationCounters, ReadsVllmNamesToo) {
  EXPECT_EQ(ParseSpeculationCounters("vllm:spec_decode_num_drafts_total{engine=\"0\"} 4\n").drafts, 4);
}

TEST(SpeculationCounters, NoneFound) {
  EXPECT_FALSE(ParseSpeculationCounters("up 1\n{ nonsense\n").found);
  EXPECT_FALSE(ParseSpeculationCounters("").found);
}

TEST(SpeculationCounters, Difference) {
  SpeculationCounters before;
  before.drafts = 2;
  before.accepted_per_position = {10};
  const SpeculationCounters delta = ParseSpeculationCounters(kMetrics).Since(before);
  EXPECT_EQ(delta.drafts, 10);
  EXPECT_THAT(delta.accepted_per_position, ElementsAre(2, 6));
}

}  // namespace
}  // namespace linspec::loadtest
