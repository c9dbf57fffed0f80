// Figures of the front door with an engine that costs nothing (docs/reliability.md): the real server in this process,
// its clients in a child, so that memory and processor time are the server's alone.
//
//   bench_front_door SCENARIO [--server linspec|beast|grpc|socket] [--protocol rest|grpc] [--streams N] [--tokens N]
//                    [--pace-us N] [--seconds N] [--rate N] [any flag of `linspec serve`]
//
// streams: N streams of so many tokens, all at once: ages of tokens at the client, tokens a second. idle: N connections
// kept open. slow: N readers that never read. overload: requests at a rate. cancel: steps until a dropped slot is free.
// serve: prints the ports and serves other clients until standard input ends.
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <new>
#include <string>

#include "server/flags.h"
#include "server/server.h"
#include "tests/front_door/bare_servers.h"
#include "tests/front_door/null_engine.h"
#include "tests/front_door/scenarios.h"

namespace linspec::front_door {
namespace {

double ResidentMiB() {
  std::ifstream file("/proc/self/statm");
  int64_t size = 0, resident = 0;
  file >> size >> resident;
  return static_cast<double>(resident * sysconf(_SC_PAGESIZE)) / (1 << 20);
}

double ProcessorSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

void RaiseFileLimit() {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

// The child: waits until the server listens, loads it, says when it is done.
int RunChild(const ScenarioOptions& options, SharedState* shared) {
  while (shared->http_port == 0 && shared->grpc_port == 0) usleep(1000);
  if (options.scenario == "serve") {
    fmt::print("{} {}\n", shared->http_port.load(), shared->grpc_port.load());
    std::fflush(stdout);
    while (std::getchar() != EOF) {
    }
  } else {
    RunScenario(options, shared);
  }
  std::fflush(stdout);
  shared->stop = true;
  return 0;
}

void Watch(SharedState* shared, pid_t child) {
  const double before = ResidentMiB(), processor = ProcessorSeconds();
  double low = before, high = before;
  int status = 0, tick = 0;
  std::string track;
  while (waitpid(child, &status, WNOHANG) == 0) {
    const double now = ResidentMiB();
    low = std::min(low, now);
    high = std::max(high, now);
    if (tick++ % 100 == 0) track += fmt::format(" {:.0f}", now);
    usleep(10000);
  }
  shared->stop = true;
  fmt::print("  server: {:.0f} MiB before, {:.0f} at most; each second:{}\n  server: {:.2f} s of processor time\n",
             before, high, track, ProcessorSeconds() - processor);
}

absl::Status RunLinspec(ServerConfig config, std::chrono::microseconds pace, SharedState* shared, pid_t child) {
  Log log(LogFormat::kText, LogLevel::kWarn);
  const auto load = [&](const ServerConfig& c, StepObserver observer) {
    return NullParts(c, pace, shared, std::move(observer));
  };
  auto server = Server::Start(config, load, &log);
  if (!server.ok()) return server.status();
  shared->grpc_port = (*server)->grpc_port();
  shared->http_port = (*server)->http_port();
  Watch(shared, child);
  const EngineStats stats = (*server)->service().engine().stats();
  fmt::print("  engine: {} steps, {} output tokens, {} of {} slots free\n", stats.steps, stats.output_tokens,
             stats.slots_free, stats.slots_total);
  return absl::OkStatus();
}

absl::Status Main(std::vector<std::string> args) {
  CommandFlags flags(args);
  ScenarioOptions options;
  const std::string server = flags.String("server", "linspec");
  options.grpc = flags.String("protocol", server == "grpc" ? "grpc" : "rest") == "grpc";
  options.streams = flags.Int("streams", 500, 1, 100000);
  options.tokens = flags.Int("tokens", 200, 1, 1000000);
  options.seconds = flags.Double("seconds", 10, 0.1, 600);
  options.rate = flags.Double("rate", 100, 0.1, 1e6);
  const std::chrono::microseconds pace(flags.Int("pace-us", 0, 0, 10000000));
  options.scenario = flags.Positional();
  const auto servers = {"linspec", "beast", "grpc", "socket"};
  if (std::ranges::find(servers, server) == servers.end() || (server == "socket" && pace.count() == 0)) {
    return absl::InvalidArgumentError("--server is one of linspec, beast, grpc and, with --pace-us, socket");
  }
  const auto known = {"streams", "idle", "slow", "overload", "cancel", "serve"};
  if (std::ranges::find(known, options.scenario) == known.end()) {
    return absl::InvalidArgumentError("the first argument is one of streams, idle, slow, overload, cancel, serve");
  }
  std::vector<std::string> rest = {"--http-port=0",     "--grpc-port=0",      "--probe-interval=0",
                                   "--speculation=off", "--max-requests=512", "--max-step-tokens=2048"};
  rest.insert(rest.end(), flags.rest().begin(), flags.rest().end());
  auto config = ParseServerConfig(rest);
  if (!config.ok()) return config.status();
  if (!flags.status().ok()) return flags.status();

  RaiseFileLimit();
  void* memory = mmap(nullptr, sizeof(SharedState), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return absl::InternalError(std::strerror(errno));
  auto* shared = new (memory) SharedState;
  const pid_t child = fork();  // before any thread exists
  if (child == 0) std::_Exit(RunChild(options, shared));
  if (server == "linspec") return RunLinspec(*config, pace, shared, child);
  if (server == "beast") RunBareBeast(pace, options.tokens, shared);
  if (server == "grpc") RunBareGrpc(pace, options.tokens, shared);
  if (server == "socket") RunBareSocket(pace, options.tokens, shared);
  fmt::print("  server: {:.2f} s of processor time\n", ProcessorSeconds());
  return absl::OkStatus();
}

}  // namespace
}  // namespace linspec::front_door

int main(int argc, char** argv) {
  const absl::Status status = linspec::front_door::Main({argv + 1, argv + argc});
  if (status.ok()) return 0;
  std::fprintf(stderr, "bench_front_door: %s\n", std::string(status.message()).c_str());
  return 1;
}
