// The steps around BPE that tokenizer.json describes: normalizers, pre-tokenizers and decoders.
//
// Threads: built steps are const and safe from any thread.
#pragma once

#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace linspec {

using Normalizer = std::function<std::string(std::string)>;
// Splits and rewrites pieces; a piece is one pre-token. Fails only when a pattern exceeds its match limits.
using PreTokenizer = std::function<absl::Status(std::vector<std::string>*)>;

// Null JSON gives an empty function. INVALID_ARGUMENT names an unknown type or a bad field.
absl::StatusOr<Normalizer> BuildNormalizer(const nlohmann::json& spec);
absl::StatusOr<PreTokenizer> BuildPreTokenizer(const nlohmann::json& spec);

// What decoding a token means. Byte-level tokens map to raw bytes; metaspace and byte-fallback tokens likewise.
struct DecoderSpec {
  bool byte_level = false;
  bool byte_fallback = false;                                     // <0xNN> is the byte NN
  std::vector<std::pair<std::string, std::string>> replacements;  // e.g. U+2581 -> space
  int strip_leading_spaces = 0;                                   // of the whole text
};
absl::StatusOr<DecoderSpec> BuildDecoder(const nlohmann::json& spec);

// The GPT-2 byte alphabet: every byte as one printable character.
std::string ByteLevelEncode(std::string_view bytes);
std::string ByteLevelDecode(std::string_view text);  // characters outside the alphabet stay as they are

}  // namespace linspec
