#include "models/generation_config.h"

#include <string>

#include "tests/models/model_test_util.h"

namespace linspec {
namespace {

void ExpectRefused(const std::string& text, const std::string& part) {
  ExpectError(ParseGenerationConfig(text, 100).status(), absl::StatusCode::kInvalidArgument, part);
}

TEST(GenerationConfigTest, ReadsWhatVllmReads) {
  const auto config = ParseGenerationConfig(
      R"({"bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": false, "temperature": 0.6, "top_p": 0.9, "top_k": 20,
          "min_p": 0.05, "repetition_penalty": 1.1, "max_new_tokens": 512, "transformers_version": "4.50.0"})",
      100);
  ASSERT_TRUE(config.ok()) << std::string(config.status().ToString());
  SamplingParams sampling;
  sampling.frequency_penalty = 0.5f;
  config->sampling.Apply(&sampling);
  EXPECT_EQ(sampling.temperature, 0.6f);
  EXPECT_EQ(sampling.top_p, 0.9f);
  EXPECT_EQ(sampling.top_k, 20);
  EXPECT_EQ(sampling.min_p, 0.05f);
  EXPECT_EQ(sampling.repetition_penalty, 1.1f);
  EXPECT_EQ(sampling.frequency_penalty, 0.5f);
  EXPECT_EQ(config->max_new_tokens, 512);
  EXPECT_EQ(config->eos_token_ids, (std::vector<int32_t>{2, 3}));
}

TEST(GenerationConfigTest, WhatIsAbsentOrNullIsOff) {
  for (const char* text : {"{}", R"({"temperature": null, "top_p": null, "top_k": null, "max_new_tokens": null,
                                     "eos_token_id": null})",
                           R"({"top_k": -1})"}) {
    const auto config = ParseGenerationConfig(text, 100);
    ASSERT_TRUE(config.ok()) << text;
    SamplingParams sampling;
    config->sampling.Apply(&sampling);
    const SamplingParams off;
    EXPECT_EQ(sampling.temperature, off.temperature);
    EXPECT_EQ(sampling.top_p, off.top_p);
    EXPECT_EQ(sampling.top_k, off.top_k);
    EXPECT_EQ(sampling.min_p, off.min_p);
    EXPECT_EQ(sampling.repetition_penalty, off.repetition_penalty);
    EXPECT_EQ(config->max_new_tokens, 0);
    EXPECT_TRUE(config->eos_token_ids.empty());
  }
}

TEST(GenerationConfigTest, NamesWhatIsWrong) {
  ExpectRefused("", "JSON");
  ExpectRefused("[]", "object");
  ExpectRefused(R"({"temperature": 0.5, "temperature": 0.6})", "temperature");
  ExpectRefused(R"({"temperature": "hot"})", "temperature = \"hot\": expected a number from 0 to 2");
  ExpectRefused(R"({"temperature": 2.5})", "temperature = 2.5");
  ExpectRefused(R"({"temperature": -0.1})", "temperature");
  ExpectRefused(R"({"temperature": true})", "temperature = true");
  ExpectRefused(R"({"top_p": 0})", "top_p = 0: expected a number above 0, at most 1");
  ExpectRefused(R"({"top_p": 1e-60})", "top_p");
  ExpectRefused(R"({"top_k": 1.5})", "top_k = 1.5: expected an integer");
  ExpectRefused(R"({"top_k": -2})", "top_k");
  ExpectRefused(R"({"top_k": 4294967296})", "top_k");
  ExpectRefused(R"({"min_p": 1.01})", "min_p");
  ExpectRefused(R"({"repetition_penalty": 0})", "repetition_penalty");
  ExpectRefused(R"({"max_new_tokens": 0})", "max_new_tokens");
  ExpectRefused(R"({"max_new_tokens": 1e300})", "max_new_tokens");
  ExpectRefused(R"({"eos_token_id": 100})", "eos_token_id = 100: expected token ids from 0 to 99");
  ExpectRefused(R"({"eos_token_id": [1, "2"]})", "eos_token_id");
}

}  // namespace
}  // namespace linspec
