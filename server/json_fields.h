// Strict reading of a JSON object that a client sent: typed, bounded, and complete (no field is left unread unnoticed).
//
// Threads: one reader, one thread.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace linspec {

// An object, nested at most 32 deep, without duplicate keys. INVALID_ARGUMENT otherwise; never throws.
absl::StatusOr<nlohmann::json> ParseJsonObject(const std::string& body);
// For messages: the value as JSON, shortened.
std::string Shorten(const nlohmann::json& value);

// Keeps the first error; after it every read is a no-op.
class FieldReader {
 public:
  explicit FieldReader(const nlohmann::json& object, std::string prefix = "")
      : object_(object), prefix_(std::move(prefix)) {}

  // The field's value, null when absent or JSON null.
  const nlohmann::json* Find(const char* name);
  void Int(const char* name, int64_t min, int64_t max, int64_t* value);
  void Int32(const char* name, int64_t min, int64_t max, int32_t* value);
  // Open bounds: min < value. Finite always.
  void Float(const char* name, double min, double max, float* value, bool min_is_open = false);
  void Bool(const char* name, bool* value);
  void String(const char* name, size_t max_bytes, std::string* value);
  // Token ids; bounds against the vocabulary are the engine's to check.
  void TokenIds(const char* name, std::vector<int32_t>* value);
  void Ignore(std::initializer_list<const char*> names);
  // Known to the APIs that we speak, would change the result, not done here: an error with the reason when present and
  // not null.
  void Unsupported(const char* name, const char* reason = "is not supported by this server");
  // Known to those APIs, and done here in one way only: an error when present with another value.
  void Only(const char* name, const nlohmann::json& value);

  void Fail(const std::string& name, const std::string& message);
  // Takes over the error of a reader of a part of this object, if it has one.
  void Absorb(const absl::Status& status);
  bool ok() const { return status_.ok(); }
  absl::Status Finish();  // the first error, or the first field nobody read

 private:
  const nlohmann::json& object_;
  const std::string prefix_;
  std::set<std::string> read_;
  absl::Status status_;
};

bool ReadTokenIds(const nlohmann::json& array, std::vector<int32_t>* ids, std::string* error);

}  // namespace linspec
