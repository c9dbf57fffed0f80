// Filters and tests.
#include "models/jinja_builtins.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <unordered_map>

#include "models/jinja_text.h"

namespace linspec::jinja {
namespace {

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

}  // namespace linspec::jinja
