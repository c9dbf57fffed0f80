#include "models/jinja_builtins.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <unordered_map>

#include "models/utf8.h"

namespace linspec::jinja {
namespace {

constexpr int64_t kMaxRange = 100'000;  // as Jinja's sandbox

const std::string& Text(const Value& value, const char* what) {
  if (!value.is_string()) Fail(fmt::format("{} needs a string, got {}", what, KindName(value.kind())));
  return value.string();
}

template <typename Change>
std::string Mapped(std::string text, Change change) {  // ASCII case rules; other characters stay
  for (char& c : text) c = static_cast<char>(change(static_cast<unsigned char>(c)));
  return text;
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

List Items(const Value& dict) {
  List out;
  for (const auto& [key, value] : dict.dict()) out.emplace_back(List{key, value});
  return out;
}
List Keys(const Value& dict) {
  List out;
  for (const auto& entry : dict.dict()) out.emplace_back(entry.first);
  return out;
}
List Values(const Value& dict) {
  List out;
  for (const auto& entry : dict.dict()) out.push_back(entry.second);
  return out;
}

Value StringMethod(const std::string& text, const std::string& name) {
  using Method = Value (*)(const std::string&, const Arguments&);
  static const std::unordered_map<std::string, Method> kMethods = {
      {"strip",
       [](const std::string& s, const Arguments& a) -> Value { return Strip(s, a.Get(0, "chars"), true, true); }},
      {"lstrip",
       [](const std::string& s, const Arguments& a) -> Value { return Strip(s, a.Get(0, "chars"), true, false); }},
      {"rstrip",
       [](const std::string& s, const Arguments& a) -> Value { return Strip(s, a.Get(0, "chars"), false, true); }},
      {"upper", [](const std::string& s, const Arguments&) -> Value { return Upper(s); }},
      {"lower", [](const std::string& s, const Arguments&) -> Value { return Lower(s); }},
      {"title", [](const std::string& s, const Arguments&) -> Value { return Title(s); }},
      {"capitalize", [](const std::string& s, const Arguments&) -> Value { return Capitalize(s); }},
      {"startswith",
       [](const std::string& s, const Arguments& a) -> Value { return StartsOrEndsWith(s, a.Get(0, "prefix"), true); }},
      {"endswith",
       [](const std::string& s, const Arguments& a) -> Value {
         return StartsOrEndsWith(s, a.Get(0, "suffix"), false);
       }},
      {"split",
       [](const std::string& s, const Arguments& a) -> Value {
         return Split(s, a.Get(0, "sep"), LimitOf(a.Get(1, "maxsplit")));
       }},
      {"splitlines",
       [](const std::string& s, const Arguments&) -> Value {
         if (s.empty()) return List{};
         return Split(s.ends_with('\n') ? s.substr(0, s.size() - 1) : s, Value("\n"), -1);
       }},
      {"replace",
       [](const std::string& s, const Arguments& a) -> Value {
         return Replace(s, Text(a.Get(0, "old"), "replace"), Text(a.Get(1, "new"), "replace"),
                        LimitOf(a.Get(2, "count")));
       }},
      {"find",
       [](const std::string& s, const Arguments& a) -> Value {
         const size_t at = s.find(Text(a.Get(0, "sub"), "find"));
         return at == std::string::npos ? int64_t{-1} : static_cast<int64_t>(at);
       }},
      {"isdigit",
       [](const std::string& s, const Arguments&) -> Value {
         return !s.empty() && s.find_first_not_of("0123456789") == std::string::npos;
       }},
  };
  const auto it = kMethods.find(name);
  if (it == kMethods.end()) return {};
  return Function([text, method = it->second](Arguments& arguments) { return method(text, arguments); });
}

Value DictMethod(const Value& dict, const std::string& name) {
  if (name == "items") return Function([dict](Arguments&) -> Value { return Items(dict); });
  if (name == "keys") return Function([dict](Arguments&) -> Value { return Keys(dict); });
  if (name == "values") return Function([dict](Arguments&) -> Value { return Values(dict); });
  if (name == "get") {
    return Function([dict](Arguments& a) -> Value {
      const Value key = a.Get(0, "key");
      const Value* found = key.is_string() ? dict.Find(key.string()) : nullptr;
      if (found != nullptr) return *found;
      const Value fallback = a.Get(1, "default");
      return fallback.is_undefined() ? Value::None() : fallback;
    });
  }
  return {};
}

Value Attribute(const Value& item, const std::string& path) {  // "a.b" as in map(attribute=...)
  Value out = item;
  for (const Value& step : Split(path, Value("."), -1)) out = GetAttribute(out, step.string());
  return out;
}

// As Jinja: map and select over anything falsy (none too) give nothing.
List IterateIfTruthy(const Value& value) { return value.Truthy() ? Iterate(value) : List{}; }

List MapList(const Arguments& a) {
  const Value attribute = a.Get(99, "attribute");
  List out;
  for (const Value& item : IterateIfTruthy(a.positional[0])) {
    if (attribute.is_string()) {
      out.push_back(Attribute(item, attribute.string()));
      continue;
    }
    Arguments inner;
    inner.positional = {item};
    for (size_t i = 2; i < a.positional.size(); ++i) inner.positional.push_back(a.positional[i]);
    out.push_back(ApplyFilter(Text(a.Get(1, "filter"), "map"), inner));
  }
  return out;
}

// select, reject (test on the item) and selectattr, rejectattr (test on an attribute); no test: truth.
List Select(const Arguments& a, bool by_attribute, bool keep) {
  List out;
  const size_t test_at = by_attribute ? 2 : 1;
  for (const Value& item : IterateIfTruthy(a.positional[0])) {
    const Value subject = by_attribute ? Attribute(item, Text(a.Get(1, "attribute"), "selectattr")) : item;
    bool passes = subject.Truthy();
    if (a.positional.size() > test_at) {
      Arguments inner;
      inner.positional = {subject};
      for (size_t i = test_at + 1; i < a.positional.size(); ++i) inner.positional.push_back(a.positional[i]);
      passes = ApplyTest(Text(a.positional[test_at], "select"), inner);
    }
    if (passes == keep) out.push_back(item);
  }
  return out;
}

List Sorted(const Arguments& a) {
  List out = Iterate(a.positional[0]);
  const Value attribute = a.Get(3, "attribute");
  const bool reverse = a.Get(1, "reverse").Truthy();
  const auto key = [&attribute](const Value& v) {
    Value out = attribute.is_string() ? Attribute(v, attribute.string()) : v;
    return out.is_string() ? Value(Lower(out.string())) : out;
  };
  std::stable_sort(out.begin(), out.end(), [&](const Value& x, const Value& y) {
    return reverse ? Compare(key(x), key(y)) > 0 : Compare(key(x), key(y)) < 0;
  });
  return out;
}

std::string Join(const Arguments& a) {
  const Value separator = a.Get(1, "d"), attribute = a.Get(2, "attribute");
  std::string out;
  bool first = true;
  for (const Value& item : Iterate(a.positional[0])) {
    if (!first && separator.is_string()) out += separator.string();
    out += ToText(attribute.is_string() ? Attribute(item, attribute.string()) : item);
    first = false;
  }
  return out;
}

int64_t Length(const Value& value) {
  if (value.is_string()) {
    return std::count_if(value.string().begin(), value.string().end(), [](char c) { return (c & 0xC0) != 0x80; });
  }
  if (value.is_list()) return static_cast<int64_t>(value.list().size());
  if (value.is_dict()) return static_cast<int64_t>(value.dict().size());
  if (value.is_undefined()) return 0;
  Fail(fmt::format("length of {}", KindName(value.kind())));
}

std::string Indent(const Arguments& a) {
  const Value width = a.Get(1, "width");
  const std::string pad = width.is_string()
                              ? width.string()
                              : std::string(width.is_number() ? std::clamp<int64_t>(width.integer(), 0, 1000) : 4, ' ');
  const bool first = a.Get(2, "first").Truthy();
  std::string out = first ? pad : "";
  for (const char c : ToText(a.positional[0])) {
    out += c;
    if (c == '\n') out += pad;
  }
  return out;
}

Value ToInt(const Value& value, const Value& fallback) {
  if (value.is_number()) return value.integer();
  if (value.is_string()) {
    char* end = nullptr;
    const long long number = std::strtoll(value.string().c_str(), &end, 10);
    if (end != value.string().c_str()) return static_cast<int64_t>(number);
  }
  return fallback.is_undefined() ? Value(0) : fallback;
}

using Filter = Value (*)(Arguments&);

const std::unordered_map<std::string, Filter>& Filters() {
  static const std::unordered_map<std::string, Filter> kFilters = {
      {"trim", [](Arguments& a) -> Value { return Strip(ToText(a.positional[0]), a.Get(1, "chars"), true, true); }},
      {"upper", [](Arguments& a) -> Value { return Upper(ToText(a.positional[0])); }},
      {"lower", [](Arguments& a) -> Value { return Lower(ToText(a.positional[0])); }},
      {"title", [](Arguments& a) -> Value { return Title(ToText(a.positional[0])); }},
      {"capitalize", [](Arguments& a) -> Value { return Capitalize(ToText(a.positional[0])); }},
      {"string", [](Arguments& a) -> Value { return ToText(a.positional[0]); }},
      {"safe", [](Arguments& a) -> Value { return Value::Markup(ToText(a.positional[0])); }},
      {"escape",
       [](Arguments& a) -> Value {
         return a.positional[0].is_markup() ? a.positional[0] : Value::Markup(EscapeHtml(ToText(a.positional[0])));
       }},
      {"tojson",
       [](Arguments& a) -> Value {
         const Value indent = a.Get(1, "indent");
         return ToJson(a.positional[0],
                       indent.is_number() ? static_cast<int>(std::clamp<int64_t>(indent.integer(), 0, 16)) : -1);
       }},
      {"length", [](Arguments& a) -> Value { return Length(a.positional[0]); }},
      {"count", [](Arguments& a) -> Value { return Length(a.positional[0]); }},
      {"join", [](Arguments& a) -> Value { return Join(a); }},
      {"replace",
       [](Arguments& a) -> Value {
         return Replace(ToText(a.positional[0]), ToText(a.Get(1, "old")), ToText(a.Get(2, "new")),
                        LimitOf(a.Get(3, "count")));
       }},
      {"default",
       [](Arguments& a) -> Value {
         const bool missing =
             a.positional[0].is_undefined() || (a.Get(2, "boolean").Truthy() && !a.positional[0].Truthy());
         const Value fallback = a.Get(1, "default_value");
         return !missing ? a.positional[0] : fallback.is_undefined() ? Value("") : fallback;
       }},
      {"first",
       [](Arguments& a) -> Value {
         const List l = Iterate(a.positional[0]);
         return l.empty() ? Value() : l.front();
       }},
      {"last",
       [](Arguments& a) -> Value {
         const List l = Iterate(a.positional[0]);
         return l.empty() ? Value() : l.back();
       }},
      {"list", [](Arguments& a) -> Value { return Iterate(a.positional[0]); }},
      {"items",
       [](Arguments& a) -> Value {
         if (a.positional[0].is_undefined()) return List{};
         if (!a.positional[0].is_dict()) Fail("items needs a mapping");
         return Items(a.positional[0]);
       }},
      {"dictsort",
       [](Arguments& a) -> Value {
         if (!a.positional[0].is_dict()) Fail("dictsort needs a mapping");
         List out = Items(a.positional[0]);
         std::stable_sort(out.begin(), out.end(), [](const Value& x, const Value& y) {
           return Lower(x.list()[0].string()) < Lower(y.list()[0].string());
         });
         return out;
       }},
      {"map", [](Arguments& a) -> Value { return MapList(a); }},
      {"select", [](Arguments& a) -> Value { return Select(a, false, true); }},
      {"reject", [](Arguments& a) -> Value { return Select(a, false, false); }},
      {"selectattr", [](Arguments& a) -> Value { return Select(a, true, true); }},
      {"rejectattr", [](Arguments& a) -> Value { return Select(a, true, false); }},
      {"sort", [](Arguments& a) -> Value { return Sorted(a); }},
      {"reverse",
       [](Arguments& a) -> Value {
         List out = Iterate(a.positional[0]);
         std::reverse(out.begin(), out.end());
         if (!a.positional[0].is_string()) return out;
         std::string text;
         for (const Value& c : out) text += c.string();
         return text;
       }},
      {"unique",
       [](Arguments& a) -> Value {
         List out;
         for (const Value& item : Iterate(a.positional[0])) {
           if (std::none_of(out.begin(), out.end(), [&](const Value& o) { return Equal(o, item); }))
             out.push_back(item);
         }
         return out;
       }},
      {"int", [](Arguments& a) -> Value { return ToInt(a.positional[0], a.Get(1, "default")); }},
      {"float",
       [](Arguments& a) -> Value {
         const Value& v = a.positional[0];
         return v.is_number() ? v.number() : v.is_string() ? std::strtod(v.string().c_str(), nullptr) : 0.0;
       }},
      {"abs",
       [](Arguments& a) -> Value {
         const Value& v = a.positional[0];
         if (!v.is_number()) Fail("abs needs a number");
         return v.kind() == Kind::kFloat ? Value(std::fabs(v.number()))
                                         : Value(v.integer() < 0 ? -v.integer() : v.integer());
       }},
      {"round",
       [](Arguments& a) -> Value {
         if (!a.positional[0].is_number()) Fail("round needs a number");
         const double scale = std::pow(10.0, a.Get(1, "precision").is_number() ? a.Get(1, "precision").number() : 0.0);
         return std::nearbyint(a.positional[0].number() * scale) / scale;
       }},
      {"indent", [](Arguments& a) -> Value { return Indent(a); }},
  };
  return kFilters;
}

}  // namespace

Value ApplyFilter(const std::string& name, Arguments& arguments) {
  const std::string& known = name == "d" ? "default" : name == "e" ? "escape" : name;
  const auto it = Filters().find(known);
  if (it == Filters().end()) Fail(fmt::format("filter '{}' is not supported", name));
  return it->second(arguments);
}

bool ApplyTest(const std::string& name, const Arguments& a) {
  const Value& value = a.positional[0];
  const Kind kind = value.kind();
  if (name == "defined") return !value.is_undefined();
  if (name == "undefined") return value.is_undefined();
  if (name == "none") return kind == Kind::kNone;
  if (name == "string") return kind == Kind::kString;
  if (name == "mapping") return kind == Kind::kDict;
  if (name == "sequence" || name == "iterable")
    return kind == Kind::kList || kind == Kind::kDict || kind == Kind::kString;
  if (name == "number") return value.is_number();
  if (name == "integer") return kind == Kind::kInt;
  if (name == "float") return kind == Kind::kFloat;
  if (name == "boolean") return kind == Kind::kBool;
  if (name == "true") return kind == Kind::kBool && value.Truthy();
  if (name == "false") return kind == Kind::kBool && !value.Truthy();
  if (name == "callable") return kind == Kind::kFunction;
  if (name == "odd") return value.is_number() && value.integer() % 2 != 0;
  if (name == "even") return value.is_number() && value.integer() % 2 == 0;
  if (name == "lower") return value.is_string() && Lower(value.string()) == value.string();
  if (name == "upper") return value.is_string() && Upper(value.string()) == value.string();
  const Value other = a.Get(1, "other");
  if (name == "equalto" || name == "eq" || name == "sameas") return Equal(value, other);
  if (name == "ne") return !Equal(value, other);
  if (name == "lt" || name == "lessthan") return Compare(value, other) < 0;
  if (name == "gt" || name == "greaterthan") return Compare(value, other) > 0;
  if (name == "le") return Compare(value, other) <= 0;
  if (name == "ge") return Compare(value, other) >= 0;
  if (name == "in") return Contains(other, value);
  if (name == "divisibleby") {
    if (!other.is_number() || other.integer() == 0) Fail("divisibleby needs a number other than zero");
    return value.integer() % other.integer() == 0;
  }
  Fail(fmt::format("test '{}' is not supported", name));
}

Value GetAttribute(const Value& object, const std::string& name) {
  switch (object.kind()) {
    case Kind::kUndefined:
      Fail(fmt::format("'{}' asked of an undefined value", name));
    case Kind::kDict: {
      Value method = DictMethod(object, name);
      if (!method.is_undefined()) return method;
      const Value* found = object.Find(name);
      return found != nullptr ? *found : Value();
    }
    case Kind::kString:
      return StringMethod(object.string(), name);
    case Kind::kList:
      if (name == "append") {
        return Function([object](Arguments& a) -> Value {
          object.list().push_back(a.Get(0, "object"));
          return Value::None();
        });
      }
      return {};
    default:
      return {};
  }
}

Value GetItem(const Value& object, const Value& key) {
  if (object.is_undefined()) Fail("an item asked of an undefined value");
  if (object.is_dict()) {
    const Value* found = key.is_string() ? object.Find(key.string()) : nullptr;
    return found != nullptr ? *found : Value();
  }
  if ((object.is_list() || object.is_string()) && key.is_number()) {
    const List items = object.is_list() ? List{} : Iterate(object);
    const List& list = object.is_list() ? object.list() : items;
    const int64_t size = static_cast<int64_t>(list.size());
    const int64_t index = key.integer() < 0 ? key.integer() + size : key.integer();
    return index >= 0 && index < size ? list[index] : Value();
  }
  if (key.is_string()) return GetAttribute(object, key.string());
  return {};
}

Value MakeRange(const Arguments& a) {
  for (const Value& v : a.positional) {
    if (!v.is_number()) Fail("range needs numbers");
  }
  if (a.positional.empty()) Fail("range needs an end");
  const int64_t start = a.positional.size() > 1 ? a.positional[0].integer() : 0;
  const int64_t stop = a.positional.size() > 1 ? a.positional[1].integer() : a.positional[0].integer();
  const int64_t step = a.positional.size() > 2 ? a.positional[2].integer() : 1;
  if (step == 0) Fail("range needs a step other than zero");
  List out;
  for (int64_t i = start; step > 0 ? i < stop : i > stop; i += step) {
    if (static_cast<int64_t>(out.size()) >= kMaxRange) Fail(fmt::format("range is longer than {}", kMaxRange));
    out.emplace_back(i);
  }
  return out;
}

bool Contains(const Value& container, const Value& item) {
  if (container.is_string()) return item.is_string() && container.string().find(item.string()) != std::string::npos;
  if (container.is_dict()) return item.is_string() && container.Find(item.string()) != nullptr;
  if (!container.is_list())
    Fail(fmt::format("'in' needs a list, mapping or string, got {}", KindName(container.kind())));
  return std::any_of(container.list().begin(), container.list().end(), [&](const Value& v) { return Equal(v, item); });
}

List Iterate(const Value& value) {
  if (value.is_list()) return value.list();
  if (value.is_dict()) return Keys(value);
  if (value.is_undefined()) return {};
  if (!value.is_string()) Fail(fmt::format("{} cannot be iterated", KindName(value.kind())));
  List out;
  for (std::string_view rest = value.string(); !rest.empty();) {
    const int length = DecodeUtf8(rest).length;
    out.emplace_back(std::string(rest.substr(0, length)));
    rest.remove_prefix(length);
  }
  return out;
}

}  // namespace linspec::jinja
