#include "server/flags.h"

#include <fmt/format.h>

#include <charconv>

namespace linspec {
namespace {

template <class Number>
bool ParseNumber(std::string_view text, Number min, Number max, Number* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size() && *value >= min && *value <= max;
}

}  // namespace

std::string CommandFlags::String(const std::string& name, const std::string& fallback) {
  const std::string flag = "--" + name;
  for (size_t i = 0; i < rest_.size(); ++i) {
    if (rest_[i].starts_with(flag + "=")) {
      std::string value = rest_[i].substr(flag.size() + 1);
      rest_.erase(rest_.begin() + static_cast<int64_t>(i));
      return value;
    }
    if (rest_[i] == flag && i + 1 < rest_.size()) {
      std::string value = rest_[i + 1];
      rest_.erase(rest_.begin() + static_cast<int64_t>(i), rest_.begin() + static_cast<int64_t>(i) + 2);
      return value;
    }
  }
  return fallback;
}

int CommandFlags::Int(const std::string& name, int fallback, int min, int max) {
  const std::string text = String(name, std::to_string(fallback));
  int value = fallback;
  if (ParseNumber(text, min, max, &value)) return value;
  if (status_.ok())
    status_ =
        absl::InvalidArgumentError(fmt::format("--{}: '{}' is not an integer from {} to {}", name, text, min, max));
  return fallback;
}

double CommandFlags::Double(const std::string& name, double fallback, double min, double max) {
  const std::string text = String(name, fmt::format("{}", fallback));
  double value = fallback;
  if (ParseNumber(text, min, max, &value)) return value;
  if (status_.ok())
    status_ = absl::InvalidArgumentError(fmt::format("--{}: '{}' is not a number from {} to {}", name, text, min, max));
  return fallback;
}

template <typename Number>
std::vector<Number> CommandFlags::List(const std::string& name, const std::string& fallback, Number min, Number max,
                                       const char* kind) {
  const std::string text = String(name, fallback);
  std::vector<Number> values;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    Number value = 0;
    if (!ParseNumber(std::string_view(text).substr(begin, end - begin), min, max, &value)) {
      if (status_.ok()) {
        status_ = absl::InvalidArgumentError(
            fmt::format("--{}: '{}' is not a list of {} from {} to {}", name, text, kind, min, max));
      }
      return {};
    }
    values.push_back(value);
    begin = end + 1;
  }
  return values;
}

std::vector<int> CommandFlags::Ints(const std::string& name, const std::string& fallback, int min, int max) {
  return List(name, fallback, min, max, "integers");
}

std::vector<double> CommandFlags::Doubles(const std::string& name, const std::string& fallback, double min,
                                          double max) {
  return List(name, fallback, min, max, "numbers");
}

std::string CommandFlags::Positional() {
  for (size_t i = 0; i < rest_.size(); ++i) {
    if (rest_[i].starts_with("--")) {
      if (rest_[i].find('=') == std::string::npos) ++i;  // its value
      continue;
    }
    std::string value = rest_[i];
    rest_.erase(rest_.begin() + static_cast<int64_t>(i));
    return value;
  }
  return "";
}

}  // namespace linspec
