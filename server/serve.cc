// `linspec serve`: load, listen, wait for a signal, drain.
#include <fmt/format.h>

#include <condition_variable>
#include <csignal>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "server/commands.h"
#include "server/model_files.h"
#include "server/server.h"

namespace linspec {
namespace {

Log MakeLog(const ServerConfig::OperationsOptions& options) {
  const LogFormat format = options.log_format == "json" ? LogFormat::kJson : LogFormat::kText;
  for (const auto& [name, level] : {std::pair("debug", LogLevel::kDebug), std::pair("info", LogLevel::kInfo),
                                    std::pair("warn", LogLevel::kWarn), std::pair("error", LogLevel::kError)}) {
    if (options.log_level == name) return Log(format, level);
  }
  return Log(format, LogLevel::kOff);
}

// SIGINT and SIGTERM are waited for, never handled: blocked before any thread exists, so that all threads inherit it.
// While the model loads a signal ends the process; afterwards the first begins the drain and the second ends it.
class SignalWatcher {
 public:
  SignalWatcher() {
    sigemptyset(&signals_);
    sigaddset(&signals_, SIGINT);
    sigaddset(&signals_, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
    std::signal(SIGPIPE, SIG_IGN);
    std::thread([this] { Run(); }).detach();  // ends with the process
  }

  void Loaded() {
    std::lock_guard lock(mutex_);
    loaded_ = true;
  }

  int WaitForFirst() {
    std::unique_lock lock(mutex_);
    came_.wait(lock, [this] { return first_ != 0; });
    return first_;
  }

 private:
  [[noreturn]] void Run() {
    while (true) {
      int signal = 0;
      sigwait(&signals_, &signal);
      std::lock_guard lock(mutex_);
      if (!loaded_ || first_ != 0) {
        // Not to the log, which would not be written any more.
        fmt::print(stderr, "linspec: {}: ending at once\n", loaded_ ? "second signal" : "signal while loading");
        std::_Exit(128 + signal);
      }
      first_ = signal;
      came_.notify_one();
    }
  }

  sigset_t signals_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable came_;
  bool loaded_ = false;
  int first_ = 0;
};

// What requests get that do not say.
std::string Defaults(const Service& service) {
  const SamplingDefaults& d = service.generation().sampling;
  return fmt::format("temperature {}, top_p {}, top_k {}, min_p {}, repetition_penalty {}, {} tokens of a chat",
                     d.temperature, d.top_p, d.top_k, d.min_p, d.repetition_penalty,
                     service.call_limits().default_chat_tokens);
}

void PrintReady(const ServerConfig& config, Service* service, int http_port, int grpc_port) {
  const EngineStats stats = service->engine().stats();
  fmt::print("model     {} ({})\n{}\n", service->model_name(),
             config.model.path.empty() ? "bundled" : config.model.path, service->engine().Describe());
  fmt::print(
      "capacity  {} requests fit, {:.2f} MiB of {} each at any context length; states of {} prompt beginnings are "
      "kept\n",
      stats.slots_total, static_cast<double>(stats.bytes_per_slot) / (1 << 20), DTypeName(stats.state_dtype),
      stats.prefix_cache_capacity);
  if (const WarmUpReport& warm = service->engine().warm_up(); warm.sizes > 0) {
    fmt::print("warm-up   {} kinds of steps and drafts in {:.1f} s and {:.0f} MiB{}\n", warm.sizes, warm.seconds,
               static_cast<double>(warm.bytes) / (1 << 20),
               warm.left_out > 0 ? fmt::format("; {} left for when they come", warm.left_out) : "");
  }
  fmt::print("defaults  {}\n", Defaults(*service));
  fmt::print("flags     (* differs from the default)\n{}\n", DescribeConfig(config));
  const bool tls = !config.security.tls_cert.empty();
  const std::string base = fmt::format("{}://{}:{}", tls ? "https" : "http", config.network.host, http_port);
  if (http_port > 0) fmt::print("REST      {}\n", base);
  if (grpc_port > 0) fmt::print("gRPC      {}:{}\n", config.network.host, grpc_port);
  if (http_port > 0) {
    const char* key = config.security.api_key_file.empty() ? "" : " -H 'Authorization: Bearer YOUR_KEY'";
    fmt::print(
        "\ncurl -N {}/v1/completions{} -H 'Content-Type: application/json' \\\n"
        "  -d '{{\"prompt\": \"Once upon a time\", \"max_tokens\": 64, \"temperature\": 0.7, \"stream\": true}}'\n\n",
        base, key);
  }
  std::fflush(stdout);
}

// With JSON logs every line of standard output is JSON, the greeting included.
void LogReady(const ServerConfig& config, Service* service, int http_port, int grpc_port, Log* log) {
  const EngineStats stats = service->engine().stats();
  log->Write(LogLevel::kInfo, "ready",
             {{"version", kVersion},
              {"model", service->model_name()},
              {"description", service->engine().Describe()},
              {"capacity_requests", stats.slots_total},
              {"prefix_cache_entries", stats.prefix_cache_capacity},
              {"state_bytes_per_request", stats.bytes_per_slot},
              {"state_dtype", DTypeName(stats.state_dtype)},
              {"warm_up_sizes", int64_t{service->engine().warm_up().sizes}},
              {"warm_up_left_out", int64_t{service->engine().warm_up().left_out}},
              {"warm_up_seconds", service->engine().warm_up().seconds},
              {"warm_up_bytes", service->engine().warm_up().bytes},
              {"host", config.network.host},
              {"http_port", int64_t{http_port}},
              {"grpc_port", int64_t{grpc_port}},
              {"defaults", Defaults(*service)},
              {"flags", ChangedFlags(config)}});
}

}  // namespace

absl::Status Serve(std::span<const std::string> args) {
  auto config = ParseServerConfig(args);
  if (!config.ok()) return config.status();
  static auto* const signals = new SignalWatcher;  // never destroyed: its thread runs to the end of the process
  Log log(MakeLog(config->operations));
  const bool json = log.format() == LogFormat::kJson;
  if (!json) fmt::print("linspec {}\n", kVersion);
  std::fflush(stdout);
  auto server = Server::Start(*config, LoadParts, &log);
  if (!server.ok()) return server.status();
  signals->Loaded();
  Service* service = &(*server)->service();
  const int http_port = (*server)->http_port(), grpc_port = (*server)->grpc_port();
  if (json)
    LogReady(*config, service, http_port, grpc_port, &log);
  else
    PrintReady(*config, service, http_port, grpc_port);

  const int signal = signals->WaitForFirst();
  log.Write(LogLevel::kInfo, "draining",
            {{"signal", int64_t{signal}}, {"timeout_s", config->operations.drain_timeout_s}});
  (*server)->StopAdmitting();
  (*server)->Drain();
  log.Write(LogLevel::kInfo, "drained");
  return absl::OkStatus();
}

}  // namespace linspec
