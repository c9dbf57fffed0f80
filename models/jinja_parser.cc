// Recursive descent over the words of each part. Depth is bounded, so hostile templates cannot exhaust the stack.
#include <fmt/format.h>

#include <cstdlib>
#include <set>

#include "models/jinja_ast.h"
#include "models/jinja_lexer.h"

namespace linspec::jinja {
namespace {

constexpr int kMaxDepth = 200;

using ExprPtr = std::unique_ptr<Expr>;

class ExprParser {
 public:
  ExprParser(std::string_view content, int line) : words_(SplitWords(content, line)) {}

  const Word& Peek() const { return words_[at_]; }
  bool AtEnd() const { return Peek().kind == Word::kEnd; }
  bool IsOperator(std::string_view text) const { return Peek().kind == Word::kOperator && Peek().text == text; }
  bool IsName(std::string_view text) const { return Peek().kind == Word::kName && Peek().text == text; }
  bool TakeOperator(std::string_view text) { return IsOperator(text) && ++at_; }
  bool TakeName(std::string_view text) { return IsName(text) && ++at_; }
  void Expect(std::string_view text) {
    if (!TakeOperator(text)) Unexpected(text);
  }
  std::string ExpectName() {
    if (Peek().kind != Word::kName) Unexpected("a name");
    return words_[at_++].text;
  }
  void ExpectEnd() {
    if (!AtEnd()) Unexpected("the end of the tag");
  }
  [[noreturn]] void Unexpected(std::string_view wanted) const {
    Fail(fmt::format("line {}: expected {}, found '{}'", Peek().line, wanted, AtEnd() ? "end of tag" : Peek().text));
  }

  ExprPtr Conditional() {
    const Depth depth(this);
    ExprPtr value = Or();
    if (!TakeName("if")) return value;
    ExprPtr out = Make(ExprKind::kConditional);
    out->children.push_back(std::move(value));
    out->children.push_back(Or());
    if (TakeName("else")) out->children.push_back(Conditional());
    return out;
  }
  ExprPtr Or() { return Logical("or", ExprKind::kOr, &ExprParser::And); }

  // a, b, c without brackets is a tuple.
  ExprPtr Tuple() {
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

  void Arguments(Expr* out) {  // after the opening parenthesis
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

 private:
  struct Depth {
    explicit Depth(ExprParser* parser) : parser(parser) {
      if (++parser->depth_ > kMaxDepth) Fail(fmt::format("line {}: expression nested too deeply", parser->Peek().line));
    }
    ~Depth() { --parser->depth_; }
    ExprParser* parser;
  };

  ExprPtr Make(ExprKind kind, std::string text = "") const {
    auto out = std::make_unique<Expr>();
    out->kind = kind;
    out->line = Peek().line;
    out->text = std::move(text);
    return out;
  }
  ExprPtr Binary(ExprKind kind, std::string op, ExprPtr left, ExprPtr right) const {
    ExprPtr out = Make(kind, std::move(op));
    out->children.push_back(std::move(left));
    out->children.push_back(std::move(right));
    return out;
  }

  ExprPtr Logical(const char* word, ExprKind kind, ExprPtr (ExprParser::*next)()) {
    ExprPtr left = (this->*next)();
    while (TakeName(word)) left = Binary(kind, word, std::move(left), (this->*next)());
    return left;
  }
  ExprPtr And() { return Logical("and", ExprKind::kAnd, &ExprParser::Not); }
  ExprPtr Not() {
    const Depth depth(this);
    if (!TakeName("not")) return Comparison();
    ExprPtr out = Make(ExprKind::kNot);
    out->children.push_back(Not());
    return out;
  }

  std::string ComparisonOperator() {
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
  ExprPtr Comparison() {
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

  ExprPtr Additive() {
    ExprPtr left = Concatenation();
    while (IsOperator("+") || IsOperator("-")) {
      std::string op = words_[at_++].text;
      left = Binary(ExprKind::kBinary, std::move(op), std::move(left), Concatenation());
    }
    return left;
  }
  ExprPtr Concatenation() {
    ExprPtr left = Multiplicative();
    while (TakeOperator("~")) left = Binary(ExprKind::kBinary, "~", std::move(left), Multiplicative());
    return left;
  }
  ExprPtr Multiplicative() {
    ExprPtr left = Unary();
    while (IsOperator("*") || IsOperator("/") || IsOperator("//") || IsOperator("%")) {
      std::string op = words_[at_++].text;
      left = Binary(ExprKind::kBinary, std::move(op), std::move(left), Unary());
    }
    return left;
  }
  ExprPtr Unary() {
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

  ExprPtr FiltersAndTests(ExprPtr value) {
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
  bool StartsTestArgument() const {
    if (Peek().kind == Word::kName) {
      static const std::set<std::string> kWords = {"and", "or", "not", "is", "if", "else", "in"};
      return !kWords.contains(Peek().text);
    }
    return Peek().kind == Word::kString || Peek().kind == Word::kInt || Peek().kind == Word::kFloat || IsOperator("[");
  }

  ExprPtr Postfix(ExprPtr value) {
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
  ExprPtr Subscript(ExprPtr value) {
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

  ExprPtr Primary() {
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
  static bool ConstantOf(const std::string& name, Value* out) {
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
  ExprPtr Bracketed() {
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
  ExprPtr ListRest(ExprPtr first, std::string_view close) {
    ExprPtr out = Make(ExprKind::kList);
    out->children.push_back(std::move(first));
    while (!TakeOperator(close)) {
      Expect(",");
      if (TakeOperator(close)) break;
      out->children.push_back(Conditional());
    }
    return out;
  }

  std::vector<Word> words_;
  size_t at_ = 0;
  int depth_ = 0;
};

class TemplateParser {
 public:
  explicit TemplateParser(std::string_view source) : parts_(SplitParts(source)) {}

  std::vector<Node> Run() {
    std::vector<Node> out = Body({}, 0);
    if (at_ < parts_.size()) Fail(fmt::format("line {}: '{}' has nothing to end", parts_[at_].line, Keyword()));
    return out;
  }

 private:
  static std::string FirstWord(const std::string& content) {
    return content.substr(0, content.find_first_of(" \t\n\r("));
  }
  std::string Keyword() const { return FirstWord(parts_[at_].content); }

  // Nodes up to (not including) a statement whose keyword is in `ends`.
  std::vector<Node> Body(const std::set<std::string>& ends, int depth) {
    if (depth > kMaxDepth) Fail(fmt::format("line {}: blocks nested too deeply", parts_[at_].line));
    std::vector<Node> out;
    for (; at_ < parts_.size(); ++at_) {
      const Part& part = parts_[at_];
      Node node{};
      node.line = part.line;
      if (part.kind == Part::kText) {
        node.kind = NodeKind::kText;
        node.text = part.content;
      } else if (part.kind == Part::kExpression) {
        node.kind = NodeKind::kOutput;
        ExprParser parser(part.content, part.line);
        node.expressions.push_back(parser.Tuple());
        parser.ExpectEnd();
      } else {
        const std::string keyword = Keyword();
        if (ends.contains(keyword) || keyword.starts_with("end") || keyword == "else" || keyword == "elif") return out;
        Statement(keyword, &node, depth);
      }
      out.push_back(std::move(node));
    }
    if (!ends.empty()) Fail(fmt::format("the template ends before '{}'", *ends.begin()));
    return out;
  }

  void ExpectEnd(const std::string& keyword) {
    if (at_ >= parts_.size() || parts_[at_].kind != Part::kStatement || Keyword() != keyword) {
      Fail(fmt::format("line {}: expected '{}'", at_ < parts_.size() ? parts_[at_].line : 0, keyword));
    }
  }

  void Statement(const std::string& keyword, Node* node, int depth) {
    ExprParser parser(parts_[at_].content, parts_[at_].line);
    parser.ExpectName();
    if (keyword == "if") return If(std::move(parser), node, depth);
    if (keyword == "for") return For(std::move(parser), node, depth);
    if (keyword == "set") return Set(std::move(parser), node, depth);
    if (keyword == "macro") return Macro(std::move(parser), node, depth);
    if (keyword == "filter") {
      node->kind = NodeKind::kFilterBlock;
      node->text = parser.ExpectName();
      auto call = std::make_unique<Expr>();
      if (parser.TakeOperator("(")) parser.Arguments(call.get());
      node->expressions.push_back(std::move(call));
    } else if (keyword == "break" || keyword == "continue") {
      node->kind = keyword == "break" ? NodeKind::kBreak : NodeKind::kContinue;
      return parser.ExpectEnd();
    } else if (keyword == "generation") {
      node->kind = NodeKind::kScope;
    } else {
      Fail(fmt::format("line {}: statement '{}' is not supported", node->line, keyword));
    }
    parser.ExpectEnd();
    ++at_;
    node->body = Body({"end" + keyword}, depth + 1);
    ExpectEnd("end" + keyword);
  }

  void If(ExprParser parser, Node* node, int depth) {
    node->kind = NodeKind::kIf;
    ExprPtr condition = parser.Conditional();
    parser.ExpectEnd();
    for (;;) {
      ++at_;
      std::vector<Node> body = Body({"endif", "else", "elif"}, depth + 1);
      node->branches.emplace_back(std::move(condition), std::move(body));
      const std::string keyword = Keyword();
      const bool was_else = node->branches.back().first == nullptr;
      if (keyword == "elif" && !was_else) {
        ExprParser next(parts_[at_].content, parts_[at_].line);
        next.ExpectName();
        condition = next.Conditional();
        next.ExpectEnd();
      } else if (keyword == "else" && !was_else) {
        condition = nullptr;
      } else {
        return ExpectEnd("endif");
      }
    }
  }

  void For(ExprParser parser, Node* node, int depth) {
    node->kind = NodeKind::kFor;
    const bool parenthesis = parser.TakeOperator("(");
    do {
      node->names.push_back(parser.ExpectName());
    } while (parser.TakeOperator(","));
    if (parenthesis) parser.Expect(")");
    if (!parser.TakeName("in")) parser.Unexpected("'in'");
    node->expressions.push_back(parser.Or());  // no ternary here: "if" begins the filter
    if (parser.TakeName("if")) node->expressions.push_back(parser.Conditional());
    parser.TakeName("recursive");
    parser.ExpectEnd();
    ++at_;
    node->body = Body({"endfor", "else"}, depth + 1);
    if (Keyword() == "else") {
      ++at_;
      node->otherwise = Body({"endfor"}, depth + 1);
    }
    ExpectEnd("endfor");
  }

  void Set(ExprParser parser, Node* node, int depth) {
    node->kind = NodeKind::kSet;
    do {
      node->names.push_back(parser.ExpectName());
    } while (parser.TakeOperator(","));
    if (parser.TakeOperator(".")) node->text = parser.ExpectName();
    if (parser.TakeOperator("=")) {
      node->expressions.push_back(parser.Tuple());
      return parser.ExpectEnd();
    }
    node->kind = NodeKind::kSetBlock;
    parser.ExpectEnd();
    ++at_;
    node->body = Body({"endset"}, depth + 1);
    ExpectEnd("endset");
  }

  void Macro(ExprParser parser, Node* node, int depth) {
    node->kind = NodeKind::kMacro;
    node->text = parser.ExpectName();
    parser.Expect("(");
    while (!parser.TakeOperator(")")) {
      node->names.push_back(parser.ExpectName());
      node->expressions.push_back(parser.TakeOperator("=") ? parser.Conditional() : nullptr);
      if (!parser.IsOperator(")")) parser.Expect(",");
    }
    parser.ExpectEnd();
    ++at_;
    node->body = Body({"endmacro"}, depth + 1);
    ExpectEnd("endmacro");
  }

  std::vector<Part> parts_;
  size_t at_ = 0;
};

}  // namespace

std::vector<Node> ParseTemplate(std::string_view source) { return TemplateParser(source).Run(); }

}  // namespace linspec::jinja
