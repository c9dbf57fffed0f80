// The server's log: one line per event on standard output, as text or JSON. Fields, not prose: what is said about one
// request carries its request_id. Prompts and answers are never logged unless --log-prompts asks for them.
//
// Threads: Write from any thread. A line is queued and written by a thread of the log's own, so that a full disk or a
// reader that stopped never holds up a connection; lines that are lost are counted.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <variant>

namespace linspec {

enum class LogLevel : uint8_t { kDebug, kInfo, kWarn, kError, kOff };
enum class LogFormat : uint8_t { kText, kJson };

struct LogField {
  std::string_view name;
  std::variant<std::string_view, int64_t, double> value;
};

class Log {
 public:
  Log(LogFormat format, LogLevel level);
  // Writes to this open descriptor instead of standard output; it must outlive the log.
  Log(LogFormat format, LogLevel level, int descriptor);
  ~Log();  // writes what is queued

  bool Enabled(LogLevel level) const;
  LogFormat format() const { return format_; }
  void Write(LogLevel level, std::string_view event, std::initializer_list<LogField> fields = {});
  int64_t lines_lost() const;  // the queue was full, or the write failed

 private:
  struct Impl;
  const LogFormat format_;
  std::unique_ptr<Impl> impl_;
};

// The part of a line after time and level; pure.
std::string FormatLogEvent(LogFormat format, std::string_view event, std::initializer_list<LogField> fields);

}  // namespace linspec
