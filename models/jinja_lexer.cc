#include "models/jinja_lexer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>

#include "models/jinja_value.h"

namespace linspec::jinja {
namespace {

bool IsSpace(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }
bool IsNameStart(char c) { return std::isalpha(static_cast<unsigned char>(c)) || c == '_'; }
bool IsNameChar(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }
bool IsDigit(char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; }

// End of the tag that begins at `at`, quotes respected.
size_t FindTagEnd(std::string_view source, size_t at, std::string_view close) {
  char quote = 0;
  for (; at < source.size(); ++at) {
    const char c = source[at];
    if (quote != 0) {
      if (c == '\\') {
        ++at;
      } else if (c == quote) {
        quote = 0;
      }
    } else if (source.substr(at).starts_with(close)) {
      return at;
    } else if (c == '"' || c == '\'') {
      quote = c;
    }
  }
  return std::string_view::npos;
}

std::string_view Trim(std::string_view text) {
  while (!text.empty() && IsSpace(text.front())) text.remove_prefix(1);
  while (!text.empty() && IsSpace(text.back())) text.remove_suffix(1);
  return text;
}

class PartSplitter {
 public:
  explicit PartSplitter(std::string_view source) : source_(source) {}

  std::vector<Part> Run() {
    while (at_ < source_.size()) {
      const size_t open = FindOpen(at_);
      AddText(source_.substr(at_, open == std::string_view::npos ? open : open - at_), open);
      if (open == std::string_view::npos) break;
      ReadTag(open);
    }
    return std::move(parts_);
  }

 private:
  size_t FindOpen(size_t from) const {
    for (size_t at = source_.find('{', from); at != std::string_view::npos; at = source_.find('{', at + 1)) {
      if (at + 1 < source_.size() && (source_[at + 1] == '{' || source_[at + 1] == '%' || source_[at + 1] == '#'))
        return at;
    }
    return std::string_view::npos;
  }

  int LineAt(size_t at) const { return 1 + static_cast<int>(std::count(source_.begin(), source_.begin() + at, '\n')); }

  void AddText(std::string_view text, size_t open) {
    const int line = LineAt(at_);
    if (strip_next_) {
      while (!text.empty() && IsSpace(text.front())) text.remove_prefix(1);
    } else if (trim_newline_ && text.starts_with("\n")) {
      text.remove_prefix(1);
    }
    strip_next_ = trim_newline_ = false;
    if (open != std::string_view::npos) {
      const char mark = open + 2 < source_.size() ? source_[open + 2] : ' ';
      if (mark == '-') {
        while (!text.empty() && IsSpace(text.back())) text.remove_suffix(1);
      } else if (source_[open + 1] != '{' && mark != '+') {  // lstrip_blocks: spaces from the line's start to the tag
        size_t end = text.size();
        while (end > 0 && (text[end - 1] == ' ' || text[end - 1] == '\t')) --end;
        const bool at_line_start =
            end > 0 ? text[end - 1] == '\n' : (open - text.size() == 0 || source_[open - text.size() - 1] == '\n');
        if (at_line_start) text = text.substr(0, end);
      }
    }
    if (!text.empty()) parts_.push_back({Part::kText, std::string(text), line});
  }

  void ReadTag(size_t open) {
    const char type = source_[open + 1];
    const std::string_view close = type == '{' ? "}}" : type == '%' ? "%}" : "#}";
    const int line = LineAt(open);
    const size_t end = type == '#' ? source_.find(close, open + 2) : FindTagEnd(source_, open + 2, close);
    if (end == std::string_view::npos)
      Fail(fmt::format("line {}: '{}' is never closed", line, source_.substr(open, 2)));
    std::string_view content = source_.substr(open + 2, end - open - 2);
    if (content.starts_with('-') || content.starts_with('+')) content.remove_prefix(1);
    strip_next_ = content.ends_with('-');
    if (content.ends_with('-') || content.ends_with('+')) content.remove_suffix(1);
    trim_newline_ = type != '{' && !source_.substr(0, end).ends_with('+');
    at_ = end + 2;
    if (type == '#') return;
    content = Trim(content);
    if (type == '%' && content == "raw") return ReadRaw(line);
    parts_.push_back({type == '{' ? Part::kExpression : Part::kStatement, std::string(content), line});
  }

  void ReadRaw(int line) {
    size_t open = at_;
    for (; (open = source_.find("{%", open)) != std::string_view::npos; open += 2) {
      const size_t end = source_.find("%}", open);
      if (end == std::string_view::npos) break;
      std::string_view word = source_.substr(open + 2, end - open - 2);
      if (word.starts_with('-')) word.remove_prefix(1);
      if (word.ends_with('-')) word.remove_suffix(1);
      if (Trim(word) != "endraw") continue;
      AddText(source_.substr(at_, open - at_), open);
      strip_next_ = source_[end - 1] == '-';
      trim_newline_ = true;
      at_ = end + 2;
      return;
    }
    Fail(fmt::format("line {}: raw is never closed", line));
  }

  std::string_view source_;
  size_t at_ = 0;
  bool strip_next_ = false, trim_newline_ = false;
  std::vector<Part> parts_;
};

std::string Unescape(char c) {
  switch (c) {
    case 'n':
      return "\n";
    case 't':
      return "\t";
    case 'r':
      return "\r";
    case '\\':
    case '\'':
    case '"':
      return std::string(1, c);
    default:
      return std::string("\\") + c;
  }
}

}  // namespace

std::vector<Part> SplitParts(std::string_view source) { return PartSplitter(source).Run(); }

std::vector<Word> SplitWords(std::string_view content, int line) {
  std::vector<Word> words;
  static constexpr std::string_view kTwo[] = {"==", "!=", "<=", ">=", "//", "**"};
  for (size_t i = 0; i < content.size();) {
    const char c = content[i];
    if (IsSpace(c)) {
      line += c == '\n';
      ++i;
    } else if (IsNameStart(c)) {
      size_t end = i;
      while (end < content.size() && IsNameChar(content[end])) ++end;
      words.push_back({Word::kName, std::string(content.substr(i, end - i)), line});
      i = end;
    } else if (IsDigit(c)) {
      size_t end = i;
      bool is_float = false;
      while (end < content.size() && (IsDigit(content[end]) || content[end] == '_')) ++end;
      if (end + 1 < content.size() && content[end] == '.' && IsDigit(content[end + 1])) {
        is_float = true;
        ++end;
        while (end < content.size() && IsDigit(content[end])) ++end;
      }
      words.push_back({is_float ? Word::kFloat : Word::kInt, std::string(content.substr(i, end - i)), line});
      i = end;
    } else if (c == '"' || c == '\'') {
      std::string text;
      size_t end = i + 1;
      for (; end < content.size() && content[end] != c; ++end) {
        if (content[end] == '\\' && end + 1 < content.size()) {
          text += Unescape(content[++end]);
        } else {
          text += content[end];
        }
      }
      if (end >= content.size()) Fail(fmt::format("line {}: a string is never closed", line));
      words.push_back({Word::kString, std::move(text), line});
      i = end + 1;
    } else {
      const std::string_view two = content.substr(i, 2);
      const bool is_two = std::find(std::begin(kTwo), std::end(kTwo), two) != std::end(kTwo);
      if (!is_two && std::string_view("+-*/%~|.,:()[]{}<>=").find(c) == std::string_view::npos) {
        Fail(fmt::format("line {}: unexpected character '{}'", line, c));
      }
      words.push_back({Word::kOperator, std::string(content.substr(i, is_two ? 2 : 1)), line});
      i += is_two ? 2 : 1;
    }
  }
  words.push_back({Word::kEnd, "", line});
  return words;
}

}  // namespace linspec::jinja
