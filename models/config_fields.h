// Typed access to the JSON files beside a model's weights. A private part of model_config.cc and generation_config.cc;
// it includes nlohmann's JSON.
//
// Threads: one reader, one thread.
#pragma once

#include <fmt/format.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"

namespace linspec::config_internal {

using nlohmann::json;

inline std::string Shown(const json& value) {
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  return text.size() <= 80 ? text : text.substr(0, 77) + "...";
}

// Typed access to one JSON object; remembers the first error and goes on with fallbacks, so that the caller reads
// straight through and checks once.
class Fields {
 public:
  Fields(const json& object, std::string prefix) : object_(object), prefix_(std::move(prefix)) {}

  const absl::Status& status() const { return status_; }

  // Null when absent or JSON null.
  const json* Find(const char* name) const {
    const auto it = object_.find(name);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }

  int64_t Integer(const char* name, int64_t low, int64_t high, std::optional<int64_t> fallback = std::nullopt) {
    const json* value = Find(name);
    if (value == nullptr) return fallback ? *fallback : (Missing(name), low);
    if (IsIntegerIn(*value, low, high)) return value->get<int64_t>();
    Fail(name, *value, fmt::format("an integer from {} to {}", low, high));
    return low;
  }

  float Number(const char* name, double low, double high, std::optional<double> fallback = std::nullopt) {
    const json* value = Find(name);
    if (value == nullptr) return static_cast<float>(fallback ? *fallback : (Missing(name), low));
    const double number = value->is_number() ? value->get<double>() : NAN;
    if (number >= low && number <= high) return static_cast<float>(number);
    Fail(name, *value, fmt::format("a number from {} to {}", low, high));
    return static_cast<float>(low);
  }

  bool Boolean(const char* name, bool fallback) {
    const json* value = Find(name);
    if (value == nullptr) return fallback;
    if (value->is_boolean()) return value->get<bool>();
    Fail(name, *value, "true or false");
    return fallback;
  }

  // Index of the field's value among choices.
  int Choice(const char* name, std::initializer_list<const char*> choices, std::optional<int> fallback = std::nullopt) {
    const json* value = Find(name);
    if (value == nullptr) return fallback ? *fallback : (Missing(name), 0);
    int index = 0;
    std::string listed;
    for (const char* choice : choices) {
      if (value->is_string() && value->get_ref<const std::string&>() == choice) return index;
      listed += fmt::format("{}\"{}\"", index++ == 0 ? "" : " or ", choice);
    }
    Fail(name, *value, listed);
    return 0;
  }

  // One token id or a list of them; empty when absent.
  std::vector<int32_t> TokenIds(const char* name, int64_t vocab_size) {
    const json* value = Find(name);
    if (value == nullptr) return {};
    std::vector<int32_t> ids;
    for (const json& id : value->is_array() ? *value : json::array({*value})) {
      if (!IsIntegerIn(id, 0, vocab_size - 1)) {
        Fail(name, *value, fmt::format("token ids from 0 to {}", vocab_size - 1));
        return {};
      }
      ids.push_back(id.get<int32_t>());
    }
    return ids;
  }

  void Fail(const char* name, const json& value, const std::string& expected) {
    if (!status_.ok()) return;
    status_ = absl::InvalidArgumentError(
        fmt::format("config field {}{} = {}: expected {}", prefix_, name, Shown(value), expected));
  }

 private:
  static bool IsIntegerIn(const json& value, int64_t low, int64_t high) {
    if (value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX) return false;
    return value.is_number_integer() && value.get<int64_t>() >= low && value.get<int64_t>() <= high;
  }

  void Missing(const char* name) {
    if (status_.ok()) status_ = absl::InvalidArgumentError(fmt::format("config field {}{} is missing", prefix_, name));
  }

  const json& object_;
  std::string prefix_;
  absl::Status status_;
};

}  // namespace linspec::config_internal
