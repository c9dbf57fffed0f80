// The subcommands of the binary. Each prints to stdout, reports errors on stderr and returns the exit status.
#pragma once

#include <span>
#include <string>

#include "absl/status/status.h"

namespace linspec {

absl::Status Serve(std::span<const std::string> args);             // serve.cc
absl::Status Generate(std::span<const std::string> args);          // offline.cc
absl::Status Eval(std::span<const std::string> args);              // eval.cc
absl::Status Bench(std::span<const std::string> args);             // bench.cc
absl::Status BenchSpeculation(std::span<const std::string> args);  // bench_speculation.cc

int RunCommand(int argc, char** argv);

}  // namespace linspec
