#include "models/tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <unordered_map>
#include <utility>

#include "models/bpe.h"
#include "models/json_check.h"
#include "models/text_pipeline.h"
#include "models/utf8.h"

namespace linspec {
namespace {

using nlohmann::json;

constexpr int64_t kMaxVocabulary = int64_t{1} << 22;

absl::Status Bad(const std::string& message) { return absl::InvalidArgumentError("tokenizer.json: " + message); }

struct AddedToken {
  int32_t id;
  std::string content;
  bool special, lstrip, rstrip, single_word;
};

// A part of the input: either an added token or text still to be encoded.
struct Segment {
  std::string text;
  int32_t added_id = -1;
};

bool IsWordByte(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || (c & 0x80); }

class BpeTokenizer : public Tokenizer {
 public:
  absl::Status Load(const json& root);

  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, EncodeOptions options) const override;
  absl::StatusOr<std::string> Decode(std::span<const int32_t> ids, bool skip_special_tokens) const override;
  int64_t vocab_size() const override { return static_cast<int64_t>(tokens_.size()); }
  int32_t TokenToId(std::string_view token) const override;
  std::string IdToToken(int32_t id) const override { return Known(id) ? tokens_[id] : ""; }
  std::string TokenBytes(int32_t id) const override { return Known(id) ? bytes_[id] : ""; }
  bool IsSpecial(int32_t id) const override { return Known(id) && special_[id]; }
  int leading_spaces_to_strip() const override { return decoder_.strip_leading_spaces; }

 private:
  bool Known(int32_t id) const { return id >= 0 && id < vocab_size(); }
  absl::Status LoadModel(const json& model);
  absl::Status LoadMerges(const json& merges);
  absl::Status LoadAddedTokens(const json& added);
  absl::Status LoadPostProcessor(const json& spec);
  absl::Status AddId(int64_t id, const std::string& token, const std::string& what);
  void ComputeBytes();
  std::vector<Segment> SplitAddedTokens(std::string_view text, bool parse_special) const;

  Bpe bpe_;
  Normalizer normalizer_;
  PreTokenizer pre_tokenizer_;
  DecoderSpec decoder_;
  std::vector<std::string> tokens_, bytes_;  // by id; "" for a gap
  std::vector<bool> special_, added_flag_;
  std::vector<AddedToken> added_;  // longest first
  std::array<bool, 256> added_first_byte_{};
  std::vector<int32_t> prefix_, suffix_;  // what the post-processor adds around one text
};

absl::Status BpeTokenizer::AddId(int64_t id, const std::string& token, const std::string& what) {
  if (id < 0 || id >= kMaxVocabulary)
    return Bad(fmt::format("{} '{}' has id {}, outside 0..{}", what, token, id, kMaxVocabulary - 1));
  if (id >= vocab_size()) {
    tokens_.resize(id + 1);
    special_.resize(id + 1, false);
    added_flag_.resize(id + 1, false);
  }
  if (!tokens_[id].empty() && tokens_[id] != token) {
    return Bad(fmt::format("id {} names both '{}' and '{}'", id, tokens_[id], token));
  }
  tokens_[id] = token;
  return absl::OkStatus();
}

absl::Status BpeTokenizer::LoadModel(const json& model) {
  const std::string type = model.value("type", "BPE");
  if (type != "BPE") return Bad(fmt::format("model type '{}' is not supported, only BPE", type));
  if (!model.contains("vocab") || !model["vocab"].is_object()) return Bad("model.vocab is not an object");
  for (const auto& [token, id] : model["vocab"].items()) {
    if (!id.is_number_integer()) return Bad(fmt::format("model.vocab['{}'] is not an integer", token));
    if (absl::Status status = AddId(id.get<int64_t>(), token, "token"); !status.ok()) return status;
    bpe_.vocabulary.emplace(token, id.get<int32_t>());
  }
  bpe_.fuse_unk = model.value("fuse_unk", false);
  bpe_.byte_fallback = model.value("byte_fallback", false);
  bpe_.ignore_merges = model.value("ignore_merges", false);
  for (const char* field : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (model.contains(field) && model[field].is_string() && !model[field].get<std::string>().empty()) {
      return Bad(fmt::format("model.{} is not supported", field));
    }
  }
  if (model.contains("unk_token") && model["unk_token"].is_string()) {
    const auto it = bpe_.vocabulary.find(model["unk_token"].get<std::string>());
    if (it != bpe_.vocabulary.end()) bpe_.unk_id = it->second;
  }
  for (int b = 0; b < 256; ++b) {
    const auto it = bpe_.vocabulary.find(fmt::format("<0x{:02X}>", b));
    bpe_.byte_ids[b] = it == bpe_.vocabulary.end() ? -1 : it->second;
  }
  return LoadMerges(model.value("merges", json::array()));
}

absl::Status BpeTokenizer::LoadMerges(const json& merges) {
  if (!merges.is_array()) return Bad("model.merges is not a list");
  int32_t rank = 0;
  for (const json& entry : merges) {
    std::string left, right;
    if (entry.is_string()) {
      const std::string pair = entry.get<std::string>();
      const size_t space = pair.find(' ');
      if (space != std::string::npos) {
        left = pair.substr(0, space);
        right = pair.substr(space + 1);
      }
    } else if (entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string()) {
      left = entry[0].get<std::string>();
      right = entry[1].get<std::string>();
    }
    const auto l = bpe_.vocabulary.find(left), r = bpe_.vocabulary.find(right),
               merged = bpe_.vocabulary.find(left + right);
    if (left.empty() || right.empty() || l == bpe_.vocabulary.end() || r == bpe_.vocabulary.end() ||
        merged == bpe_.vocabulary.end()) {
      return Bad(fmt::format("merge {} does not join two tokens of the vocabulary into a third", rank));
    }
    bpe_.merges.try_emplace(Bpe::PairKey(l->second, r->second), Bpe::Merge{rank, merged->second});
    ++rank;
  }
  return absl::OkStatus();
}

absl::Status BpeTokenizer::LoadAddedTokens(const json& added) {
  if (!added.is_array()) return Bad("added_tokens is not a list");
  for (const json& entry : added) {
    if (!entry.is_object() || !entry.contains("id") || !entry["id"].is_number_integer() || !entry.contains("content") ||
        !entry["content"].is_string()) {
      return Bad("an added token lacks an integer id or a string content");
    }
    AddedToken token{-1,
                     entry["content"].get<std::string>(),
                     entry.value("special", false),
                     entry.value("lstrip", false),
                     entry.value("rstrip", false),
                     entry.value("single_word", false)};
    if (token.content.empty()) return Bad("an added token is empty");
    const int64_t id = entry["id"].get<int64_t>();
    if (absl::Status status = AddId(id, token.content, "added token"); !status.ok()) return status;
    token.id = static_cast<int32_t>(id);
    special_[id] = token.special;
    added_flag_[id] = true;
    added_first_byte_[static_cast<uint8_t>(token.content[0])] = true;
    added_.push_back(std::move(token));
  }
  std::stable_sort(added_.begin(), added_.end(),
                   [](const AddedToken& a, const AddedToken& b) { return a.content.size() > b.content.size(); });
  return absl::OkStatus();
}

absl::Status BpeTokenizer::LoadPostProcessor(const json& spec) {
  if (spec.is_null()) return absl::OkStatus();
  const std::string type = spec.value("type", "");
  if (type == "ByteLevel") return absl::OkStatus();  // touches offsets only
  if (type == "Sequence" && spec.contains("processors") && spec["processors"].is_array()) {
    for (const json& step : spec["processors"]) {
      if (absl::Status status = LoadPostProcessor(step); !status.ok()) return status;
    }
    return absl::OkStatus();
  }
  if (type != "TemplateProcessing" || !spec.contains("single") || !spec["single"].is_array()) {
    return Bad(fmt::format("post_processor '{}' is not supported", type));
  }
  bool after_text = false;
  for (const json& item : spec["single"]) {
    if (item.contains("Sequence")) {
      after_text = true;
      continue;
    }
    const std::string name = item.contains("SpecialToken") ? item["SpecialToken"].value("id", "") : "";
    const int32_t id = TokenToId(name);
    if (id < 0) return Bad(fmt::format("post_processor names the unknown token '{}'", name));
    (after_text ? suffix_ : prefix_).push_back(id);
  }
  return absl::OkStatus();
}

// What each id contributes to decoded text, before the whole-text strip.
void BpeTokenizer::ComputeBytes() {
  bytes_.resize(tokens_.size());
  for (size_t id = 0; id < tokens_.size(); ++id) {
    std::string text = tokens_[id];
    if (!added_flag_[id]) {
      if (decoder_.byte_level) text = ByteLevelDecode(text);
      for (const auto& [from, to] : decoder_.replacements) {
        for (size_t at = from.empty() ? std::string::npos : text.find(from); at != std::string::npos;
             at = text.find(from, at + to.size())) {
          text.replace(at, from.size(), to);
        }
      }
      unsigned value = 0;
      if (decoder_.byte_fallback && text.size() == 6 && std::sscanf(text.c_str(), "<0x%2X>", &value) == 1 &&
          text.back() == '>') {
        text = std::string(1, static_cast<char>(value));
      }
    }
    bytes_[id] = std::move(text);
  }
}

absl::Status BpeTokenizer::Load(const json& root) {
  if (!root.is_object() || !root.contains("model") || !root["model"].is_object()) return Bad("no model object");
  if (absl::Status status = LoadModel(root["model"]); !status.ok()) return status;
  if (absl::Status status = LoadAddedTokens(root.value("added_tokens", json::array())); !status.ok()) return status;
  auto normalizer = BuildNormalizer(root.value("normalizer", json()));
  if (!normalizer.ok()) return normalizer.status();
  normalizer_ = *std::move(normalizer);
  auto pre_tokenizer = BuildPreTokenizer(root.value("pre_tokenizer", json()));
  if (!pre_tokenizer.ok()) return pre_tokenizer.status();
  pre_tokenizer_ = *std::move(pre_tokenizer);
  auto decoder = BuildDecoder(root.value("decoder", json()));
  if (!decoder.ok()) return decoder.status();
  decoder_ = *std::move(decoder);
  if (absl::Status status = LoadPostProcessor(root.value("post_processor", json())); !status.ok()) return status;
  ComputeBytes();
  return absl::OkStatus();
}

int32_t BpeTokenizer::TokenToId(std::string_view token) const {
  for (const AddedToken& added : added_) {
    if (added.content == token) return added.id;
  }
  const auto it = bpe_.vocabulary.find(token);
  return it == bpe_.vocabulary.end() ? -1 : it->second;
}

// Leftmost, longest added token wins; lstrip and rstrip swallow the white space beside it.
std::vector<Segment> BpeTokenizer::SplitAddedTokens(std::string_view text, bool parse_special) const {
  std::vector<Segment> segments;
  size_t begin = 0, at = 0;
  while (at < text.size()) {
    const AddedToken* found = nullptr;
    if (added_first_byte_[static_cast<uint8_t>(text[at])]) {
      for (const AddedToken& token : added_) {
        if ((token.special && !parse_special) || !text.substr(at).starts_with(token.content)) continue;
        const size_t end = at + token.content.size();
        if (token.single_word && ((at > 0 && IsWordByte(text[at - 1])) || (end < text.size() && IsWordByte(text[end]))))
          continue;
        found = &token;
        break;
      }
    }
    if (found == nullptr) {
      ++at;
      continue;
    }
    size_t end = at, next = at + found->content.size();
    while (found->lstrip && end > begin && std::isspace(static_cast<unsigned char>(text[end - 1]))) --end;
    while (found->rstrip && next < text.size() && std::isspace(static_cast<unsigned char>(text[next]))) ++next;
    if (end > begin) segments.push_back({std::string(text.substr(begin, end - begin))});
    segments.push_back({"", found->id});
    begin = at = next;
  }
  if (begin < text.size()) segments.push_back({std::string(text.substr(begin))});
  return segments;
}

absl::StatusOr<std::vector<int32_t>> BpeTokenizer::Encode(std::string_view text, EncodeOptions options) const {
  std::vector<int32_t> ids;
  if (options.add_special_tokens) ids = prefix_;
  bool first = true;
  for (Segment& segment : SplitAddedTokens(ToValidUtf8(text), options.parse_special)) {
    if (segment.added_id >= 0) {
      ids.push_back(segment.added_id);
      first = false;
      continue;
    }
    std::vector<std::string> pieces = {normalizer_ ? normalizer_(std::move(segment.text)) : std::move(segment.text)};
    // Metaspace's "first" scheme: a leading empty piece tells it that this text does not begin the input.
    if (!first) pieces.insert(pieces.begin(), "");
    if (pre_tokenizer_) {
      if (absl::Status status = pre_tokenizer_(&pieces); !status.ok()) return status;
    }
    for (const std::string& piece : pieces) {
      if (!piece.empty()) bpe_.Encode(piece, &ids);
    }
    first = false;
  }
  if (options.add_special_tokens) ids.insert(ids.end(), suffix_.begin(), suffix_.end());
  return ids;
}

absl::StatusOr<std::string> BpeTokenizer::Decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  std::string out;
  for (const int32_t id : ids) {
    if (!Known(id)) {
      return absl::OutOfRangeError(fmt::format("token id {} is outside the vocabulary of {}", id, vocab_size()));
    }
    if (!(skip_special_tokens && special_[id])) out += bytes_[id];
  }
  int strip = decoder_.strip_leading_spaces;
  size_t at = 0;
  while (strip > 0 && at < out.size() && out[at] == ' ') {
    ++at;
    --strip;
  }
  return out.substr(at);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromJson(std::string_view text) {
  if (absl::Status status = CheckJson(text); !status.ok()) return Bad(std::string(status.message()));
  // Typed accessors below throw on a wrong type; a tokenizer file is not ours, so that is an error of the file.
  try {
    auto tokenizer = std::make_unique<BpeTokenizer>();
    if (absl::Status status = tokenizer->Load(json::parse(text)); !status.ok()) return status;
    return std::unique_ptr<Tokenizer>(std::move(tokenizer));
  } catch (const json::exception& error) {
    return Bad(error.what());
  }
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(fmt::format("cannot open {}", path));
  std::ostringstream content;
  content << file.rdbuf();
  return FromJson(content.str());
}

IncrementalDecoder::IncrementalDecoder(const Tokenizer* tokenizer, bool skip_special_tokens)
    : tokenizer_(tokenizer),
      skip_special_tokens_(skip_special_tokens),
      spaces_to_strip_(tokenizer->leading_spaces_to_strip()) {}

std::string IncrementalDecoder::Push(int32_t id) {
  if (!(skip_special_tokens_ && tokenizer_->IsSpecial(id))) pending_ += tokenizer_->TokenBytes(id);
  size_t begin = 0;
  while (spaces_to_strip_ > 0 && begin < pending_.size()) {
    if (pending_[begin] != ' ') {
      spaces_to_strip_ = 0;
      break;
    }
    ++begin;
    --spaces_to_strip_;
  }
  pending_.erase(0, begin);
  std::string out;
  std::string_view rest = pending_;
  while (!rest.empty()) {
    const Utf8Char c = DecodeUtf8(rest);
    if (c.truncated) break;
    if (c.code < 0) {
      out += "\xEF\xBF\xBD";
    } else {
      out.append(rest.substr(0, c.length));
    }
    rest.remove_prefix(c.length);
  }
  pending_ = std::string(rest);
  return out;
}

std::string IncrementalDecoder::Finish() {
  std::string out = ToValidUtf8(pending_);
  pending_.clear();
  return out;
}

}  // namespace linspec
