#include "server/openai_json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <nlohmann/json.hpp>

#include "server/answer_writer.h"
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
        BadCase{R"({"prompt":"x","allowed_token_ids":[]})", "allowed_token_ids"},
        BadCase{R"({"prompt":"x","allowed_token_ids":["a"]})", "allowed_token_ids"},
        BadCase{R"({"prompt":"x","bad_words":[""]})", "bad_words"},
        BadCase{R"({"prompt":"x","bad_words":[1]})", "bad_words"},
        BadCase{R"({"prompt":"x","truncate_prompt_tokens":0})", "truncate_prompt_tokens"},
        BadCase{R"({"prompt":"x","truncate_prompt_tokens":-2})", "truncate_prompt_tokens"},
        BadCase{R"({"prompt":"x","truncation_side":"middle"})", "truncation_side"},
        BadCase{R"({"prompt":"x","return_token_ids":1})", "return_token_ids"},
        BadCase{R"({"prompt":"x","logits_processors":["f"]})", "logits_processors"},
        BadCase{R"({"prompt":"x","prompt_logprobs":1})", "prompt_logprobs"},
        BadCase{R"({"prompt":"x","structured_outputs":{"regex":"a"}})", "structured_outputs"},
        BadCase{R"({"prompt":"x","response_format":{"type":"json_object"}})", "response_format"},
        BadCase{R"({"prompt":"x","store":true})", "store"},
        BadCase{R"({"prompt":"x","speculation":"on"})", "speculation"},
        BadCase{R"({"prompt":"x","messages":[]})", "messages"}));

// The JSON of each "data: " line.
std::vector<json> Events(const std::string& text) {
  std::vector<json> events;
  for (size_t at = text.find("data: "); at != std::string::npos; at = text.find("\ndata: ", at)) {
    at = text.find('{', at);
    events.push_back(json::parse(text.substr(at, text.find("\n\n", at) - at)));
  }
  return events;
}

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

TEST(OpenAiJson, DefaultsHoldWhereTheRequestDoesNotSay) {
  CallLimits limits;
  limits.defaults = {.temperature = 0.6f, .top_p = 0.9f, .min_p = 0.1f, .repetition_penalty = 1.2f, .top_k = 20};
  limits.default_chat_tokens = 77;
  const auto calls = {ParseCompletion(R"({"prompt":"x"})", limits), ParseChat("{" USER "}", limits),
                      ParseResponses(R"({"input":"x"})", limits)};
  for (const auto& call : calls) {
    ASSERT_TRUE(call.ok()) << call.status();
    const SamplingParams& s = call->generate.sampling;
    EXPECT_EQ(s.temperature, 0.6f);
    EXPECT_EQ(s.top_p, 0.9f);
    EXPECT_EQ(s.min_p, 0.1f);
    EXPECT_EQ(s.repetition_penalty, 1.2f);
    EXPECT_EQ(s.top_k, 20);
    EXPECT_EQ(s.max_tokens, call->generate.chat() ? 77 : 16);
  }
  const auto said = ParseChat(
      "{" USER R"(,"temperature":0,"top_p":1,"min_p":0,"repetition_penalty":1,"top_k":-1,"max_tokens":5})", limits);
  ASSERT_TRUE(said.ok()) << said.status();
  const SamplingParams& s = said->generate.sampling;
  EXPECT_EQ(s.temperature, 0.0f);
  EXPECT_EQ(s.top_p, 1.0f);
  EXPECT_EQ(s.min_p, 0.0f);
  EXPECT_EQ(s.repetition_penalty, 1.0f);
  EXPECT_EQ(s.top_k, 0);
  EXPECT_EQ(s.max_tokens, 5);
}

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
    const char* body = chat ? "{" USER R"(,"logprobs":true,"top_logprobs":1})" : R"({"prompt":"x","logprobs":1})";
    auto call = chat ? ParseChat(body, {}) : ParseCompletion(body, {});
    ASSERT_TRUE(call.ok()) << call.status();
    const AnswerHead head{.request_id = "i", .model = "m\"", .created = 1};
    EXPECT_EQ(json::parse(MakeCompletionWriter(&*call, head, bytes)->Whole({piece}, {}))["usage"]["total_tokens"], 0);
    call->generate.stream = true;
    std::string out;
    MakeCompletionWriter(&*call, head, bytes)->Piece(piece, {}, &out);
    const std::vector<json> events = Events(out);
    ASSERT_EQ(events.size(), chat ? 2u : 1u);  // a chat's choice opens with its role
    EXPECT_EQ(events.back()["choices"][0]["index"], 1);
    EXPECT_TRUE(events.back()["choices"][0]["finish_reason"].is_null());
  }
}

TEST(OpenAiJson, TokenIdsAndWhatEndedAChoice) {
  const TokenBytesFn bytes = [](int32_t id) { return std::string(1, static_cast<char>('a' + id)); };
  auto call =
      ParseCompletion(R"({"prompt":"x","return_token_ids":true,"logprobs":0,"return_tokens_as_token_ids":true})", {});
  ASSERT_TRUE(call.ok()) << call.status();
  EXPECT_TRUE(call->generate.token_ids && call->generate.prompt_token_ids && call->tokens_as_ids);
  Choice choice;
  choice.text = "b";
  choice.prompt_token_ids = {7, 8};
  choice.tokens.resize(2);
  choice.tokens[0].sampled.token = 1;
  choice.tokens[1].sampled.token = 2;
  choice.tokens[1].beyond_text = true;
  choice.finish = FinishReason::kStop;
  choice.stop_token = 2;
  const json answer = json::parse(MakeCompletionWriter(&*call, {}, bytes)->Whole({choice}, {}))["choices"][0];
  EXPECT_EQ(answer["token_ids"], json::array({1, 2}));
  EXPECT_EQ(answer["prompt_token_ids"], json::array({7, 8}));
  EXPECT_EQ(answer["logprobs"]["tokens"], json::array({"token_id:1"}));  // of what is in the text
  EXPECT_EQ(answer["stop_reason"], 2);
  choice.stop_token = -1;
  choice.stop_string = "\"";
  EXPECT_EQ(json::parse(MakeCompletionWriter(&*call, {}, bytes)->Whole({choice}, {}))["choices"][0]["stop_reason"],
            "\"");
}

TEST(OpenAiJson, ResponsesFields) {
  const auto call = ParseResponses(
      R"({"input":[{"role":"developer","content":"d"},{"role":"user","content":[{"type":"input_text","text":"a"},
    {"type":"input_text","text":"b"}]},{"type":"message","id":"msg_1","status":"completed","role":"assistant",
    "content":[{"type":"output_text","text":"c","annotations":[],"logprobs":[]}]}],"instructions":"i",
    "max_output_tokens":9,"top_p":0.5,"store":false,"metadata":{"k":"v"},"tools":[],"text":{"format":{"type":"text"}}})",
      {});
  ASSERT_TRUE(call.ok()) << call.status();
  std::string seen;
  for (const auto& message : std::get<std::vector<ChatMessage>>(call->generate.prompts[0])) {
    seen += message.role + "=" + message.content + ";";
  }
  EXPECT_EQ(seen, "system=i;system=d;user=ab;assistant=c;");
  EXPECT_EQ(call->generate.sampling.max_tokens, 9);
  EXPECT_EQ(call->responses->instructions, "i");
  EXPECT_EQ(call->responses->metadata, R"({"k":"v"})");
}

TEST(OpenAiJson, ResponsesEvents) {
  auto call = ParseResponses(R"({"input":"x","stream":true})", {});
  ASSERT_TRUE(call.ok()) << call.status();
  const auto writer = MakeResponsesWriter(&*call, {.request_id = "i", .model = "m", .created = 1});
  std::string out;
  Choice piece;
  writer->Begin(&out);
  piece.text = "\"\n";
  writer->Piece(piece, {}, &out);
  piece.text = "";
  writer->Piece(piece, {}, &out);  // nothing to say
  writer->Error(FieldError("f", "why"), &out);
  const std::vector<json> events = Events(out);
  ASSERT_EQ(events.size(), 6u);
  for (size_t i = 0; i < events.size(); ++i) EXPECT_EQ(events[i]["sequence_number"], i);
  EXPECT_EQ(events[0]["response"]["status"], "in_progress");
  EXPECT_EQ(events[0]["response"]["output"], json::array());
  EXPECT_EQ(events[4]["delta"], "\"\n");
  const json error = {
      {"type", "error"}, {"sequence_number", 5}, {"code", "invalid_value"}, {"message", "f: why"}, {"param", "f"}};
  EXPECT_EQ(events[5], error);
}

class BadResponses : public testing::TestWithParam<BadCase> {};

TEST_P(BadResponses, NamesTheField) {
  const auto call = ParseResponses(GetParam().body, {});
  ASSERT_FALSE(call.ok()) << GetParam().body;
  EXPECT_EQ(ErrorField(call.status()), GetParam().field) << call.status();
}

INSTANTIATE_TEST_SUITE_P(
    Table, BadResponses,
    testing::Values(BadCase{"{}", "input"}, BadCase{R"({"input":[]})", "input"}, BadCase{R"({"input":5})", "input"},
                    BadCase{R"({"input":[5]})", "input[0]"},
                    BadCase{R"({"input":[{"role":"user"}]})", "input[0].content"},
                    BadCase{R"({"input":[{"type":"function_call","call_id":"c"}]})", "input[0].type"},
                    BadCase{R"({"input":[{"role":"user","content":[{"type":"input_image","image_url":"u"}]}]})",
                            "input[0].content"},
                    BadCase{R"({"input":[{"role":"tool","content":"x"}]})", "messages[0].role"},
                    BadCase{R"({"input":"x","store":true})", "store"},
                    BadCase{R"({"input":"x","previous_response_id":"resp_1"})", "previous_response_id"},
                    BadCase{R"({"input":"x","tools":[{}]})", "tools"},
                    BadCase{R"({"input":"x","background":true})", "background"},
                    BadCase{R"({"input":"x","reasoning":{"effort":"low"}})", "reasoning"},
                    BadCase{R"({"input":"x","text":{"format":{"type":"json_object"}}})", "text"},
                    BadCase{R"({"input":"x","max_output_tokens":0})", "max_output_tokens"},
                    BadCase{R"({"input":"x","max_tokens":5})", "max_tokens"}));

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
