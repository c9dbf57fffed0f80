// tokenizer.json: byte-level BPE (GPT-2, Llama 3) and BPE with byte fallback (Llama 2, Mistral).
//
// Threads: const methods are safe from any thread. IncrementalDecoder is one stream's, not shared.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace linspec {

struct EncodeOptions {
  bool add_special_tokens = true;  // what the post-processor adds (bos, eos)
  bool parse_special = true;       // text that spells a special token becomes that token; false for user content
};

class Tokenizer {
 public:
  // INVALID_ARGUMENT names the part of the file that is wrong or unsupported.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromJson(std::string_view json);
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromFile(const std::string& path);
  virtual ~Tokenizer() = default;

  virtual absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, EncodeOptions options = {}) const = 0;
  // Bytes of the ids; may end inside a UTF-8 character. OUT_OF_RANGE for an unknown id.
  virtual absl::StatusOr<std::string> Decode(std::span<const int32_t> ids, bool skip_special_tokens = true) const = 0;
  virtual int64_t vocab_size() const = 0;                       // highest id + 1, added tokens included
  virtual int32_t TokenToId(std::string_view token) const = 0;  // -1: none
  virtual std::string IdToToken(int32_t id) const = 0;          // as spelled in the file; "" if unknown
  virtual std::string TokenBytes(int32_t id) const = 0;         // raw bytes the token stands for
  virtual bool IsSpecial(int32_t id) const = 0;
  virtual int leading_spaces_to_strip() const = 0;  // Llama's decoder drops the space it put in front
};

// Feeds tokens, returns text that is complete UTF-8 only; bytes of an unfinished character wait. Invalid bytes become
// U+FFFD. The concatenation of Push results and Finish equals Decode of all ids (with U+FFFD for invalid bytes).
class IncrementalDecoder {
 public:
  IncrementalDecoder(const Tokenizer* tokenizer, bool skip_special_tokens = true);
  std::string Push(int32_t id);
  std::string Finish();

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_tokens_;
  int spaces_to_strip_;  // still to be dropped from the front of the text
  std::string pending_;  // bytes of an unfinished character
};

}  // namespace linspec
