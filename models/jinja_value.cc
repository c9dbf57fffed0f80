#include "models/jinja_value.h"

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>

namespace linspec::jinja {

void Fail(std::string message) { throw Error{absl::StatusCode::kInvalidArgument, std::move(message)}; }

bool Value::Truthy() const {
  switch (kind_) {
    case Kind::kUndefined:
    case Kind::kNone:
      return false;
    case Kind::kBool:
    case Kind::kInt:
      return int_ != 0;
    case Kind::kFloat:
      return float_ != 0;
    case Kind::kString:
      return !string_->empty();
    case Kind::kList:
      return !list_->empty();
    case Kind::kDict:
      return !dict_->empty();
    case Kind::kFunction:
      return true;
  }
  return false;
}

const Value* Value::Find(std::string_view key) const {
  for (const auto& [name, value] : *dict_) {
    if (name == key) return &value;
  }
  return nullptr;
}

void Value::Set(const std::string& key, Value value) const {
  for (auto& [name, old] : *dict_) {
    if (name == key) {
      old = std::move(value);
      return;
    }
  }
  dict_->emplace_back(key, std::move(value));
}

Value Arguments::Get(size_t position, std::string_view name) const {
  if (position < positional.size()) return positional[position];
  for (const auto& [key, value] : named) {
    if (key == name) return value;
  }
  return {};
}

Value FromJson(const nlohmann::ordered_json& json) {
  if (json.is_null()) return Value::None();
  if (json.is_boolean()) return json.get<bool>();
  if (json.is_number_integer()) return json.get<int64_t>();
  if (json.is_number()) return json.get<double>();
  if (json.is_string()) return json.get<std::string>();
  if (json.is_array()) {
    List list;
    for (const auto& item : json) list.push_back(FromJson(item));
    return list;
  }
  Dict dict;
  for (const auto& [key, item] : json.items()) dict.emplace_back(key, FromJson(item));
  return dict;
}

namespace {

constexpr int kMaxPrintDepth = 100;

std::string FloatText(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  std::string text = fmt::format("{}", value);
  return text.find_first_of(".en") == std::string::npos ? text + ".0" : text;
}

std::string Quoted(const std::string& text) {  // Python's repr
  const char quote = text.find('\'') != std::string::npos && text.find('"') == std::string::npos ? '"' : '\'';
  std::string out(1, quote);
  for (const char c : text) {
    if (c == '\n') {
      out += "\\n";
    } else if (c == '\t') {
      out += "\\t";
    } else if (c == '\r') {
      out += "\\r";
    } else {
      if (c == '\\' || c == quote) out += '\\';
      out += c;
    }
  }
  return out + quote;
}

std::string Text(const Value& value, bool repr, int depth) {
  if (depth > kMaxPrintDepth) Fail("value nested too deeply to print");
  switch (value.kind()) {
    case Kind::kUndefined:
      return "";
    case Kind::kNone:
      return "None";
    case Kind::kBool:
      return value.integer() ? "True" : "False";
    case Kind::kInt:
      return fmt::format("{}", value.integer());
    case Kind::kFloat:
      return FloatText(value.number());
    case Kind::kString:
      return repr ? Quoted(value.string()) : value.string();
    case Kind::kList: {
      std::string out = "[";
      for (const Value& item : value.list()) out += (out.size() > 1 ? ", " : "") + Text(item, true, depth + 1);
      return out + "]";
    }
    case Kind::kDict: {
      std::string out = "{";
      for (const auto& [key, item] : value.dict()) {
        out += (out.size() > 1 ? ", " : "") + Quoted(key) + ": " + Text(item, true, depth + 1);
      }
      return out + "}";
    }
    case Kind::kFunction:
      return "<function>";
  }
  return "";
}

std::string JsonString(const std::string& text) {
  return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string Json(const Value& value, int indent, int depth) {
  if (depth > kMaxPrintDepth) Fail("value nested too deeply for tojson");
  const std::string newline = indent < 0 ? "" : "\n" + std::string(static_cast<size_t>(indent) * (depth + 1), ' ');
  const std::string closing = indent < 0 ? "" : "\n" + std::string(static_cast<size_t>(indent) * depth, ' ');
  const std::string comma = indent < 0 ? ", " : ",";
  switch (value.kind()) {
    case Kind::kNone:
      return "null";
    case Kind::kBool:
      return value.integer() ? "true" : "false";
    case Kind::kInt:
    case Kind::kFloat:
      return Text(value, false, 0);
    case Kind::kString:
      return JsonString(value.string());
    case Kind::kList: {
      if (value.list().empty()) return "[]";
      std::string out;
      for (const Value& item : value.list())
        out += (out.empty() ? "" : comma) + newline + Json(item, indent, depth + 1);
      return "[" + out + closing + "]";
    }
    case Kind::kDict: {
      if (value.dict().empty()) return "{}";
      std::string out;
      for (const auto& [key, item] : value.dict()) {
        out += (out.empty() ? "" : comma) + newline + JsonString(key) + ": " + Json(item, indent, depth + 1);
      }
      return "{" + out + closing + "}";
    }
    default:
      Fail(fmt::format("a value of type {} has no JSON form", KindName(value.kind())));
  }
}

}  // namespace

std::string EscapeHtml(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&#34;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string ToText(const Value& value) { return Text(value, false, 0); }
std::string ToJson(const Value& value, int indent) { return Json(value, indent, 0); }

bool Equal(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) return a.number() == b.number();
  if (a.kind() != b.kind()) return false;
  switch (a.kind()) {
    case Kind::kString:
      return a.string() == b.string();
    case Kind::kList: {
      if (a.list().size() != b.list().size()) return false;
      for (size_t i = 0; i < a.list().size(); ++i) {
        if (!Equal(a.list()[i], b.list()[i])) return false;
      }
      return true;
    }
    case Kind::kDict: {
      if (a.dict().size() != b.dict().size()) return false;
      for (const auto& [key, value] : a.dict()) {
        const Value* other = b.Find(key);
        if (other == nullptr || !Equal(value, *other)) return false;
      }
      return true;
    }
    default:
      return a.kind() != Kind::kFunction;
  }
}

int Compare(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) return a.number() < b.number() ? -1 : a.number() > b.number();
  if (a.is_string() && b.is_string()) return a.string().compare(b.string());
  Fail(fmt::format("cannot compare {} with {}", KindName(a.kind()), KindName(b.kind())));
}

const char* KindName(Kind kind) {
  static constexpr const char* kNames[] = {"undefined", "none", "bool", "int",     "float",
                                           "string",    "list", "dict", "function"};
  return kNames[static_cast<int>(kind)];
}

}  // namespace linspec::jinja
