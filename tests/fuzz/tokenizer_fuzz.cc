// A tokenizer.json and a text, separated by a zero byte (no zero byte: the input is a text too). Whatever loads must
// encode any bytes without crashing, to ids it knows, and decode them piece by piece to what it decodes at once.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "models/tokenizer.h"
#include "models/utf8.h"

namespace {

void Require(bool condition) {
  if (!condition) std::abort();
}

void Exercise(const linspec::Tokenizer& tokenizer, std::string_view text, linspec::EncodeOptions options) {
  const auto ids = tokenizer.Encode(text, options);
  if (!ids.ok()) return;
  const auto whole = tokenizer.Decode(*ids, false);
  Require(whole.ok());
  linspec::IncrementalDecoder decoder(&tokenizer, false);
  std::string pieces;
  for (const int32_t id : *ids) {
    Require(id >= 0 && id < tokenizer.vocab_size());
    pieces += decoder.Push(id);
  }
  Require(pieces + decoder.Finish() == linspec::ToValidUtf8(*whole));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t split = input.find('\0');
  const std::string_view text = split == std::string_view::npos ? input : input.substr(split + 1);
  const auto tokenizer = linspec::Tokenizer::FromJson(input.substr(0, split));
  if (!tokenizer.ok()) return 0;
  Exercise(**tokenizer, text, {});
  Exercise(**tokenizer, text, {.add_special_tokens = false, .parse_special = false});
  return 0;
}
