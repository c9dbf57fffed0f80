// Runs a parsed template. A private part of chat_template.cc.
//
// Threads: a pure function, but for strftime_now without a fixed time.
#pragma once

#include <string>
#include <vector>

#include "models/jinja_ast.h"
#include "models/jinja_value.h"

namespace linspec::jinja {

// What the template prints with these variables. Throws Error: raise_exception, a type error, or RESOURCE_EXHAUSTED
// over the budget of work, output or depth.
std::string Render(const std::vector<Node>& nodes, Dict globals);

}  // namespace linspec::jinja
