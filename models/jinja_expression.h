// Expressions of the template language, by recursive descent over the words of a tag. Depth is bounded, so hostile
// templates cannot exhaust the stack. Everything fails with the line and what was expected.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "models/jinja_ast.h"
#include "models/jinja_lexer.h"

namespace linspec::jinja {

constexpr int kMaxDepth = 200;  // of expressions and of blocks

using ExprPtr = std::unique_ptr<Expr>;

// Of one tag. The template's parser asks it for the expressions that a statement has, one after the other.
class ExprParser {
 public:
  ExprParser(std::string_view content, int line) : words_(SplitWords(content, line)) {}

  const Word& Peek() const { return words_[at_]; }
  bool AtEnd() const { return Peek().kind == Word::kEnd; }
  bool IsOperator(std::string_view text) const { return Peek().kind == Word::kOperator && Peek().text == text; }
  bool IsName(std::string_view text) const { return Peek().kind == Word::kName && Peek().text == text; }
  bool TakeOperator(std::string_view text) { return IsOperator(text) && ++at_; }
  bool TakeName(std::string_view text) { return IsName(text) && ++at_; }
  void Expect(std::string_view text);
  std::string ExpectName();
  void ExpectEnd();
  [[noreturn]] void Unexpected(std::string_view wanted) const;

  ExprPtr Conditional();
  ExprPtr Or() { return Logical("or", ExprKind::kOr, &ExprParser::And); }

  // a, b, c without brackets is a tuple.
  ExprPtr Tuple();

  void Arguments(Expr* out);  // after the opening parenthesis

 private:
  struct Depth {
    explicit Depth(ExprParser* parser);
    ~Depth() { --parser->depth_; }
    ExprParser* parser;
  };

  ExprPtr Make(ExprKind kind, std::string text = "") const;
  ExprPtr Binary(ExprKind kind, std::string op, ExprPtr left, ExprPtr right) const;

  ExprPtr Logical(const char* word, ExprKind kind, ExprPtr (ExprParser::*next)());
  ExprPtr And() { return Logical("and", ExprKind::kAnd, &ExprParser::Not); }
  ExprPtr Not();

  std::string ComparisonOperator();
  ExprPtr Comparison();

  ExprPtr Additive();
  ExprPtr Concatenation();
  ExprPtr Multiplicative();
  ExprPtr Unary();

  ExprPtr FiltersAndTests(ExprPtr value);
  bool StartsTestArgument() const;

  ExprPtr Postfix(ExprPtr value);
  ExprPtr Subscript(ExprPtr value);

  ExprPtr Primary();
  static bool ConstantOf(const std::string& name, Value* out);
  ExprPtr Bracketed();
  ExprPtr ListRest(ExprPtr first, std::string_view close);

  std::vector<Word> words_;
  size_t at_ = 0;
  int depth_ = 0;
};

}  // namespace linspec::jinja
