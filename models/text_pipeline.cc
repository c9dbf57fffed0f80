#include "models/text_pipeline.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <pcre2.h>
#include <utf8proc.h>

#include <array>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <unordered_map>
#include <utility>

#include "models/utf8.h"

namespace linspec {
namespace {

using nlohmann::json;

absl::Status Unsupported(const char* part, const json& spec) {
  const std::string text = spec.dump(-1, ' ', true, json::error_handler_t::replace).substr(0, 120);
  return absl::InvalidArgumentError(fmt::format("tokenizer.json: {} not supported: {}", part, text));
}

std::string Type(const json& spec) {
  return spec.is_object() && spec.contains("type") && spec["type"].is_string() ? spec["type"].get<std::string>() : "";
}

std::string StringField(const json& spec, const char* name, std::string fallback = "") {
  return spec.contains(name) && spec[name].is_string() ? spec[name].get<std::string>() : std::move(fallback);
}

bool BoolField(const json& spec, const char* name, bool fallback) {
  return spec.contains(name) && spec[name].is_boolean() ? spec[name].get<bool>() : fallback;
}

void ReplaceAll(std::string* text, std::string_view from, std::string_view to) {
  if (from.empty()) return;
  for (size_t at = text->find(from); at != std::string::npos; at = text->find(from, at + to.size())) {
    text->replace(at, from.size(), to);
  }
}

// A compiled pattern of {"Regex": ...} or {"String": ...}.
class Pattern {
 public:
  static absl::StatusOr<std::shared_ptr<const Pattern>> Compile(std::string_view source, bool literal) {
    int error = 0;
    PCRE2_SIZE offset = 0;
    pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(source.data()), source.size(),
                                     PCRE2_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP), &error, &offset, nullptr);
    if (code == nullptr) {
      std::array<PCRE2_UCHAR, 256> message{};
      pcre2_get_error_message(error, message.data(), message.size());
      return absl::InvalidArgumentError(fmt::format("tokenizer.json: pattern error at offset {}: {}", offset,
                                                    reinterpret_cast<const char*>(message.data())));
    }
    pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // falls back to the interpreter where there is no JIT
    auto pattern = std::make_shared<Pattern>();
    pattern->code_.reset(code);
    return std::shared_ptr<const Pattern>(pattern);
  }

  static absl::StatusOr<std::shared_ptr<const Pattern>> FromJson(const json& spec) {
    if (spec.is_object() && spec.contains("Regex") && spec["Regex"].is_string()) {
      return Compile(spec["Regex"].get<std::string>(), false);
    }
    if (spec.is_object() && spec.contains("String") && spec["String"].is_string()) {
      return Compile(spec["String"].get<std::string>(), true);
    }
    return Unsupported("pattern", spec);
  }

  // [begin, end) of every match, in order. text must be valid UTF-8.
  absl::StatusOr<std::vector<std::pair<size_t, size_t>>> FindAll(std::string_view text) const {
    const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data(
        pcre2_match_data_create_from_pattern(code_.get(), nullptr), pcre2_match_data_free);
    const std::unique_ptr<pcre2_match_context, decltype(&pcre2_match_context_free)> context(
        pcre2_match_context_create(nullptr), pcre2_match_context_free);
    pcre2_set_match_limit(context.get(), 10'000'000);
    std::vector<std::pair<size_t, size_t>> matches;
    size_t at = 0;
    while (at <= text.size()) {
      const int result = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                                     PCRE2_NO_UTF_CHECK, data.get(), context.get());
      if (result == PCRE2_ERROR_NOMATCH) break;
      if (result < 0)
        return absl::InvalidArgumentError(fmt::format("the text exceeds the pattern's match limits ({})", result));
      const PCRE2_SIZE* span = pcre2_get_ovector_pointer(data.get());
      if (span[1] > span[0]) matches.emplace_back(span[0], span[1]);
      at =
          span[1] > span[0] ? span[1] : span[1] + (span[1] < text.size() ? DecodeUtf8(text.substr(span[1])).length : 1);
    }
    return matches;
  }

  Pattern() = default;

 private:
  std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)> code_{nullptr, pcre2_code_free};
};

absl::StatusOr<std::vector<std::string>> SplitPiece(const Pattern& pattern, const std::string& piece,
                                                    const std::string& behavior, bool invert) {
  auto matches = pattern.FindAll(piece);
  if (!matches.ok()) return matches.status();
  std::vector<std::pair<std::string, bool>> parts;  // text, is a delimiter
  size_t at = 0;
  for (const auto& [begin, end] : *matches) {
    if (begin > at) parts.emplace_back(piece.substr(at, begin - at), invert);
    parts.emplace_back(piece.substr(begin, end - begin), !invert);
    at = end;
  }
  if (at < piece.size()) parts.emplace_back(piece.substr(at), invert);
  std::vector<std::string> out;
  bool previous_delimiter = false;
  std::string carried;  // MergedWithNext
  for (auto& [text, delimiter] : parts) {
    if (!delimiter || behavior == "Isolated") {
      out.push_back(carried + text);
      carried.clear();
    } else if (behavior == "MergedWithPrevious" && !out.empty() && !previous_delimiter) {
      out.back() += text;
    } else if (behavior == "Contiguous" && previous_delimiter) {
      out.back() += text;
    } else if (behavior == "MergedWithNext") {
      if (!carried.empty()) out.push_back(carried);
      carried = text;
    } else if (behavior != "Removed") {
      out.push_back(text);
    }
    previous_delimiter = delimiter;
  }
  if (!carried.empty()) out.push_back(carried);
  return out;
}

PreTokenizer SplitBy(std::shared_ptr<const Pattern> pattern, std::string behavior, bool invert) {
  return [=](std::vector<std::string>* pieces) -> absl::Status {
    std::vector<std::string> out;
    for (const std::string& piece : *pieces) {
      auto parts = SplitPiece(*pattern, piece, behavior, invert);
      if (!parts.ok()) return parts.status();
      for (std::string& part : *parts) out.push_back(std::move(part));
    }
    *pieces = std::move(out);
    return absl::OkStatus();
  };
}

constexpr char kGpt2Pattern[] = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr char kMetaspace[] = "\xE2\x96\x81";

absl::StatusOr<PreTokenizer> ByteLevelStep(const json& spec) {
  const bool prefix = BoolField(spec, "add_prefix_space", true);
  PreTokenizer split;
  if (BoolField(spec, "use_regex", true)) {
    auto pattern = Pattern::Compile(kGpt2Pattern, false);
    if (!pattern.ok()) return pattern.status();
    split = SplitBy(*pattern, "Isolated", false);
  }
  return PreTokenizer([=](std::vector<std::string>* pieces) -> absl::Status {
    for (std::string& piece : *pieces) {
      if (prefix && !piece.empty() && piece[0] != ' ') piece.insert(0, " ");
    }
    if (split) {
      if (absl::Status status = split(pieces); !status.ok()) return status;
    }
    for (std::string& piece : *pieces) piece = ByteLevelEncode(piece);
    return absl::OkStatus();
  });
}

absl::StatusOr<PreTokenizer> MetaspaceStep(const json& spec) {
  const std::string replacement = StringField(spec, "replacement", kMetaspace);
  const std::string scheme =
      StringField(spec, "prepend_scheme", BoolField(spec, "add_prefix_space", true) ? "always" : "never");
  const bool split = BoolField(spec, "split", true);
  return PreTokenizer([=](std::vector<std::string>* pieces) -> absl::Status {
    std::vector<std::string> out;
    for (size_t i = 0; i < pieces->size(); ++i) {
      std::string text = std::move((*pieces)[i]);
      ReplaceAll(&text, " ", replacement);
      const bool prepend = scheme == "always" || (scheme == "first" && i == 0);
      if (prepend && !text.starts_with(replacement)) text.insert(0, replacement);
      size_t at = 0;
      while (split && at < text.size()) {
        const size_t next = text.find(replacement, at + 1);
        if (next == std::string::npos) break;
        out.push_back(text.substr(at, next - at));
        at = next;
      }
      if (at < text.size()) out.push_back(text.substr(at));
    }
    *pieces = std::move(out);
    return absl::OkStatus();
  });
}

std::string NormalizeUnicode(const std::string& text, int options) {
  utf8proc_uint8_t* result = nullptr;
  const auto length =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                   &result, static_cast<utf8proc_option_t>(options));
  if (length < 0) return text;  // only invalid UTF-8 fails, and callers pass valid text
  std::string out(reinterpret_cast<char*>(result), static_cast<size_t>(length));
  std::free(result);
  return out;
}

std::string Lowercase(const std::string& text) {
  std::string out;
  for (std::string_view rest = text; !rest.empty();) {
    const Utf8Char c = DecodeUtf8(rest);
    AppendUtf8(c.code < 0 ? 0xFFFD : utf8proc_tolower(c.code), &out);
    rest.remove_prefix(c.length);
  }
  return out;
}

std::string StripSpaces(std::string text, bool left, bool right) {
  constexpr char kSpaces[] = " \t\n\r\f\v";
  if (right) text.erase(text.find_last_not_of(kSpaces) + 1);
  if (left) text.erase(0, text.find_first_not_of(kSpaces));
  return text;
}

}  // namespace

absl::StatusOr<Normalizer> BuildNormalizer(const json& spec) {
  if (spec.is_null()) return Normalizer();
  const std::string type = Type(spec);
  static const std::unordered_map<std::string, int> kForms = {
      {"NFC", UTF8PROC_COMPOSE | UTF8PROC_STABLE},
      {"NFD", UTF8PROC_DECOMPOSE | UTF8PROC_STABLE},
      {"NFKC", UTF8PROC_COMPOSE | UTF8PROC_COMPAT | UTF8PROC_STABLE},
      {"NFKD", UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT | UTF8PROC_STABLE}};
  if (const auto it = kForms.find(type); it != kForms.end()) {
    return Normalizer([form = it->second](std::string text) { return NormalizeUnicode(text, form); });
  }
  if (type == "Lowercase") return Normalizer([](std::string text) { return Lowercase(text); });
  if (type == "Prepend") {
    return Normalizer(
        [prefix = StringField(spec, "prepend")](std::string text) { return text.empty() ? text : prefix + text; });
  }
  if (type == "Strip") {
    const bool left = BoolField(spec, "strip_left", true), right = BoolField(spec, "strip_right", true);
    return Normalizer([=](std::string text) { return StripSpaces(std::move(text), left, right); });
  }
  if (type == "Replace" && spec.contains("pattern")) {
    auto pattern = Pattern::FromJson(spec["pattern"]);
    if (!pattern.ok()) return pattern.status();
    return Normalizer([pattern = *pattern, content = StringField(spec, "content")](std::string text) {
      const auto matches = pattern->FindAll(text);
      if (!matches.ok()) return text;
      std::string out;
      size_t at = 0;
      for (const auto& [begin, end] : *matches) {
        out.append(text, at, begin - at).append(content);
        at = end;
      }
      return out.append(text, at);
    });
  }
  if (type == "Sequence" && spec.contains("normalizers") && spec["normalizers"].is_array()) {
    std::vector<Normalizer> steps;
    for (const json& step : spec["normalizers"]) {
      auto built = BuildNormalizer(step);
      if (!built.ok()) return built.status();
      if (*built) steps.push_back(*std::move(built));
    }
    return Normalizer([steps](std::string text) {
      for (const Normalizer& step : steps) text = step(std::move(text));
      return text;
    });
  }
  return Unsupported("normalizer", spec);
}

absl::StatusOr<PreTokenizer> BuildPreTokenizer(const json& spec) {
  if (spec.is_null()) return PreTokenizer();
  const std::string type = Type(spec);
  if (type == "ByteLevel") return ByteLevelStep(spec);
  if (type == "Metaspace") return MetaspaceStep(spec);
  if (type == "Split" && spec.contains("pattern")) {
    auto pattern = Pattern::FromJson(spec["pattern"]);
    if (!pattern.ok()) return pattern.status();
    return SplitBy(*pattern, StringField(spec, "behavior", "Isolated"), BoolField(spec, "invert", false));
  }
  static const std::unordered_map<std::string, std::pair<const char*, const char*>> kPatterns = {
      {"Whitespace", {R"(\w+|[^\w\s]+)", "keep"}},
      {"WhitespaceSplit", {R"(\s+)", "Removed"}},
      {"Punctuation", {R"([\p{P}\x21-\x2F\x3A-\x40\x5B-\x60\x7B-\x7E])", "Isolated"}}};
  if (const auto it = kPatterns.find(type); it != kPatterns.end()) {
    auto pattern = Pattern::Compile(it->second.first, false);
    if (!pattern.ok()) return pattern.status();
    // "keep" wants the matches and drops what lies between: an inverted Removed.
    if (it->second.second == std::string("keep")) return SplitBy(*pattern, "Removed", true);
    return SplitBy(*pattern, it->second.second, false);
  }
  if (type == "Digits") {
    auto pattern = Pattern::Compile(BoolField(spec, "individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)", false);
    if (!pattern.ok()) return pattern.status();
    return SplitBy(*pattern, "Isolated", false);
  }
  if (type == "Sequence" && spec.contains("pretokenizers") && spec["pretokenizers"].is_array()) {
    std::vector<PreTokenizer> steps;
    for (const json& step : spec["pretokenizers"]) {
      auto built = BuildPreTokenizer(step);
      if (!built.ok()) return built.status();
      if (*built) steps.push_back(*std::move(built));
    }
    return PreTokenizer([steps](std::vector<std::string>* pieces) -> absl::Status {
      for (const PreTokenizer& step : steps) {
        if (absl::Status status = step(pieces); !status.ok()) return status;
      }
      return absl::OkStatus();
    });
  }
  return Unsupported("pre_tokenizer", spec);
}

absl::StatusOr<DecoderSpec> BuildDecoder(const json& spec) {
  DecoderSpec out;
  if (spec.is_null()) return out;
  const std::string type = Type(spec);
  if (type == "ByteLevel") {
    out.byte_level = true;
  } else if (type == "Metaspace") {
    out.replacements.emplace_back(StringField(spec, "replacement", kMetaspace), " ");
    const bool prefix = BoolField(spec, "add_prefix_space", StringField(spec, "prepend_scheme", "always") != "never");
    out.strip_leading_spaces = prefix ? 1 : 0;
  } else if (type == "ByteFallback") {
    out.byte_fallback = true;
  } else if (type == "Replace" && spec.contains("pattern") && spec["pattern"].contains("String")) {
    out.replacements.emplace_back(StringField(spec["pattern"], "String"), StringField(spec, "content"));
  } else if (type == "Strip" && StringField(spec, "content") == " " && spec.value("stop", 0) == 0) {
    out.strip_leading_spaces = spec.value("start", 0);
  } else if (type == "Sequence" && spec.contains("decoders") && spec["decoders"].is_array()) {
    for (const json& step : spec["decoders"]) {
      auto part = BuildDecoder(step);
      if (!part.ok()) return part.status();
      out.byte_level |= part->byte_level;
      out.byte_fallback |= part->byte_fallback;
      for (auto& replacement : part->replacements) out.replacements.push_back(std::move(replacement));
      out.strip_leading_spaces += part->strip_leading_spaces;
    }
  } else if (type != "Fuse") {
    return Unsupported("decoder", spec);
  }
  return out;
}

namespace {

// GPT-2's bytes_to_unicode: printable Latin-1 stands for itself, the rest is shifted to U+0100 and up.
const std::array<int32_t, 256>& ByteToCode() {
  static const std::array<int32_t, 256> table = [] {
    std::array<int32_t, 256> out{};
    int32_t next = 256;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      out[b] = printable ? b : next++;
    }
    return out;
  }();
  return table;
}

}  // namespace

std::string ByteLevelEncode(std::string_view bytes) {
  std::string out;
  for (const char byte : bytes) AppendUtf8(ByteToCode()[static_cast<uint8_t>(byte)], &out);
  return out;
}

std::string ByteLevelDecode(std::string_view text) {
  static const std::unordered_map<int32_t, char> kBytes = [] {
    std::unordered_map<int32_t, char> out;
    for (int b = 0; b < 256; ++b) out[ByteToCode()[b]] = static_cast<char>(b);
    return out;
  }();
  std::string out;
  while (!text.empty()) {
    const Utf8Char c = DecodeUtf8(text);
    const auto it = kBytes.find(c.code);
    if (it != kBytes.end()) {
      out.push_back(it->second);
    } else {
      out.append(text.substr(0, c.length));
    }
    text.remove_prefix(c.length);
  }
  return out;
}

}  // namespace linspec
