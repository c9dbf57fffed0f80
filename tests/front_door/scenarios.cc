#include "tests/front_door/scenarios.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <random>
#include <thread>

#include "tests/front_door/grpc_load.h"
#include "tests/front_door/http_load.h"

namespace linspec::front_door {
namespace {

constexpr int kWarmUpTokens = 20;  // of each stream, not counted

double Milliseconds(int64_t ns) { return static_cast<double>(ns) * 1e-6; }

std::string Percentiles(std::vector<double> values) {
  if (values.empty()) return "none";
  std::ranges::sort(values);
  const auto at = [&](double q) { return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1))]; };
  return fmt::format("p50 {:.3f}  p90 {:.3f}  p99 {:.3f}  max {:.3f} ms", at(0.5), at(0.9), at(0.99), values.back());
}

// Ages of tokens, and how many came.
class Recorder {
 public:
  Recorder(SharedState* shared, int streams) : shared_(shared), seen_(streams) {}

  void Text(int stream, std::string_view text) {
    const auto tokens = static_cast<int>(text.size() / kTokenBytes);
    if (tokens == 0) return;
    if (total_ == 0) first_ns_ = NowNs();
    total_ += tokens;
    ++messages_;
    last_ns_ = NowNs();
    if ((seen_[stream] += tokens) <= kWarmUpTokens) return;
    const int step = std::atoi(text.data() + text.size() - kTokenBytes + 1);
    ages_.push_back(Milliseconds(last_ns_ - shared_->step_ns[step]));
  }

  void Print() {
    const double seconds = static_cast<double>(last_ns_ - first_ns_) * 1e-9;
    fmt::print("  {} tokens in {} messages, {:.2f} s: {:.0f} tokens/s, {:.0f} messages/s\n  age of a token: {}\n",
               total_, messages_, seconds, static_cast<double>(total_) / seconds,
               static_cast<double>(messages_) / seconds, Percentiles(ages_));
  }

 private:
  SharedState* const shared_;
  std::vector<int> seen_;
  std::vector<double> ages_;
  int64_t total_ = 0, messages_ = 0, first_ns_ = 0, last_ns_ = 0;
};

// Hands each complete server-sent event's text over.
void TakeEvents(HttpConnection* connection, Recorder* recorder) {
  std::string& received = connection->received;
  size_t begin = 0;
  for (size_t end; (end = received.find("\n\n", begin)) != std::string::npos; begin = end + 2) {
    const std::string_view event(received.data() + begin, end - begin);
    constexpr std::string_view kText = "\"text\":\"";
    const size_t text = event.find(kText);
    if (text == std::string_view::npos) continue;
    const size_t from = text + kText.size();
    recorder->Text(connection->id, event.substr(from, event.find('"', from) - from));
  }
  received.erase(0, begin);
}

void Streams(const ScenarioOptions& options, SharedState* shared) {
  Recorder recorder(shared, options.streams);
  if (options.grpc) {
    RunGrpcStreams(shared->grpc_port, options.streams, options.tokens,
                   [&](int stream, const std::string& text) { recorder.Text(stream, text); });
  } else {
    HttpLoad* load = nullptr;
    HttpLoad client(
        shared->http_port, [&](HttpConnection* connection) { TakeEvents(connection, &recorder); },
        [&](HttpConnection* connection) { load->Close(connection); });
    load = &client;
    for (int i = 0; i < options.streams; ++i) client.Open(PostCompletion(options.tokens, true, false));
    while (client.num_open() > 0) client.Poll(100);
  }
  recorder.Print();
}

void Idle(const ScenarioOptions& options, SharedState* shared) {
  int answered = 0;
  HttpLoad client(
      shared->http_port,
      [&](HttpConnection* connection) {
        if (!connection->received.empty()) ++answered;
        connection->received = {};
      },
      [](HttpConnection*) {});
  const int64_t end = NowNs() + static_cast<int64_t>(options.seconds * 1e9);
  for (int i = 0; i < options.streams; ++i) {
    client.Open("GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
    if (i % 100 == 0) client.Poll(0);
  }
  while (NowNs() < end) client.Poll(100);
  fmt::print("  {} of {} connections answered once and kept open\n", answered, options.streams);
}

// Readers that never read; each one that the server cuts off comes back.
void Slow(const ScenarioOptions& options, SharedState* shared) {
  int cut = 0;
  std::vector<HttpConnection*> gone;
  HttpLoad client(
      shared->http_port, [](HttpConnection*) {}, [&](HttpConnection* connection) { gone.push_back(connection); });
  const std::string request = PostCompletion(100000, true, false);
  for (int i = 0; i < options.streams; ++i) client.Open(request, false);
  const int64_t end = NowNs() + static_cast<int64_t>(options.seconds * 1e9);
  while (NowNs() < end) {
    client.Poll(100);
    for (HttpConnection* connection : std::exchange(gone, {})) {
      if (connection->fd < 0) continue;
      client.Close(connection);
      client.Open(request, false);
      ++cut;
    }
  }
  fmt::print("  {} readers that never read, {} times cut off and back\n", options.streams, cut);
}

// Open loop: requests come by a Poisson process, whatever has become of the ones before.
void Overload(const ScenarioOptions& options, SharedState* shared) {
  std::vector<double> served, refused;
  std::map<std::string, int> statuses;
  HttpLoad* load = nullptr;
  HttpLoad client(
      shared->http_port, [](HttpConnection*) {},
      [&](HttpConnection* connection) {
        const std::string status = connection->received.substr(0, 12);
        ++statuses[status];
        (status == "HTTP/1.1 200" ? served : refused).push_back(Milliseconds(NowNs() - connection->started_ns));
        load->Close(connection);
      });
  load = &client;
  std::mt19937_64 generator(1);
  std::exponential_distribution<double> gap(options.rate);
  const std::string request = PostCompletion(options.tokens, false, false);
  const int64_t start = NowNs(), end = start + static_cast<int64_t>(options.seconds * 1e9);
  double next = 0;
  while (NowNs() < end) {
    while (static_cast<double>(NowNs() - start) * 1e-9 >= next) {
      client.Open(request);
      next += gap(generator);
    }
    client.Poll(1);
  }
  const size_t in_time = served.size();
  const int64_t patience = NowNs() + int64_t{20'000'000'000};
  while (client.num_open() > 0 && NowNs() < patience) client.Poll(100);
  fmt::print("  offered {:.0f}/s: {:.1f} served a second; all served: {}\n  {} refused: {}\n", options.rate,
             static_cast<double>(in_time) / options.seconds, Percentiles(served), refused.size(), Percentiles(refused));
  for (const auto& [status, count] : statuses) fmt::print("  {} x {}\n", status, count);
}

// Drops half of the streams at once, again and again: in how many steps after that were they still worked for?
void Cancel(const ScenarioOptions& options, SharedState* shared) {
  std::map<int, int> histogram;
  std::mt19937_64 generator(1);
  const int rounds = static_cast<int>(options.seconds);
  for (int round = 0; round < rounds; ++round) {
    HttpLoad client(
        shared->http_port, [](HttpConnection* connection) { connection->received.clear(); }, [](HttpConnection*) {});
    for (int i = 0; i < options.streams; ++i) client.Open(PostCompletion(100000, true, false));
    const int64_t settle = NowNs() + 300'000'000 + static_cast<int64_t>(generator() % 20'000'000);
    while (NowNs() < settle) client.Poll(1);
    shared->keep = options.streams / 2;
    shared->steps_to_free = -1;
    for (int i = options.streams / 2; i < options.streams; ++i) client.Close(client.connections()[i].get());
    shared->close_ns = NowNs();
    while (shared->steps_to_free < 0) client.Poll(1);
    ++histogram[shared->steps_to_free];
    shared->close_ns = 0;
    for (int i = 0; i < options.streams / 2; ++i) client.Close(client.connections()[i].get());
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  for (const auto& [steps, count] : histogram) {
    fmt::print("  {} of {} times: {} steps began after the drop and still held a dropped stream\n", count, rounds,
               steps);
  }
}

}  // namespace

void RunScenario(const ScenarioOptions& options, SharedState* shared) {
  if (options.scenario == "streams") return Streams(options, shared);
  if (options.scenario == "idle") return Idle(options, shared);
  if (options.scenario == "slow") return Slow(options, shared);
  if (options.scenario == "overload") return Overload(options, shared);
  Cancel(options, shared);
}

}  // namespace linspec::front_door
