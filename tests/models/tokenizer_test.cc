#include "models/tokenizer.h"

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "models/utf8.h"
#include "nlohmann/json.hpp"

namespace linspec {
namespace {

const std::string kGpt2 = LINSPEC_TEST_DATA_DIR "/tokenizers/gpt2/";

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream out;
  out << file.rdbuf();
  return out.str();
}

// What a merge makes is the next token: the file leaves it out.
std::string WithMergedTokens(std::string_view json) {
  auto file = nlohmann::json::parse(json);
  auto& vocab = file["model"]["vocab"];
  int32_t next = 256;
  for (std::string merge : file["model"]["merges"]) vocab[merge.erase(merge.find(' '), 1)] = next++;
  return file.dump();
}

const Tokenizer& Gpt2() {
  static const auto tokenizer = *Tokenizer::FromJson(WithMergedTokens(ReadFile(kGpt2 + "tokenizer.json")));
  return *tokenizer;
}

std::vector<std::pair<std::string, std::vector<int32_t>>> Gpt2Cases() {
  constexpr std::string_view kSeparator = "\n__ggml_vocab_test__\n";
  std::vector<std::pair<std::string, std::vector<int32_t>>> out;
  std::string inputs = ReadFile(kGpt2 + "cases.inp");
  std::istringstream expected(ReadFile(kGpt2 + "cases.out"));
  for (size_t at = 0; at < inputs.size();) {
    const size_t end = inputs.find(kSeparator, at);
    std::string line;
    std::getline(expected, line);
    std::istringstream numbers(line);
    std::vector<int32_t> ids{std::istream_iterator<int32_t>(numbers), {}};
    if (end == std::string::npos) break;
    out.emplace_back(inputs.substr(at, end - at), ids);
    at = end + kSeparator.size();
  }
  return out;
}

TEST(TokenizerTest, Gpt2PublishedCases) {
  const auto cases = Gpt2Cases();
  ASSERT_GE(cases.size(), 40u);
  for (const auto& [text, ids] : cases) {
    EXPECT_EQ(*Gpt2().Encode(text), ids) << "text: " << text;
    EXPECT_EQ(*Gpt2().Decode(ids), text);
  }
}

TEST(TokenizerTest, SpecialTokensOnlyWhenAsked) {
  EXPECT_EQ(*Gpt2().Encode("a<|endoftext|>b"), (std::vector<int32_t>{64, 50256, 65}));
  const auto plain = *Gpt2().Encode("a<|endoftext|>b", {.parse_special = false});
  EXPECT_GT(plain.size(), 3u);
  EXPECT_EQ(*Gpt2().Decode(plain), "a<|endoftext|>b");
  EXPECT_TRUE(Gpt2().IsSpecial(50256));
  EXPECT_EQ(*Gpt2().Decode(std::vector<int32_t>{64, 50256, 65}), "ab");
  EXPECT_EQ(*Gpt2().Decode(std::vector<int32_t>{64, 50256, 65}, false), "a<|endoftext|>b");
}

TEST(TokenizerTest, IncrementalDecodingEqualsFullDecoding) {
  std::mt19937 generator(7);
  for (int round = 0; round < 200; ++round) {
    std::vector<int32_t> ids;
    IncrementalDecoder decoder(&Gpt2());
    std::string text;
    for (int i = 0; i < 30; ++i) {
      ids.push_back(static_cast<int32_t>(generator() % (round % 2 ? 256 : 50257)));
      const std::string piece = decoder.Push(ids.back());
      EXPECT_EQ(ToValidUtf8(piece), piece);
      text += piece;
    }
    text += decoder.Finish();
    EXPECT_EQ(text, ToValidUtf8(*Gpt2().Decode(ids)));
  }
}

TEST(TokenizerTest, RoundTripsArbitraryUnicode) {
  std::mt19937 generator(3);
  for (int round = 0; round < 100; ++round) {
    std::string text;
    for (int i = 0; i < 40; ++i) {
      int32_t code = static_cast<int32_t>(generator() % (round % 2 ? 0x300 : 0x11000));
      if (code == 0 || (code >= 0xD800 && code < 0xE000)) code = ' ';
      AppendUtf8(code, &text);
    }
    EXPECT_EQ(*Gpt2().Decode(*Gpt2().Encode(text)), text);
  }
}

TEST(TokenizerTest, InvalidUtf8BecomesReplacementCharacters) {
  EXPECT_EQ(*Gpt2().Decode(*Gpt2().Encode("a\xFF\xC3")), "a\xEF\xBF\xBD\xEF\xBF\xBD");
}

TEST(TokenizerTest, LongTextWithoutSpacesIsNotQuadratic) {
  const std::string text(1 << 20, 'a');
  EXPECT_EQ(*Gpt2().Decode(*Gpt2().Encode(text)), text);
}

TEST(TokenizerTest, UnknownIdIsAnError) {
  EXPECT_EQ(Gpt2().Decode(std::vector<int32_t>{50257}).status().code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(Gpt2().Decode(std::vector<int32_t>{-1}).status().code(), absl::StatusCode::kOutOfRange);
}

// Llama 2's shape: metaspace through normalizers, byte fallback, bos in front, one leading space stripped on decoding.
constexpr char kByteFallback[] = R"({
  "added_tokens": [{"id": 0, "content": "<unk>", "special": true}, {"id": 1, "content": "<s>", "special": true}],
  "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                 {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
  "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                     {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {}},
  "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
              {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
  "model": {"type": "BPE", "byte_fallback": true, "fuse_unk": true, "unk_token": "<unk>",
            "vocab": {"<unk>": 0, "<s>": 1, "<0xC3>": 2, "<0xA9>": 3, "▁": 4, "h": 5, "i": 6, "hi": 7, "▁hi": 8},
            "merges": ["h i", "▁ hi"]}})";

TEST(TokenizerTest, ByteFallback) {
  const auto tokenizer = Tokenizer::FromJson(kByteFallback);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ(*(*tokenizer)->Encode("hi hi"), (std::vector<int32_t>{1, 8, 8}));
  EXPECT_EQ(*(*tokenizer)->Encode("hié", {.add_special_tokens = false}), (std::vector<int32_t>{8, 2, 3}));
  EXPECT_EQ(*(*tokenizer)->Encode("zz", {.add_special_tokens = false}), (std::vector<int32_t>{4, 0})) << "unk is fused";
  EXPECT_EQ(*(*tokenizer)->Decode(std::vector<int32_t>{1, 8, 2, 3, 8}), "hié hi");
  IncrementalDecoder decoder(tokenizer->get());
  EXPECT_EQ(decoder.Push(8), "hi");
  EXPECT_EQ(decoder.Push(2), "");
  EXPECT_EQ(decoder.Push(3), "é");
  EXPECT_EQ(decoder.Push(8), " hi");
}

TEST(TokenizerTest, EveryMalformedFileIsATypedError) {
  const char* kBroken[] = {
      "",
      "[]",
      "{}",
      R"({"model": 3})",
      R"({"model": {"type": "WordPiece", "vocab": {}}})",
      R"({"model": {"vocab": []}})",
      R"({"model": {"vocab": {"a": "x"}}})",
      R"({"model": {"vocab": {"a": -1}}})",
      R"({"model": {"vocab": {"a": 99999999999}}})",
      R"({"model": {"vocab": {"a": 1, "b": 1}}})",
      R"({"model": {"vocab": {"a": 0}, "merges": ["a b"]}})",
      R"({"model": {"vocab": {"a": 0}, "merges": [3]}})",
      R"({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]})",
      R"({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 0, "content": "b"}]})",
      R"({"model": {"vocab": {"a": 0}}, "normalizer": {"type": "Bogus"}})",
      R"({"model": {"vocab": {"a": 0}}, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}})",
      R"({"model": {"vocab": {"a": 0}}, "decoder": {"type": "Bogus"}})",
      R"({"model": {"vocab": {"a": 0}}, "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "?"}}]}})",
  };
  for (const char* text : kBroken) {
    const auto tokenizer = Tokenizer::FromJson(text);
    EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
  EXPECT_EQ(Tokenizer::FromFile("/no/such/file").status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace linspec
