// The checks of one device program: a line each, or one for each that fails, then a summary and the program's exit
// code. One thread.
#pragma once

#include <cstdio>
#include <string>

namespace linspec::cuda {

inline int checks = 0, failures = 0;
inline bool print_passed = true;

// An error that is NaN fails.
inline void Report(const std::string& name, double error, double tolerance) {
  ++checks;
  const bool ok = error <= tolerance;
  failures += !ok;
  if (ok && !print_passed) return;
  std::printf("%-4s %-58s error %.2e tolerance %.0e\n", ok ? "ok" : "FAIL", name.c_str(), error, tolerance);
}

// 0 only if every check passed.
inline int Summary(const char* program) {
  std::printf("%s: %d checks, %d failed\n", program, checks, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace linspec::cuda
