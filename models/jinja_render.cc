#include "models/jinja_render.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <map>
#include <optional>
#include <utility>

#include "models/jinja_builtins.h"

namespace linspec::jinja {
namespace {

constexpr size_t kMaxOutputBytes = 64 << 20;
constexpr int64_t kMaxSteps = 4'000'000;  // nodes and expressions evaluated in one rendering
constexpr int kMaxCallDepth = 64;         // of macros

enum class Flow : uint8_t { kNormal, kBreak, kContinue };

// strftime_now(format): the local time, or the moment a context fixes as "2024-07-26T12:00:00".
Value StrftimeNow(const Value& fixed) {
  return Function([fixed](Arguments& a) -> Value {
    const Value format = a.Get(0, "format");
    if (!format.is_string()) Fail("strftime_now needs a format");
    std::tm moment{};
    const std::time_t now = std::time(nullptr);
    if (!fixed.is_string()) {
      localtime_r(&now, &moment);
    } else if (strptime(fixed.string().c_str(), "%Y-%m-%dT%H:%M:%S", &moment) == nullptr) {
      Fail("strftime_now in the context is not a time");
    }
    char text[256];
    return std::string(text, std::strftime(text, sizeof(text), format.string().c_str(), &moment));
  });
}

// One rendering. Scopes: variables set in a loop or macro end with it; namespace() objects are how templates carry
// values out.
class Renderer {
 public:
  explicit Renderer(Dict globals) {
    scopes_.emplace_back();
    for (auto& [name, value] : globals) scopes_[0][name] = std::move(value);
    scopes_[0]["range"] = Function([](Arguments& a) { return MakeRange(a); });
    scopes_[0]["namespace"] = Function([](Arguments& a) -> Value {
      Dict fields = !a.positional.empty() && a.positional[0].is_dict() ? a.positional[0].dict() : Dict{};
      for (auto& field : a.named) fields.push_back(field);
      return fields;
    });
    scopes_[0]["dict"] = Function([](Arguments& a) -> Value { return a.named; });
    scopes_[0]["raise_exception"] = Function([](Arguments& a) -> Value { Fail(ToText(a.Get(0, "message"))); });
    scopes_[0]["strftime_now"] = StrftimeNow(Lookup("strftime_now"));
  }

  std::string Run(const std::vector<Node>& nodes) {
    Execute(nodes);
    return std::move(out_);
  }

 private:
  using Scope = std::map<std::string, Value, std::less<>>;

  void Count() {
    if (++steps_ > kMaxSteps) throw Error{absl::StatusCode::kResourceExhausted, "the chat template does too much work"};
  }
  void Print(std::string_view text) {
    if (out_.size() + text.size() > kMaxOutputBytes) {
      throw Error{absl::StatusCode::kResourceExhausted, "the chat template prints too much"};
    }
    out_.append(text);
  }
  Value Lookup(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto it = scope->find(name); it != scope->end()) return it->second;
    }
    return {};
  }

  Flow Execute(const std::vector<Node>& nodes) {
    for (const Node& node : nodes) {
      Count();
      if (const Flow flow = ExecuteNode(node); flow != Flow::kNormal) return flow;
    }
    return Flow::kNormal;
  }

  Flow ExecuteNode(const Node& node) {
    switch (node.kind) {
      case NodeKind::kText:
        Print(node.text);
        return Flow::kNormal;
      case NodeKind::kOutput:
        Print(ToText(Evaluate(*node.expressions[0])));
        return Flow::kNormal;
      case NodeKind::kIf:
        for (const auto& [condition, body] : node.branches) {
          if (condition == nullptr || Evaluate(*condition).Truthy()) return Execute(body);
        }
        return Flow::kNormal;
      case NodeKind::kFor:
        ExecuteFor(node);
        return Flow::kNormal;
      case NodeKind::kSet:
        Assign(node, Evaluate(*node.expressions[0]));
        return Flow::kNormal;
      case NodeKind::kSetBlock:
        Assign(node, Captured(node.body));
        return Flow::kNormal;
      case NodeKind::kMacro:
        scopes_.back()[node.text] = MakeMacro(node);
        return Flow::kNormal;
      case NodeKind::kFilterBlock: {
        Arguments arguments = EvaluateArguments(*node.expressions[0], 0);
        arguments.positional.insert(arguments.positional.begin(), Captured(node.body));
        Print(ToText(ApplyFilter(node.text, arguments)));
        return Flow::kNormal;
      }
      case NodeKind::kScope:
        return Execute(node.body);
      case NodeKind::kBreak:
        return Flow::kBreak;
      case NodeKind::kContinue:
        return Flow::kContinue;
    }
    return Flow::kNormal;
  }

  std::string Captured(const std::vector<Node>& body) {
    std::string outer = std::exchange(out_, "");
    Execute(body);
    return std::exchange(out_, std::move(outer));
  }

  void Assign(const Node& node, Value value) {
    if (!node.text.empty()) {  // set ns.field = ...
      const Value target = Lookup(node.names[0]);
      if (!target.is_dict()) Fail(fmt::format("line {}: '{}' is not a namespace", node.line, node.names[0]));
      target.Set(node.text, std::move(value));
      return;
    }
    Unpack(node.names, std::move(value), node.line);
  }

  void Unpack(const std::vector<std::string>& names, Value value, int line) {
    if (names.size() == 1) {
      scopes_.back()[names[0]] = std::move(value);
      return;
    }
    if (!value.is_list() || value.list().size() != names.size()) {
      Fail(fmt::format("line {}: cannot unpack into {} names", line, names.size()));
    }
    for (size_t i = 0; i < names.size(); ++i) scopes_.back()[names[i]] = value.list()[i];
  }

  void ExecuteFor(const Node& node) {
    List items = Iterate(Evaluate(*node.expressions[0]));
    if (node.expressions.size() > 1) {
      List kept;
      for (Value& item : items) {
        scopes_.emplace_back();
        Unpack(node.names, item, node.line);
        if (Evaluate(*node.expressions[1]).Truthy()) kept.push_back(std::move(item));
        scopes_.pop_back();
      }
      items = std::move(kept);
    }
    if (items.empty()) {
      Execute(node.otherwise);
      return;
    }
    const int64_t n = static_cast<int64_t>(items.size());
    for (int64_t i = 0; i < n; ++i) {
      Count();
      scopes_.emplace_back();
      scopes_.back()["loop"] = Dict{{"index", i + 1},
                                    {"index0", i},
                                    {"first", i == 0},
                                    {"last", i + 1 == n},
                                    {"length", n},
                                    {"revindex", n - i},
                                    {"revindex0", n - i - 1},
                                    {"previtem", i > 0 ? items[i - 1] : Value()},
                                    {"nextitem", i + 1 < n ? items[i + 1] : Value()}};
      Unpack(node.names, items[i], node.line);
      const Flow flow = Execute(node.body);
      scopes_.pop_back();
      if (flow == Flow::kBreak) break;
    }
  }

  Value MakeMacro(const Node& node) {
    return Function([this, &node](Arguments& arguments) -> Value {
      if (scopes_.size() > kMaxCallDepth * 4 || ++call_depth_ > kMaxCallDepth) {
        throw Error{absl::StatusCode::kResourceExhausted, fmt::format("macro '{}' calls itself too deeply", node.text)};
      }
      Scope locals;
      for (size_t i = 0; i < node.names.size(); ++i) {
        Value value = arguments.Get(i, node.names[i]);
        if (value.is_undefined() && node.expressions[i] != nullptr) value = Evaluate(*node.expressions[i]);
        locals[node.names[i]] = std::move(value);
      }
      scopes_.push_back(std::move(locals));
      std::string text = Captured(node.body);
      scopes_.pop_back();
      --call_depth_;
      return text;
    });
  }

  Arguments EvaluateArguments(const Expr& expr, size_t first) {
    Arguments out;
    for (size_t i = first; i < expr.children.size(); ++i) out.positional.push_back(Evaluate(*expr.children[i]));
    for (const auto& [name, value] : expr.named) out.named.emplace_back(name, Evaluate(*value));
    return out;
  }

  Value Evaluate(const Expr& expr) {
    Count();
    switch (expr.kind) {
      case ExprKind::kLiteral:
        return expr.literal;
      case ExprKind::kName:
        return Lookup(expr.text);
      case ExprKind::kList: {
        List out;
        for (const auto& child : expr.children) out.push_back(Evaluate(*child));
        return out;
      }
      case ExprKind::kDict: {
        Value out{Dict{}};
        for (size_t i = 0; i + 1 < expr.children.size(); i += 2) {
          out.Set(ToText(Evaluate(*expr.children[i])), Evaluate(*expr.children[i + 1]));
        }
        return out;
      }
      case ExprKind::kAnd: {
        Value left = Evaluate(*expr.children[0]);
        return left.Truthy() ? Evaluate(*expr.children[1]) : left;
      }
      case ExprKind::kOr: {
        Value left = Evaluate(*expr.children[0]);
        return left.Truthy() ? left : Evaluate(*expr.children[1]);
      }
      case ExprKind::kNot:
        return !Evaluate(*expr.children[0]).Truthy();
      case ExprKind::kConditional:
        if (Evaluate(*expr.children[1]).Truthy()) return Evaluate(*expr.children[0]);
        return expr.children.size() > 2 ? Evaluate(*expr.children[2]) : Value();
      case ExprKind::kUnary: {
        const Value value = Evaluate(*expr.children[0]);
        if (!value.is_number()) Fail(fmt::format("line {}: '{}' needs a number", expr.line, expr.text));
        if (expr.text == "+") return value;
        return value.kind() == Kind::kFloat ? Value(-value.number()) : Value(-value.integer());
      }
      case ExprKind::kBinary:
        return EvaluateBinary(expr);
      case ExprKind::kCompare:
        return EvaluateCompare(expr);
      case ExprKind::kAttribute:
        return GetAttribute(Evaluate(*expr.children[0]), expr.text);
      case ExprKind::kIndex:
        return GetItem(Evaluate(*expr.children[0]), Evaluate(*expr.children[1]));
      case ExprKind::kSlice:
        return EvaluateSlice(expr);
      case ExprKind::kCall: {
        const Value function = Evaluate(*expr.children[0]);
        if (function.kind() != Kind::kFunction) {
          Fail(fmt::format("line {}: '{}' is not callable", expr.line, expr.children[0]->text));
        }
        Arguments arguments = EvaluateArguments(expr, 1);
        return function.function()(arguments);
      }
      case ExprKind::kFilter: {
        Arguments arguments = EvaluateArguments(expr, 0);
        return ApplyFilter(expr.text, arguments);
      }
      case ExprKind::kTest:
        return ApplyTest(expr.text, EvaluateArguments(expr, 0)) != expr.negated;
    }
    return {};
  }

  Value EvaluateBinary(const Expr& expr) {
    const Value a = Evaluate(*expr.children[0]), b = Evaluate(*expr.children[1]);
    const std::string& op = expr.text;
    if ((a.is_markup() || b.is_markup()) && (op == "~" || (op == "+" && a.is_string() && b.is_string()))) {
      const auto safe = [](const Value& v) { return v.is_markup() ? v.string() : EscapeHtml(ToText(v)); };
      return Value::Markup(Checked(safe(a) + safe(b)));
    }
    if (op == "~") return Checked(ToText(a) + ToText(b));
    if (op == "+" && a.is_string() && b.is_string()) return Checked(a.string() + b.string());
    if (op == "+" && a.is_list() && b.is_list()) {
      List out = a.list();
      out.insert(out.end(), b.list().begin(), b.list().end());
      return out;
    }
    if (op == "*" && a.is_string() && b.kind() == Kind::kInt) {
      std::string out;
      for (int64_t i = 0; i < b.integer(); ++i) out = Checked(out + a.string());
      return out;
    }
    if (!a.is_number() || !b.is_number()) {
      Fail(fmt::format("line {}: '{}' between {} and {}", expr.line, op, KindName(a.kind()), KindName(b.kind())));
    }
    return Arithmetic(op, a, b, expr.line);
  }

  std::string Checked(std::string text) {
    steps_ += static_cast<int64_t>(text.size() / 64);
    Count();
    return text;
  }

  static Value Arithmetic(const std::string& op, const Value& a, const Value& b, int line) {
    const bool whole = a.kind() != Kind::kFloat && b.kind() != Kind::kFloat;
    const auto integer = [](const Value& v) {
      return static_cast<uint64_t>(v.integer());
    };  // wraps instead of overflowing
    if (op == "+") return whole ? Value(static_cast<int64_t>(integer(a) + integer(b))) : Value(a.number() + b.number());
    if (op == "-") return whole ? Value(static_cast<int64_t>(integer(a) - integer(b))) : Value(a.number() - b.number());
    if (op == "*") return whole ? Value(static_cast<int64_t>(integer(a) * integer(b))) : Value(a.number() * b.number());
    if (op == "**") {
      const double power = std::pow(a.number(), b.number());
      return whole && b.integer() >= 0 && std::fabs(power) < 9e15 ? Value(static_cast<int64_t>(power)) : Value(power);
    }
    if (b.number() == 0) Fail(fmt::format("line {}: division by zero", line));
    if (op == "/") return a.number() / b.number();
    const double floored = std::floor(a.number() / b.number());
    if (op == "//") return whole ? Value(static_cast<int64_t>(floored)) : Value(floored);
    const double remainder = a.number() - floored * b.number();
    return whole ? Value(static_cast<int64_t>(remainder)) : Value(remainder);
  }

  Value EvaluateCompare(const Expr& expr) {
    Value left = Evaluate(*expr.children[0]);
    for (size_t i = 0; i < expr.operators.size(); ++i) {
      Value right = Evaluate(*expr.children[i + 1]);
      const std::string& op = expr.operators[i];
      bool holds = false;
      if (op == "==" || op == "!=") {
        holds = Equal(left, right) == (op == "==");
        if (left.kind() == right.kind() && (left.is_undefined() || left.kind() == Kind::kNone)) holds = op == "==";
      } else if (op == "in" || op == "not in") {
        holds = (!right.is_undefined() && Contains(right, left)) == (op == "in");
      } else {
        const int order = Compare(left, right);
        holds = op == "<" ? order < 0 : op == ">" ? order > 0 : op == "<=" ? order <= 0 : order >= 0;
      }
      if (!holds) return false;
      left = std::move(right);
    }
    return true;
  }

  Value EvaluateSlice(const Expr& expr) {
    const Value object = Evaluate(*expr.children[0]);
    std::optional<int64_t> bounds[3];
    for (int i = 0; i < 3; ++i) {
      if (expr.children[i + 1] == nullptr) continue;
      const Value bound = Evaluate(*expr.children[i + 1]);
      if (bound.is_number()) bounds[i] = bound.integer();
    }
    const List items = Iterate(object);
    const int64_t n = static_cast<int64_t>(items.size()), step = bounds[2].value_or(1);
    if (step == 0) Fail(fmt::format("line {}: slice step is zero", expr.line));
    const auto resolve = [n, step](std::optional<int64_t> bound, int64_t fallback) {
      if (!bound) return fallback;
      const int64_t at = *bound < 0 ? *bound + n : *bound;
      return step > 0 ? std::clamp<int64_t>(at, 0, n) : std::clamp<int64_t>(at, -1, n - 1);
    };
    const int64_t start = resolve(bounds[0], step > 0 ? 0 : n - 1), stop = resolve(bounds[1], step > 0 ? n : -1);
    List out;
    for (int64_t i = start; step > 0 ? i < stop : i > stop; i += step) out.push_back(items[i]);
    if (!object.is_string()) return out;
    std::string text;
    for (const Value& c : out) text += c.string();
    return text;
  }

  std::vector<Scope> scopes_;
  std::string out_;
  int64_t steps_ = 0;
  int call_depth_ = 0;
};

}  // namespace

std::string Render(const std::vector<Node>& nodes, Dict globals) { return Renderer(std::move(globals)).Run(nodes); }

}  // namespace linspec::jinja
