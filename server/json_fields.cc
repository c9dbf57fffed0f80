#include "server/json_fields.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>

#include "server/errors.h"

namespace linspec {
namespace {

constexpr int kMaxDepth = 32;

struct Refused {
  std::string reason;
};

}  // namespace

absl::StatusOr<nlohmann::json> ParseJsonObject(const std::string& body) {
  using Json = nlohmann::json;
  std::vector<std::set<std::string>> keys;
  // nlohmann's own duplicates rule is "last one wins", and its depth is unbounded: both are refused as they appear.
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kMaxDepth) throw Refused{fmt::format("JSON is nested more than {} deep", kMaxDepth)};
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key && !keys.back().insert(parsed.get<std::string>()).second) {
      throw Refused{fmt::format("duplicate field '{}'", parsed.get<std::string>().substr(0, 100))};
    }
    return true;
  };
  try {  // the library reports by exceptions; they end here
    Json json = Json::parse(body, watch);
    if (!json.is_object()) return FieldError("", "the body must be a JSON object");
    return json;
  } catch (const Refused& refused) {
    return FieldError("", refused.reason);
  } catch (const std::exception& error) {
    std::string what = error.what();  // "[json.exception.parse_error.101] parse error at line 1, ..."
    if (const size_t end = what.find("] "); end != std::string::npos) what.erase(0, end + 2);
    return FieldError("", fmt::format("the body is not valid JSON: {}", what.substr(0, 300)));
  }
}

std::string Shorten(const nlohmann::json& value) {
  if (value.is_array() && value.size() > 8) return fmt::format("an array of {}", value.size());
  std::string text = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  return text.size() > 80 ? fmt::format("{} of {} bytes", value.type_name(), text.size()) : text;
}

void FieldReader::Fail(const std::string& name, const std::string& message) {
  if (status_.ok()) status_ = FieldError(prefix_ + name, message);
}

const nlohmann::json* FieldReader::Find(const char* name) {
  read_.insert(name);
  const auto found = object_.find(name);
  return !status_.ok() || found == object_.end() || found->is_null() ? nullptr : &*found;
}

void FieldReader::Int(const char* name, int64_t min, int64_t max, int64_t* value) {
  const nlohmann::json* json = Find(name);
  if (json == nullptr) return;
  if (!json->is_number_integer()) return Fail(name, fmt::format("{} is not an integer", Shorten(*json)));
  const bool too_large =
      json->is_number_unsigned() && json->get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  const int64_t number = too_large ? 0 : json->get<int64_t>();
  if (too_large || number < min || number > max) {
    return Fail(name, fmt::format("{} is not in [{}, {}]", Shorten(*json), min, max));
  }
  *value = number;
}

void FieldReader::Int32(const char* name, int64_t min, int64_t max, int32_t* value) {
  int64_t wide = *value;
  Int(name, min, max, &wide);
  *value = static_cast<int32_t>(wide);
}

void FieldReader::Float(const char* name, double min, double max, float* value, bool min_is_open) {
  const nlohmann::json* json = Find(name);
  if (json == nullptr) return;
  if (!json->is_number()) return Fail(name, fmt::format("{} is not a number", Shorten(*json)));
  const double number = json->get<double>();
  if (!std::isfinite(number) || number < min || number > max || (min_is_open && !(number > min))) {
    return Fail(name, fmt::format("{} is not in {}{}, {}]", Shorten(*json), min_is_open ? "(" : "[", min, max));
  }
  *value = static_cast<float>(number);
}

void FieldReader::Bool(const char* name, bool* value) {
  const nlohmann::json* json = Find(name);
  if (json == nullptr) return;
  if (!json->is_boolean()) return Fail(name, fmt::format("{} is not true or false", Shorten(*json)));
  *value = json->get<bool>();
}

void FieldReader::String(const char* name, size_t max_bytes, std::string* value) {
  const nlohmann::json* json = Find(name);
  if (json == nullptr) return;
  if (!json->is_string()) return Fail(name, fmt::format("{} is not a string", Shorten(*json)));
  const auto& text = json->get_ref<const std::string&>();
  if (text.size() > max_bytes) return Fail(name, fmt::format("{} bytes; at most {}", text.size(), max_bytes));
  *value = text;
}

void FieldReader::TokenIds(const char* name, std::vector<int32_t>* value) {
  const nlohmann::json* json = Find(name);
  if (json == nullptr) return;
  std::string error;
  if (!json->is_array()) return Fail(name, fmt::format("{} is not a list of token ids", Shorten(*json)));
  if (!ReadTokenIds(*json, value, &error)) Fail(name, error);
}

void FieldReader::Ignore(std::initializer_list<const char*> names) { read_.insert(names.begin(), names.end()); }

void FieldReader::Only(const char* name, const nlohmann::json& value) {
  const nlohmann::json* json = Find(name);
  if (json == nullptr || *json == value) return;
  Fail(name, fmt::format("{} is not supported by this server; only {}", Shorten(*json), value.dump()));
}

void FieldReader::Unsupported(const char* name, const char* reason) {
  if (Find(name) != nullptr) Fail(name, reason);
}

void FieldReader::Absorb(const absl::Status& status) {
  if (status_.ok()) status_ = status;
}

absl::Status FieldReader::Finish() {
  for (const auto& [name, value] : object_.items()) {
    if (!read_.contains(name)) Fail(name.substr(0, 100), "unknown field");
  }
  return status_;
}

bool ReadTokenIds(const nlohmann::json& array, std::vector<int32_t>* ids, std::string* error) {
  ids->clear();
  ids->reserve(array.size());
  for (const nlohmann::json& item : array) {
    const bool fits = item.is_number_unsigned() && item.get<uint64_t>() <= std::numeric_limits<int32_t>::max();
    if (!fits) {
      *error = fmt::format("{} is not a token id", Shorten(item));
      return false;
    }
    ids->push_back(item.get<int32_t>());
  }
  return true;
}

}  // namespace linspec
