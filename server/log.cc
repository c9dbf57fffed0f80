#include "server/log.h"

#include <fmt/format.h>
#include <poll.h>
#include <spdlog/async.h>
#include <spdlog/async_logger.h>
#include <spdlog/sinks/base_sink.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cmath>
#include <string>

#include "server/json_text.h"

namespace linspec {
namespace {

constexpr size_t kQueuedLines = 8192;

// write(2), because spdlog's own sinks ignore a failed write, and never a wait without end: a pipe that nobody reads
// would otherwise keep the process from ending.
class DescriptorSink : public spdlog::sinks::base_sink<spdlog::details::null_mutex> {
 public:
  explicit DescriptorSink(int descriptor) : descriptor_(descriptor) {}
  int64_t failures() const { return failures_; }

 protected:
  void sink_it_(const spdlog::details::log_msg& message) override {
    spdlog::memory_buf_t line;
    formatter_->format(message, line);
    for (size_t done = 0; done < line.size();) {
      // A pipe that polls as writable takes PIPE_BUF bytes without blocking.
      pollfd ready{descriptor_, POLLOUT, 0};
      if (poll(&ready, 1, stuck_ ? 0 : kPatienceMs) == 0) {
        stuck_ = true;
        ++failures_;
        return;
      }
      const ssize_t written = ::write(descriptor_, line.data() + done, std::min<size_t>(line.size() - done, PIPE_BUF));
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) {
        ++failures_;
        return;
      }
      stuck_ = false;
      done += static_cast<size_t>(written);
    }
  }
  void flush_() override {}

 private:
  static constexpr int kPatienceMs = 1000;
  const int descriptor_;
  bool stuck_ = false;  // the last write had to be given up: the next ones do not wait
  std::atomic<int64_t> failures_ = 0;
};

spdlog::level::level_enum ToSpdlog(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarn:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
    case LogLevel::kOff:
      return spdlog::level::off;
  }
  return spdlog::level::off;
}

void AppendNumber(double value, std::string* out) {
  *out += std::isfinite(value) ? fmt::format("{:.6g}", value) : "null";
}

void AppendJsonField(const LogField& field, std::string* out) {
  *out += ",\"";
  *out += field.name;
  *out += "\":";
  if (const auto* text = std::get_if<std::string_view>(&field.value)) {
    AppendJsonString(*text, out);
  } else if (const auto* integer = std::get_if<int64_t>(&field.value)) {
    *out += std::to_string(*integer);
  } else {
    AppendNumber(std::get<double>(field.value), out);
  }
}

void AppendTextField(const LogField& field, std::string* out) {
  *out += ' ';
  *out += field.name;
  *out += '=';
  if (const auto* text = std::get_if<std::string_view>(&field.value)) {
    const bool plain = !text->empty() && text->find_first_not_of(
                                             "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                             "0123456789-_.:/+@") == std::string_view::npos;
    if (plain)
      *out += *text;
    else
      AppendJsonString(*text, out);  // quoted: one event stays one line, whatever it holds
  } else if (const auto* integer = std::get_if<int64_t>(&field.value)) {
    *out += std::to_string(*integer);
  } else {
    AppendNumber(std::get<double>(field.value), out);
  }
}

}  // namespace

std::string FormatLogEvent(LogFormat format, std::string_view event, std::initializer_list<LogField> fields) {
  std::string out;
  if (format == LogFormat::kText) {
    out = event;
    for (const LogField& field : fields) AppendTextField(field, &out);
  } else {
    out = "\"event\":";
    AppendJsonString(event, &out);
    for (const LogField& field : fields) AppendJsonField(field, &out);
  }
  return out;
}

struct Log::Impl {
  Impl(LogFormat format, LogLevel level, int descriptor)
      : pool(std::make_shared<spdlog::details::thread_pool>(kQueuedLines, 1)),
        sink(std::make_shared<DescriptorSink>(descriptor)),
        logger(std::make_shared<spdlog::async_logger>("linspec", sink, pool,
                                                      spdlog::async_overflow_policy::overrun_oldest)) {
    logger->set_pattern(format == LogFormat::kJson ? R"({"time":"%Y-%m-%dT%H:%M:%S.%e%z","level":"%l",%v})"
                                                   : "%Y-%m-%d %H:%M:%S.%e %l %v");
    logger->set_level(ToSpdlog(level));
  }
  std::shared_ptr<spdlog::details::thread_pool> pool;  // its destructor waits until the queue is written
  std::shared_ptr<DescriptorSink> sink;
  std::shared_ptr<spdlog::async_logger> logger;
};

Log::Log(LogFormat format, LogLevel level) : Log(format, level, STDOUT_FILENO) {}
Log::Log(LogFormat format, LogLevel level, int descriptor)
    : format_(format), impl_(std::make_unique<Impl>(format, level, descriptor)) {}
Log::~Log() = default;

bool Log::Enabled(LogLevel level) const { return impl_->logger->should_log(ToSpdlog(level)); }

void Log::Write(LogLevel level, std::string_view event, std::initializer_list<LogField> fields) {
  if (!Enabled(level)) return;
  impl_->logger->log(ToSpdlog(level), spdlog::string_view_t(FormatLogEvent(format_, event, fields)));
}

int64_t Log::lines_lost() const {
  return impl_->sink->failures() + static_cast<int64_t>(impl_->pool->overrun_counter());
}

}  // namespace linspec
