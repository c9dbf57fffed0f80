// Prometheus metrics: linspec_* with the suffixes, labels and bucket edges that vLLM's users know. Label values come
// from
// fixed lists, never from what a client sends.
//
// Threads: every method from any thread. OnStep is called by the engine and only touches atomics and short mutexes
// that a
// scrape holds for one metric at a time; Serialize never waits for the engine.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "scheduler/engine.h"
#include "scheduler/request.h"

namespace linspec {

struct StreamTimes;
struct StreamUsage;

class Metrics {
 public:
  // alias_vllm: export the core metrics a second time as vllm:*.
  Metrics(const std::string& model_name, bool alias_vllm);
  ~Metrics();

  void OnStep(const StepStats& step);
  void OnFirstToken(const StreamTimes& times);
  void OnGaps(const std::vector<float>& seconds);
  void OnFinished(FinishReason reason, const StreamUsage& usage, const StreamTimes& times);
  void OnProbe(bool can_generate);             // generation_probe.h
  void OnRejected(const std::string& reason);  // a word of the server's own
  void OnHttp(const std::string& route, const std::string& method, int status, double seconds);
  std::string Serialize(const EngineStats& stats);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace linspec
