#include "server/openai_json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <nlohmann/json.hpp>

#include "server/errors.h"
#include "server/json_text.h"

namespace linspec {
namespace {

using nlohmann::json;

struct BadCase {
  const char* body;
  const char* field;  // "" when no one field is to blame
};

class BadCompletion : public testing::TestWithParam<BadCase> {};

TEST_P(BadCompletion, NamesTheField) {
  const auto call = ParseCompletion(GetParam().body, {});
  ASSERT_FALSE(call.ok()) << GetParam().body;
  EXPECT_EQ(call.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ErrorField(call.status()), GetParam().field) << call.status();
  EXPECT_EQ(HttpStatusOf(call.status()), 400);
  EXPECT_TRUE(json::accept(OpenAiErrorJson(call.status())));
}

INSTANTIATE_TEST_SUITE_P(
    Table, BadCompletion,
    testing::Values(
        BadCase{"", ""}, BadCase{"[]", ""}, BadCase{"{\"prompt\":\"x\",\"prompt\":\"y\"}", ""}, BadCase{"{}", "prompt"},
        BadCase{R"({"prompt":null})", "prompt"}, BadCase{R"({"prompt":{}})", "prompt"},
        BadCase{R"({"prompt":[]})", "prompt"}, BadCase{R"({"prompt":[1,"a"]})", "prompt"},
        BadCase{R"({"prompt":["a",1]})", "prompt"}, BadCase{R"({"prompt":[-1]})", "prompt"},
        BadCase{R"({"prompt":[1.5]})", "prompt"}, BadCase{R"({"prompt":[4294967296]})", "prompt"},
        BadCase{R"({"prompt":[[1],[[2]]]})", "prompt"}, BadCase{R"({"prompt":"x","n":0})", "n"},
        BadCase{R"({"prompt":"x","n":true})", "n"}, BadCase{R"({"prompt":"x","n":99999999999999999999})", "n"},
        BadCase{R"({"prompt":["a","b"],"n":16})", "prompt"}, BadCase{R"({"prompt":"x","n":3,"best_of":2})", "best_of"},
        BadCase{R"({"prompt":"x","best_of":2,"stream":true})", "best_of"},
        BadCase{R"({"prompt":"x","max_tokens":0})", "max_tokens"},
        BadCase{R"({"prompt":"x","max_tokens":18446744073709551615})", "max_tokens"},
        BadCase{R"({"prompt":"x","max_tokens":"5"})", "max_tokens"},
        BadCase{R"({"prompt":"x","temperature":-0.1})", "temperature"},
        BadCase{R"({"prompt":"x","temperature":"1"})", "temperature"}, BadCase{R"({"prompt":"x","top_p":0})", "top_p"},
        BadCase{R"({"prompt":"x","top_k":-2})", "top_k"}, BadCase{R"({"prompt":"x","min_p":1.1})", "min_p"},
        BadCase{R"({"prompt":"x","logit_bias":[]})", "logit_bias"},
        BadCase{R"({"prompt":"x","logit_bias":{"1x":1}})", "logit_bias"},
        BadCase{R"({"prompt":"x","logit_bias":{"1":101}})", "logit_bias"},
        BadCase{R"({"prompt":"x","stop":[1]})", "stop"}, BadCase{R"({"prompt":"x","stop":""})", "stop"},
        BadCase{R"({"prompt":"x","suffix":"y"})", "suffix"}, BadCase{R"({"prompt":"x","logprobs":true})", "logprobs"},
        BadCase{R"({"prompt":"x","stream_options":{"include_usage":true}})", "stream_options"},
        BadCase{R"({"prompt":"x","stream":true,"stream_options":{"x":1}})", "stream_options.x"},
        BadCase{R"({"prompt":"x","min_tokens":17})", "min_tokens"},
        BadCase{R"({"prompt":"x","response_format":{"type":"json_object"}})", "response_format"},
        BadCase{R"({"prompt":"x","store":true})", "store"},
        BadCase{R"({"prompt":"x","speculation":"on"})", "speculation"},
        BadCase{R"({"prompt":"x","messages":[]})", "messages"}));

class BadChat : public testing::TestWithParam<BadCase> {};

TEST_P(BadChat, NamesTheField) {
  const auto call = ParseChat(GetParam().body, {});
  ASSERT_FALSE(call.ok()) << GetParam().body;
  EXPECT_EQ(ErrorField(call.status()), GetParam().field) << call.status();
}

#define USER R"("messages":[{"role":"user","content":"x"}])"
INSTANTIATE_TEST_SUITE_P(
    Table, BadChat,
    testing::Values(BadCase{"{}", "messages"}, BadCase{R"({"messages":[]})", "messages"},
                    BadCase{R"({"messages":[1]})", "messages[0]"},
                    BadCase{R"({"messages":[{"role":"user"}]})", "messages[0].content"},
                    BadCase{R"({"messages":[{"role":"tool","content":"x"}]})", "messages[0].role"},
                    BadCase{R"({"messages":[{"role":"user","content":[{"type":"image_url","image_url":{}}]}]})",
                            "messages[0].content"},
                    BadCase{R"({"messages":[{"role":"user","content":"x","extra":1}]})", "messages[0].extra"},
                    BadCase{"{" USER R"(,"tools":[{}]})", "tools"},
                    BadCase{"{" USER R"(,"tool_choice":"auto"})", "tool_choice"},
                    BadCase{"{" USER R"(,"top_logprobs":2})", "top_logprobs"},
                    BadCase{"{" USER R"(,"logprobs":3})", "logprobs"},
                    BadCase{"{" USER R"(,"chat_template":"x"})", "chat_template"},
                    BadCase{"{" USER R"(,"modalities":["audio"]})", "modalities"},
                    BadCase{"{" USER R"(,"prompt":"x"})", "prompt"}));

TEST(OpenAiJson, DepthIsLimited) {
  const std::string deep = "{\"prompt\":" + std::string(1000000, '[') + std::string(1000000, ']') + "}";
  EXPECT_FALSE(ParseCompletion(deep, {}).ok());
}

TEST(OpenAiJson, CompletionFields) {
  const auto call =
      ParseCompletion(R"({"prompt":[[1,2],[3]],"n":2,"temperature":0.5,"top_k":-1,"seed":-3,"stop":"a","stream":true,
    "stream_options":{"include_usage":true},"logit_bias":{"7":-5},"user":"u","metadata":{},"speculation":"ngram","priority":4,
    "max_tokens":null,"logprobs":2})",
                      {});
  ASSERT_TRUE(call.ok()) << call.status();
  EXPECT_EQ(call->generate.prompts.size(), 2u);
  EXPECT_THAT(std::get<std::vector<int32_t>>(call->generate.prompts[0]), testing::ElementsAre(1, 2));
  EXPECT_EQ(call->generate.n, 2);
  EXPECT_EQ(call->generate.sampling.temperature, 0.5f);
  EXPECT_EQ(call->generate.sampling.top_k, 0);
  EXPECT_EQ(call->generate.sampling.seed, static_cast<uint64_t>(-3));
  EXPECT_THAT(call->generate.sampling.stop, testing::ElementsAre("a"));
  EXPECT_TRUE(call->generate.stream && call->include_usage && call->generate.has_seed);
  EXPECT_EQ(call->generate.sampling.logit_bias.at(7), -5);
  EXPECT_EQ(call->generate.speculation, SpeculationMode::kNgram);
  EXPECT_EQ(call->generate.priority, 4);
  EXPECT_EQ(call->generate.sampling.max_tokens, 16);
  EXPECT_EQ(call->generate.sampling.logprobs, 2);
}

TEST(OpenAiJson, ChatFields) {
  const auto call =
      ParseChat(R"({"messages":[{"role":"developer","content":"s"},{"role":"user","content":[{"type":"text","text":"a"},
    {"type":"text","text":"b"}]}],"max_completion_tokens":9,"logprobs":true,"top_logprobs":3,"tools":[],"tool_choice":"none"})",
                {});
  ASSERT_TRUE(call.ok()) << call.status();
  const auto& messages = std::get<std::vector<ChatMessage>>(call->generate.prompts[0]);
  EXPECT_EQ(messages[0].role, "system");
  EXPECT_EQ(messages[1].content, "ab");
  EXPECT_EQ(call->generate.sampling.max_tokens, 9);
  EXPECT_EQ(call->generate.sampling.logprobs, 3);
}

TEST(OpenAiJson, ChunksAreValidJson) {
  Choice piece;
  piece.index = 1;
  piece.text = "q\"\n\x01\xFF";
  OutputToken token;
  token.sampled.token = 5;
  token.sampled.logprob = -std::numeric_limits<float>::infinity();
  token.sampled.top_logprobs = {{6, -0.5f}};
  piece.tokens.push_back(token);
  const TokenBytesFn bytes = [](int32_t) { return std::string("\xE2\x80"); };
  for (const bool chat : {false, true}) {
    std::string out;
    ResponseHead head = {.id = "i", .model = "m\"", .created = 1, .chat = chat, .logprobs = 1};
    BeginChunks(&head);
    AppendChunk(head, piece, bytes, &out);
    ASSERT_TRUE(out.starts_with("data: ") && out.ends_with("\n\n"));
    const json parsed = json::parse(out.substr(6));
    EXPECT_EQ(parsed["choices"][0]["index"], 1);
    EXPECT_TRUE(parsed["choices"][0]["finish_reason"].is_null());
    const std::string full =
        FullResponseJson({.id = "i", .model = "m", .created = 1, .chat = chat, .logprobs = 1}, {piece}, {}, bytes);
    EXPECT_EQ(json::parse(full)["usage"]["total_tokens"], 0);
  }
}

TEST(JsonText, Utf8) {
  EXPECT_TRUE(IsUtf8("aé🙂"));
  for (const char* bad :
       {"\x80", "\xC0\x80", "\xE0\x80\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xE2\x82"}) {
    EXPECT_FALSE(IsUtf8(bad));
    EXPECT_TRUE(IsUtf8(ToUtf8(bad)));
  }
}

}  // namespace
}  // namespace linspec
