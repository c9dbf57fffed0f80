// Statements of the template language: recursive descent over its parts, of bounded depth.
#include <fmt/format.h>

#include <set>

#include "models/jinja_ast.h"
#include "models/jinja_expression.h"
#include "models/jinja_lexer.h"

namespace linspec::jinja {
namespace {

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
