#include "models/jinja_expression.h"

#include <fmt/format.h>

#include <cstdlib>
#include <set>

namespace linspec::jinja {

ExprParser::Depth::Depth(ExprParser* parser) : parser(parser) {
  if (++parser->depth_ > kMaxDepth) Fail(fmt::format("line {}: expression nested too deeply", parser->Peek().line));
}

void ExprParser::Expect(std::string_view text) {
  if (!TakeOperator(text)) Unexpected(text);
}

std::string ExprParser::ExpectName() {
  if (Peek().kind != Word::kName) Unexpected("a name");
  return words_[at_++].text;
}

void ExprParser::ExpectEnd() {
  if (!AtEnd()) Unexpected("the end of the tag");
}

void ExprParser::Unexpected(std::string_view wanted) const {
  Fail(fmt::format("line {}: expected {}, found '{}'", Peek().line, wanted, AtEnd() ? "end of tag" : Peek().text));
}

ExprPtr ExprParser::Conditional() {
  const Depth depth(this);
  ExprPtr value = Or();
  if (!TakeName("if")) return value;
  ExprPtr out = Make(ExprKind::kConditional);
  out->children.push_back(std::move(value));
  out->children.push_back(Or());
  if (TakeName("else")) out->children.push_back(Conditional());
  return out;
}

ExprPtr ExprParser::Tuple() {
  ExprPtr first = Conditional();
  if (!IsOperator(",")) return first;
  ExprPtr out = Make(ExprKind::kList);
  out->children.push_back(std::move(first));
  while (TakeOperator(",")) {
    if (AtEnd()) break;
    out->children.push_back(Conditional());
  }
  return out;
}

void ExprParser::Arguments(Expr* out) {
  while (!TakeOperator(")")) {
    if (Peek().kind == Word::kName && words_[at_ + 1].kind == Word::kOperator && words_[at_ + 1].text == "=") {
      std::string name = ExpectName();
      Expect("=");
      out->named.emplace_back(std::move(name), Conditional());
    } else {
      out->children.push_back(Conditional());
    }
    if (!IsOperator(")")) Expect(",");
  }
}

ExprPtr ExprParser::Make(ExprKind kind, std::string text) const {
  auto out = std::make_unique<Expr>();
  out->kind = kind;
  out->line = Peek().line;
  out->text = std::move(text);
  return out;
}

ExprPtr ExprParser::Binary(ExprKind kind, std::string op, ExprPtr left, ExprPtr right) const {
  ExprPtr out = Make(kind, std::move(op));
  out->children.push_back(std::move(left));
  out->children.push_back(std::move(right));
  return out;
}

ExprPtr ExprParser::Logical(const char* word, ExprKind kind, ExprPtr (ExprParser::*next)()) {
  ExprPtr left = (this->*next)();
  while (TakeName(word)) left = Binary(kind, word, std::move(left), (this->*next)());
  return left;
}

ExprPtr ExprParser::Not() {
  const Depth depth(this);
  if (!TakeName("not")) return Comparison();
  ExprPtr out = Make(ExprKind::kNot);
  out->children.push_back(Not());
  return out;
}

std::string ExprParser::ComparisonOperator() {
  for (const char* op : {"==", "!=", "<=", ">=", "<", ">"}) {
    if (TakeOperator(op)) return op;
  }
  if (TakeName("in")) return "in";
  if (IsName("not") && words_[at_ + 1].kind == Word::kName && words_[at_ + 1].text == "in") {
    at_ += 2;
    return "not in";
  }
  return "";
}

ExprPtr ExprParser::Comparison() {
  ExprPtr first = Additive();
  std::string op = ComparisonOperator();
  if (op.empty()) return first;
  ExprPtr out = Make(ExprKind::kCompare);
  out->children.push_back(std::move(first));
  for (; !op.empty(); op = ComparisonOperator()) {
    out->operators.push_back(op);
    out->children.push_back(Additive());
  }
  return out;
}

ExprPtr ExprParser::Additive() {
  ExprPtr left = Concatenation();
  while (IsOperator("+") || IsOperator("-")) {
    std::string op = words_[at_++].text;
    left = Binary(ExprKind::kBinary, std::move(op), std::move(left), Concatenation());
  }
  return left;
}

ExprPtr ExprParser::Concatenation() {
  ExprPtr left = Multiplicative();
  while (TakeOperator("~")) left = Binary(ExprKind::kBinary, "~", std::move(left), Multiplicative());
  return left;
}

ExprPtr ExprParser::Multiplicative() {
  ExprPtr left = Unary();
  while (IsOperator("*") || IsOperator("/") || IsOperator("//") || IsOperator("%")) {
    std::string op = words_[at_++].text;
    left = Binary(ExprKind::kBinary, std::move(op), std::move(left), Unary());
  }
  return left;
}

ExprPtr ExprParser::Unary() {
  const Depth depth(this);
  if (IsOperator("-") || IsOperator("+")) {
    ExprPtr out = Make(ExprKind::kUnary, words_[at_++].text);
    out->children.push_back(Unary());
    return FiltersAndTests(std::move(out));
  }
  ExprPtr base = FiltersAndTests(Postfix(Primary()));
  if (TakeOperator("**")) return Binary(ExprKind::kBinary, "**", std::move(base), Unary());
  return base;
}

ExprPtr ExprParser::FiltersAndTests(ExprPtr value) {
  for (;;) {
    if (TakeOperator("|")) {
      ExprPtr out = Make(ExprKind::kFilter, ExpectName());
      out->children.push_back(std::move(value));
      if (TakeOperator("(")) Arguments(out.get());
      value = Postfix(std::move(out));
    } else if (TakeName("is")) {
      const bool negated = TakeName("not");
      ExprPtr out = Make(ExprKind::kTest, ExpectName());
      out->negated = negated;
      out->children.push_back(std::move(value));
      if (TakeOperator("(")) {
        Arguments(out.get());
      } else if (StartsTestArgument()) {
        out->children.push_back(Postfix(Primary()));
      }
      value = std::move(out);
    } else {
      return value;
    }
  }
}

bool ExprParser::StartsTestArgument() const {
  if (Peek().kind == Word::kName) {
    static const std::set<std::string> kWords = {"and", "or", "not", "is", "if", "else", "in"};
    return !kWords.contains(Peek().text);
  }
  return Peek().kind == Word::kString || Peek().kind == Word::kInt || Peek().kind == Word::kFloat || IsOperator("[");
}

ExprPtr ExprParser::Postfix(ExprPtr value) {
  for (;;) {
    if (TakeOperator(".")) {
      if (Peek().kind != Word::kName && Peek().kind != Word::kInt) Unexpected("an attribute");
      ExprPtr out = Make(ExprKind::kAttribute, words_[at_++].text);
      out->children.push_back(std::move(value));
      value = std::move(out);
    } else if (TakeOperator("[")) {
      value = Subscript(std::move(value));
    } else if (TakeOperator("(")) {
      ExprPtr out = Make(ExprKind::kCall);
      out->children.push_back(std::move(value));
      Arguments(out.get());
      value = std::move(out);
    } else {
      return value;
    }
  }
}

ExprPtr ExprParser::Subscript(ExprPtr value) {
  ExprPtr out = Make(ExprKind::kIndex);
  out->children.push_back(std::move(value));
  ExprPtr bounds[3];
  int count = 0;
  bool slice = false;
  while (!TakeOperator("]")) {
    if (TakeOperator(":")) {
      slice = true;
      if (++count > 2) Unexpected("']'");
    } else {
      if (bounds[count]) Unexpected("':' or ']'");
      bounds[count] = Conditional();
    }
  }
  if (!slice && !bounds[0]) Unexpected("an index");
  if (slice) out->kind = ExprKind::kSlice;
  for (int i = 0; i < (slice ? 3 : 1); ++i) out->children.push_back(std::move(bounds[i]));
  return out;
}

ExprPtr ExprParser::Primary() {
  const Word& word = Peek();
  ExprPtr out = Make(ExprKind::kLiteral);
  switch (word.kind) {
    case Word::kInt:
      out->literal = static_cast<int64_t>(std::strtoll(word.text.c_str(), nullptr, 10));
      break;
    case Word::kFloat:
      out->literal = std::strtod(word.text.c_str(), nullptr);
      break;
    case Word::kString: {
      std::string text;
      while (Peek().kind == Word::kString) text += words_[at_++].text;  // adjacent strings join, as in Python
      out->literal = std::move(text);
      return out;
    }
    case Word::kName:
      if (!ConstantOf(word.text, &out->literal)) {
        out->kind = ExprKind::kName;
        out->text = word.text;
      }
      break;
    default:
      return Bracketed();
  }
  ++at_;
  return out;
}

bool ExprParser::ConstantOf(const std::string& name, Value* out) {
  if (name == "true" || name == "True") {
    *out = true;
  } else if (name == "false" || name == "False") {
    *out = false;
  } else if (name == "none" || name == "None") {
    *out = Value::None();
  } else {
    return false;
  }
  return true;
}

ExprPtr ExprParser::Bracketed() {
  if (TakeOperator("(")) {
    if (TakeOperator(")")) return Make(ExprKind::kList);
    ExprPtr inner = Conditional();
    if (TakeOperator(")")) return inner;
    return ListRest(std::move(inner), ")");
  }
  if (TakeOperator("[")) return TakeOperator("]") ? Make(ExprKind::kList) : ListRest(Conditional(), "]");
  if (!TakeOperator("{")) Unexpected("an expression");
  ExprPtr out = Make(ExprKind::kDict);
  while (!TakeOperator("}")) {
    out->children.push_back(Conditional());
    Expect(":");
    out->children.push_back(Conditional());
    if (!IsOperator("}")) Expect(",");
  }
  return out;
}

ExprPtr ExprParser::ListRest(ExprPtr first, std::string_view close) {
  ExprPtr out = Make(ExprKind::kList);
  out->children.push_back(std::move(first));
  while (!TakeOperator(close)) {
    Expect(",");
    if (TakeOperator(close)) break;
    out->children.push_back(Conditional());
  }
  return out;
}

}  // namespace linspec::jinja
