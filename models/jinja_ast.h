// Syntax tree of a template, and the parser that builds it.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "models/jinja_value.h"

namespace linspec::jinja {

enum class ExprKind : uint8_t {
  kLiteral,
  kName,
  kList,
  kDict,
  kUnary,
  kBinary,
  kCompare,
  kAnd,
  kOr,
  kNot,
  kConditional,
  kAttribute,
  kIndex,
  kSlice,
  kCall,
  kFilter,
  kTest
};

struct Expr {
  ExprKind kind;
  int line = 0;
  std::string text;  // name, operator, attribute, filter or test
  Value literal;
  std::vector<std::unique_ptr<Expr>> children;  // operands, then positional arguments; null: left out (slices)
  std::vector<std::pair<std::string, std::unique_ptr<Expr>>> named;  // named arguments
  std::vector<std::string> operators;                                // comparison chain
  bool negated = false;                                              // "is not", "not in" is an operator
};

enum class NodeKind : uint8_t {
  kText,
  kOutput,
  kIf,
  kFor,
  kSet,
  kSetBlock,
  kMacro,
  kFilterBlock,
  kBreak,
  kContinue,
  kScope
};

struct Node {
  NodeKind kind;
  int line = 0;
  std::string text;                                // literal text; set: attribute of a namespace; macro: its name
  std::vector<std::string> names;                  // targets of for and set, parameters of a macro
  std::vector<std::unique_ptr<Expr>> expressions;  // output, iterable [, filter], set value, macro defaults (or null)
  std::vector<std::pair<std::unique_ptr<Expr>, std::vector<Node>>> branches;  // if / elif / else (null condition)
  std::vector<Node> body, otherwise;                                          // for ... else
};

// Throws Error with the line number.
std::vector<Node> ParseTemplate(std::string_view source);

}  // namespace linspec::jinja
