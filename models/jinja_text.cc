#include "models/jinja_text.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>

namespace linspec::jinja {
namespace {

template <typename Change>
std::string Mapped(std::string text, Change change) {  // ASCII case rules; other characters stay
  for (char& c : text) c = static_cast<char>(change(static_cast<unsigned char>(c)));
  return text;
}

}  // namespace

const std::string& Text(const Value& value, const char* what) {
  if (!value.is_string()) Fail(fmt::format("{} needs a string, got {}", what, KindName(value.kind())));
  return value.string();
}

std::string Upper(std::string text) { return Mapped(std::move(text), ::toupper); }
std::string Lower(std::string text) { return Mapped(std::move(text), ::tolower); }
std::string Capitalize(std::string text) {
  text = Lower(std::move(text));
  if (!text.empty()) text[0] = static_cast<char>(::toupper(static_cast<unsigned char>(text[0])));
  return text;
}
std::string Title(std::string text) {
  bool start = true;
  for (char& c : text) {
    const auto u = static_cast<unsigned char>(c);
    c = static_cast<char>(start ? ::toupper(u) : ::tolower(u));
    start = ::isalpha(u) == 0;
  }
  return text;
}

std::string Strip(std::string text, const Value& characters, bool left, bool right) {
  const std::string set = characters.is_string() ? characters.string() : " \t\n\r\f\v";
  if (right) text.erase(text.find_last_not_of(set) + 1);
  if (left) text.erase(0, std::min(text.find_first_not_of(set), text.size()));
  return text;
}

std::string Replace(const std::string& text, const std::string& from, const std::string& to, int64_t limit) {
  if (from.empty()) return text;
  std::string out;
  size_t at = 0;
  for (size_t found; limit != 0 && (found = text.find(from, at)) != std::string::npos; --limit) {
    out.append(text, at, found - at).append(to);
    at = found + from.size();
  }
  return out.append(text, at);
}

List Split(const std::string& text, const Value& separator, int64_t limit) {
  List out;
  if (!separator.is_string()) {  // runs of white space
    for (size_t at = text.find_first_not_of(" \t\n\r\f\v"); at != std::string::npos;) {
      size_t end = limit == 0 ? text.size() : std::min(text.find_first_of(" \t\n\r\f\v", at), text.size());
      out.emplace_back(text.substr(at, end - at));
      --limit;
      at = text.find_first_not_of(" \t\n\r\f\v", end);
    }
    return out;
  }
  const std::string& by = separator.string();
  if (by.empty()) Fail("split needs a separator that is not empty");
  size_t at = 0;
  for (size_t found; limit != 0 && (found = text.find(by, at)) != std::string::npos; --limit) {
    out.emplace_back(text.substr(at, found - at));
    at = found + by.size();
  }
  out.emplace_back(text.substr(at));
  return out;
}

int64_t LimitOf(const Value& value) { return value.is_number() ? value.integer() : -1; }

bool StartsOrEndsWith(const std::string& text, const Value& affix, bool start) {
  for (const Value& option : affix.is_list() ? affix.list() : List{affix}) {
    const std::string& part = Text(option, start ? "startswith" : "endswith");
    if (start ? text.starts_with(part) : text.ends_with(part)) return true;
  }
  return false;
}

}  // namespace linspec::jinja
