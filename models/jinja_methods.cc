// Attributes, methods and items of values, and what is made of lists.
#include <fmt/format.h>

#include <algorithm>
#include <unordered_map>

#include "models/jinja_builtins.h"
#include "models/jinja_text.h"
#include "models/utf8.h"

namespace linspec::jinja {
namespace {

constexpr int64_t kMaxRange = 100'000;  // as Jinja's sandbox

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

}  // namespace

List Items(const Value& dict) {
  List out;
  for (const auto& [key, value] : dict.dict()) out.emplace_back(List{key, value});
  return out;
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
