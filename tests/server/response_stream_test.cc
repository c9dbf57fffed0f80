#include "server/response_stream.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace linspec {
namespace {

// Token i is the i-th piece; what a model emits, byte for byte.
class PieceTokenizer : public Tokenizer {
 public:
  explicit PieceTokenizer(std::vector<std::string> pieces) : pieces_(std::move(pieces)) {}
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view, EncodeOptions) const override {
    return std::vector<int32_t>{};
  }
  absl::StatusOr<std::string> Decode(std::span<const int32_t> ids, bool) const override {
    std::string text;
    for (const int32_t id : ids) text += pieces_[id];
    return text;
  }
  int64_t vocab_size() const override { return static_cast<int64_t>(pieces_.size()); }
  int32_t TokenToId(std::string_view) const override { return -1; }
  std::string IdToToken(int32_t id) const override { return pieces_[id]; }
  std::string TokenBytes(int32_t id) const override { return pieces_[id]; }
  bool IsSpecial(int32_t) const override { return false; }
  int leading_spaces_to_strip() const override { return 0; }

 private:
  std::vector<std::string> pieces_;
};

RequestOutput Output(std::vector<int32_t> ids, FinishReason reason = FinishReason::kNone) {
  RequestOutput output;
  for (const int32_t id : ids) {
    output.tokens.emplace_back();
    output.tokens.back().token = id;
  }
  output.finish_reason = reason;
  return output;
}

struct Result {
  std::string text;
  std::vector<int32_t> tokens, beyond_text;
  StreamDelta last;
  bool accepted = true;
};

// Each piece one token, one output, one Take.
Result Play(const std::vector<std::string>& pieces, ResponseStreamOptions options) {
  const PieceTokenizer tokenizer(pieces);
  auto stream = ResponseStream::Create(&tokenizer, std::move(options));
  OutputSink sink = stream->MakeSink();
  Result result;
  for (size_t i = 0; i <= pieces.size() && !stream->finished(); ++i) {
    result.accepted =
        i < pieces.size() ? sink(Output({static_cast<int32_t>(i)})) : sink(Output({}, FinishReason::kLength));
    StreamDelta delta = stream->Take();
    result.text += delta.text;
    for (const OutputToken& token : delta.tokens) {
      (token.beyond_text ? result.beyond_text : result.tokens).push_back(token.sampled.token);
    }
    if (delta.finish_reason != FinishReason::kNone) result.last = std::move(delta);
  }
  return result;
}

TEST(StopMatcher, HoldsBackOnlyWhatCouldBecomeAStop) {
  StopMatcher matcher({"END", "###"});
  EXPECT_EQ(matcher.Push("some E"), "some ");
  EXPECT_EQ(matcher.Push("N"), "");
  EXPECT_EQ(matcher.Push("D?"), "");
  EXPECT_TRUE(matcher.matched());
  EXPECT_EQ(matcher.matched_stop(), "END");
  EXPECT_EQ(matcher.Push("more"), "");
}

TEST(StopMatcher, ReleasesAFalseStart) {
  StopMatcher matcher({"aab"});
  EXPECT_EQ(matcher.Push("aa"), "");
  EXPECT_EQ(matcher.Push("a"), "a");  // "aa" may still open a stop
  EXPECT_EQ(matcher.Push("c"), "aac");
  EXPECT_EQ(matcher.Push("a"), "");
  EXPECT_EQ(matcher.Finish(), "a");
}

TEST(StopMatcher, TheEarliestStopWins) {
  StopMatcher matcher({"later", "now"});
  EXPECT_EQ(matcher.Push("x now and later"), "x ");
  EXPECT_EQ(matcher.matched_stop(), "now");
}

TEST(StopMatcher, AgreesWithSearchForEverySplit) {
  const std::string text = "abababcabc";
  for (const std::string stop : {"abc", "babc", "ababc", "c", "zz"}) {
    for (size_t first = 0; first <= text.size(); ++first) {
      for (size_t second = first; second <= text.size(); ++second) {
        StopMatcher matcher({stop});
        std::string out;
        for (const std::string& piece :
             {text.substr(0, first), text.substr(first, second - first), text.substr(second)}) {
          out += matcher.Push(piece);
        }
        out += matcher.Finish();
        EXPECT_EQ(out, text.substr(0, text.find(stop))) << stop << " at " << first << ", " << second;
      }
    }
  }
}

TEST(ResponseStream, StopAcrossTokensDropsTheTokensAfterIt) {
  const Result result = Play({"Hello", " wo", "rld", "!", " more"}, {.stop = {"orld"}});
  EXPECT_EQ(result.text, "Hello w");
  EXPECT_THAT(result.tokens, testing::ElementsAre(0, 1));
  EXPECT_THAT(result.beyond_text, testing::ElementsAre(2));
  EXPECT_EQ(result.last.finish_reason, FinishReason::kStop);
  EXPECT_EQ(result.last.stop_string, "orld");
}

TEST(ResponseStream, DraftsPastAStopAreNotCountedAsAccepted) {
  const PieceTokenizer tokenizer({"a", "STOP", "b"});
  auto stream = ResponseStream::Create(&tokenizer, {.stop = {"STOP"}});
  RequestOutput output = Output({0, 1, 2, 2, 2});
  output.num_draft_tokens = 5;
  output.num_accepted_tokens = 4;
  stream->MakeSink()(std::move(output));
  EXPECT_EQ(stream->Take().text, "a");
  EXPECT_EQ(stream->usage().completion_tokens, 2);
  EXPECT_EQ(stream->usage().accepted_tokens, 2);
  EXPECT_EQ(stream->usage().draft_tokens, 5);
}

TEST(ResponseStream, StopMayBeKept) {
  EXPECT_EQ(Play({"a", "STO", "P", "b"}, {.stop = {"STOP"}, .include_stop = true}).text, "aSTOP");
}

TEST(ResponseStream, CharactersAreNeverSplit) {
  const PieceTokenizer tokenizer({"a\xF0\x9F", "\x99\x82", "\xE2\x80", "z"});
  auto stream = ResponseStream::Create(&tokenizer, {});
  OutputSink sink = stream->MakeSink();
  sink(Output({0}));
  EXPECT_EQ(stream->Take().text, "a");
  sink(Output({1}));
  EXPECT_EQ(stream->Take().text, "\xF0\x9F\x99\x82");
  sink(Output({2}));
  EXPECT_EQ(stream->Take().text, "");
  sink(Output({3}, FinishReason::kLength));
  EXPECT_EQ(stream->Take().text, "\xEF\xBF\xBDz");  // the broken character, then what follows
}

TEST(ResponseStream, StopStringOfSplitCharacter) {
  EXPECT_EQ(Play({"x\xF0\x9F", "\x99\x82y", "z"}, {.stop = {"\xF0\x9F\x99\x82"}}).text, "x");
}

TEST(ResponseStream, NotifiesOncePerTake) {
  const PieceTokenizer tokenizer({"a", "b"});
  auto stream = ResponseStream::Create(&tokenizer, {});
  OutputSink sink = stream->MakeSink();
  int notified = 0;
  sink(Output({0}));
  stream->SetNotify([&] { ++notified; });
  EXPECT_EQ(notified, 1);  // for what was there before
  sink(Output({1}));
  EXPECT_EQ(notified, 1);
  EXPECT_EQ(stream->Take().text, "ab");
  sink(Output({0}));
  EXPECT_EQ(notified, 2);
}

TEST(ResponseStream, OverflowCancelsAndEnds) {
  const PieceTokenizer tokenizer({"a"});
  auto stream = ResponseStream::Create(&tokenizer, {.max_buffer_bytes = 2000});
  OutputSink sink = stream->MakeSink();
  int accepted = 0;
  while (sink(Output({0}))) ++accepted;
  EXPECT_GT(accepted, 1);
  EXPECT_LT(accepted, 20);
  EXPECT_TRUE(stream->overflowed());
  const StreamDelta delta = stream->Take();
  EXPECT_EQ(static_cast<int>(delta.text.size()), accepted);
  EXPECT_EQ(delta.finish_reason, FinishReason::kCancelled);
}

TEST(ResponseStream, TheTokenThatEndedIsToldAndCountedButNotInTheText) {
  const PieceTokenizer tokenizer({"a", "</s>"});
  auto stream = ResponseStream::Create(&tokenizer, {});
  RequestOutput last = Output({0}, FinishReason::kStop);
  last.stop_token = 1;
  stream->MakeSink()(std::move(last));
  const StreamDelta delta = stream->Take();
  EXPECT_EQ(delta.text, "a");
  ASSERT_EQ(delta.tokens.size(), 2u);
  EXPECT_FALSE(delta.tokens[0].beyond_text);
  EXPECT_TRUE(delta.tokens[1].beyond_text);
  EXPECT_EQ(delta.tokens[1].sampled.token, 1);
  EXPECT_EQ(stream->usage().completion_tokens, 2);
}

TEST(ResponseStream, CancelTravelsBack) {
  const PieceTokenizer tokenizer({"a"});
  auto stream = ResponseStream::Create(&tokenizer, {});
  OutputSink sink = stream->MakeSink();
  EXPECT_TRUE(sink(Output({0})));
  stream->Cancel();
  EXPECT_FALSE(sink(Output({0})));
}

TEST(ResponseStream, EchoedPromptIsNotSearchedForStops) {
  const PieceTokenizer tokenizer({"STOP ", "in", "out", "STOP"});
  auto stream = ResponseStream::Create(&tokenizer, {.stop = {"STOP"}, .num_prompt_tokens = 2});
  OutputSink sink = stream->MakeSink();
  sink(Output({0, 1, 2}));
  sink(Output({3}));
  const StreamDelta delta = stream->Take();
  EXPECT_EQ(delta.text, "STOP inout");
  ASSERT_EQ(delta.tokens.size(), 4u);
  EXPECT_TRUE(delta.tokens[1].from_prompt);
  EXPECT_TRUE(delta.tokens[3].beyond_text);  // the stop's
  EXPECT_EQ(delta.tokens[2].text_start, 7u);
  EXPECT_EQ(delta.finish_reason, FinishReason::kStop);
  EXPECT_EQ(stream->usage().completion_tokens, 2);
}

}  // namespace
}  // namespace linspec
