// Values of the template language: JSON's, plus undefined, and callables. Cheap to copy: containers are shared, as in
// Python.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"

namespace linspec::jinja {

// Thrown inside the interpreter only; ChatTemplate turns it into a Status.
struct Error {
  absl::StatusCode code;
  std::string message;
};
[[noreturn]] void Fail(std::string message);

class Value;
struct Arguments;
using List = std::vector<Value>;
using Dict = std::vector<std::pair<std::string, Value>>;  // insertion order, as Python's dict
using Function = std::function<Value(Arguments&)>;

enum class Kind : uint8_t { kUndefined, kNone, kBool, kInt, kFloat, kString, kList, kDict, kFunction };

class Value {
 public:
  Value() = default;
  static Value None() { return Value(Kind::kNone); }
  Value(bool value) : kind_(Kind::kBool), int_(value) {}       // NOLINT: values convert like JSON's
  Value(int64_t value) : kind_(Kind::kInt), int_(value) {}     // NOLINT
  Value(int value) : Value(static_cast<int64_t>(value)) {}     // NOLINT
  Value(double value) : kind_(Kind::kFloat), float_(value) {}  // NOLINT
  Value(std::string value)
      : kind_(Kind::kString), string_(std::make_shared<const std::string>(std::move(value))) {}               // NOLINT
  Value(const char* value) : Value(std::string(value)) {}                                                     // NOLINT
  Value(List value) : kind_(Kind::kList), list_(std::make_shared<List>(std::move(value))) {}                  // NOLINT
  Value(Dict value) : kind_(Kind::kDict), dict_(std::make_shared<Dict>(std::move(value))) {}                  // NOLINT
  Value(Function value) : kind_(Kind::kFunction), function_(std::make_shared<Function>(std::move(value))) {}  // NOLINT

  // A string marked safe: joining it with an unmarked one escapes that one for HTML, as Python's Markup does.
  static Value Markup(std::string text) {
    Value out(std::move(text));
    out.markup_ = true;
    return out;
  }

  Kind kind() const { return kind_; }
  bool is_markup() const { return markup_; }
  bool is_undefined() const { return kind_ == Kind::kUndefined; }
  bool is_string() const { return kind_ == Kind::kString; }
  bool is_number() const { return kind_ == Kind::kInt || kind_ == Kind::kFloat || kind_ == Kind::kBool; }
  bool is_list() const { return kind_ == Kind::kList; }
  bool is_dict() const { return kind_ == Kind::kDict; }

  int64_t integer() const { return kind_ == Kind::kFloat ? static_cast<int64_t>(float_) : int_; }
  double number() const { return kind_ == Kind::kFloat ? float_ : static_cast<double>(int_); }
  const std::string& string() const { return *string_; }
  List& list() const { return *list_; }
  Dict& dict() const { return *dict_; }
  const Function& function() const { return *function_; }

  bool Truthy() const;
  const Value* Find(std::string_view key) const;  // in a dict; null if absent
  void Set(const std::string& key, Value value) const;

 private:
  explicit Value(Kind kind) : kind_(kind) {}
  Kind kind_ = Kind::kUndefined;
  bool markup_ = false;
  int64_t int_ = 0;
  double float_ = 0;
  std::shared_ptr<const std::string> string_;
  std::shared_ptr<List> list_;
  std::shared_ptr<Dict> dict_;
  std::shared_ptr<Function> function_;
};

struct Arguments {
  std::vector<Value> positional;
  Dict named;
  // By position or name; undefined if neither was given.
  Value Get(size_t position, std::string_view name) const;
};

Value FromJson(const nlohmann::ordered_json& json);
std::string EscapeHtml(std::string_view text);
std::string ToText(const Value& value);              // what {{ value }} prints: Python's str()
std::string ToJson(const Value& value, int indent);  // Python's json.dumps(ensure_ascii=False); indent < 0: one line
bool Equal(const Value& a, const Value& b);
int Compare(const Value& a, const Value& b);  // numbers or strings; Fail otherwise
const char* KindName(Kind kind);

}  // namespace linspec::jinja
