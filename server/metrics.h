// Prometheus metrics: linspec_* with the suffixes, labels and bucket edges that vLLM's users know, and finer edges
// below 10 ms. Label values come from fixed lists, never from what a client sends.
//
// Threads: every method from any thread. OnStep is called by the engine and only touches atomics and short mutexes that
// a scrape holds for one metric at a time; Serialize never waits for the engine.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "models/device_stats.h"
#include "scheduler/engine.h"
#include "scheduler/request.h"

namespace linspec {

struct StreamTimes;
struct StreamUsage;

// A value that somebody else keeps, read at each scrape.
struct MetricSample {
  std::string name, help;
  bool counter = false;  // else a gauge
  std::vector<std::pair<std::string, std::string>> labels = {};
  double value = 0;
};
using MetricCollector = std::function<std::vector<MetricSample>()>;

struct MetricsOptions {
  std::string model_name;
  std::vector<std::string> drafters = {};  // the loaded ones
  bool alias_vllm = false;                 // export vLLM's core set a second time as vllm:*
  bool observes = true;                    // false: no On... does anything
};

class Metrics {
 public:
  explicit Metrics(MetricsOptions options);
  ~Metrics();

  // Runs at each scrape, on the scraping thread, and must not wait for the engine.
  void AddCollector(MetricCollector collector);

  void OnStep(const StepStats& step);
  void OnSubmitted(int64_t max_tokens, int n);
  void OnFirstToken(const StreamTimes& times);
  void OnGaps(const std::vector<float>& seconds);
  void OnDetokenize(double seconds);  // one take: tokens to text, stop strings
  void OnWrite(double seconds);       // one write to a client, until the kernel or gRPC took all of it
  void OnFinished(FinishReason reason, const StreamUsage& usage, const StreamTimes& times);
  void OnRejected(const std::string& reason);  // a word of the server's own
  void OnHttp(const std::string& route, const std::string& method, int status, double seconds);
  void OnRpc(const std::string& method, const std::string& code, double seconds);  // method: one of our service's
  std::string Serialize(const EngineStats& stats);

 private:
  struct Impl;
  const bool observes_;
  std::unique_ptr<Impl> impl_;
};

// Collectors. Memory, processor time, open files and start time of this process, under Prometheus' usual names.
std::vector<MetricSample> ProcessSamples();
// Nothing for a device that does not exist.
std::vector<MetricSample> DeviceSamples(std::span<const DeviceStats> devices);

}  // namespace linspec
