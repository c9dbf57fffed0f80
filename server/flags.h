// The few flags that a command has beyond those of `serve`: taken out of the argument list, the rest is ServerConfig's.
//
// Threads: one.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace linspec {

class CommandFlags {
 public:
  explicit CommandFlags(std::span<const std::string> args) : rest_(args.begin(), args.end()) {}

  std::string String(const std::string& name, const std::string& fallback);
  // Out of bounds or no number: fallback, and status() names flag and value.
  int Int(const std::string& name, int fallback, int min, int max);
  double Double(const std::string& name, double fallback, double min, double max);
  std::vector<int> Ints(const std::string& name, const std::string& fallback, int min, int max);  // "1,4,16"
  std::vector<double> Doubles(const std::string& name, const std::string& fallback, double min, double max);
  // The first argument that is neither a flag nor a flag's value. Call after the flags above.
  std::string Positional();

  const std::vector<std::string>& rest() const { return rest_; }
  const absl::Status& status() const { return status_; }

 private:
  template <typename Number>
  std::vector<Number> List(const std::string& name, const std::string& fallback, Number min, Number max,
                           const char* kind);

  std::vector<std::string> rest_;
  absl::Status status_;
};

}  // namespace linspec
