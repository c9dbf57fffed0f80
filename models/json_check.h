// Well-formedness of JSON files before they are read into a document.
//
// Threads: pure function. The DOM parser silently keeps the last of two equal keys; this refuses them.
#pragma once

#include <string_view>

#include "absl/status/status.h"

namespace linspec {

// INVALID_ARGUMENT, with the byte offset, for text that is not JSON, an object that names a key twice, or nesting
// deeper than 64.
absl::Status CheckJson(std::string_view text);

}  // namespace linspec
