// What one load test does. Flag names follow `vllm bench serve` where it has one.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace linspec::loadtest {

struct Goodput {  // milliseconds; infinity: no bound
  double ttft = std::numeric_limits<double>::infinity();
  double tpot = std::numeric_limits<double>::infinity();
  double e2el = std::numeric_limits<double>::infinity();
  bool any() const;
};

struct Options {
  std::string backend = "openai";  // openai, openai-chat, grpc
  std::string base_url;            // "http[s]://host:port" instead of host and port
  std::string path_prefix;         // from base_url; before every path
  std::string host = "127.0.0.1";
  int port = 0;             // 0: 8000, or 50051 for grpc
  int metrics_port = 8000;  // where /metrics is when the backend is grpc
  std::string endpoint;     // empty: the backend's usual path
  std::string model;        // empty: the first one the server lists
  std::string api_key_file;
  bool tls = false;                       // also by https:// or any of the next
  std::string tls_ca, tls_cert, tls_key;  // PEM files; empty: the system's roots, no certificate of ours

  std::string dataset_name = "random";  // random, custom, sharegpt, trace
  std::string dataset_path;
  int num_prompts = 200;
  int num_warmups = 1;
  int random_input_len = 64;                    // words
  int random_output_len = 64;                   // tokens
  double random_range_ratio = 0;                // lengths uniform in [len (1 - r), len (1 + r)]
  std::string length_distribution = "uniform";  // uniform, lognormal (sigma = the ratio), exponential; mean: len

  double request_rate = std::numeric_limits<double>::infinity();
  double burstiness = 1;         // gamma shape: 1 is Poisson, below 1 burstier
  std::string ramp_up_strategy;  // empty, linear, exponential: the rate moves from start to end over the requests
  double ramp_up_start_rps = 0, ramp_up_end_rps = 0;
  int max_concurrency = 0;  // 0: unbounded (open loop)
  double trace_speed = 1;
  bool trace_arrivals = true;  // false: lengths from the trace, arrivals from request_rate
  double duration = 0;         // seconds after which no request starts; 0: all of them
  double timeout = 600;        // seconds a request may take
  uint64_t seed = 0;

  double temperature = 0;
  double top_p = 1;
  bool ignore_eos = false;

  double cancel_fraction = 0;  // of requests, dropped by the client after cancel_after chunks
  int cancel_after = 4;
  double slow_fraction = 0;  // of requests, read with a pause between reads
  int slow_delay_ms = 200;

  int threads = 1;
  std::vector<double> metric_percentiles = {50, 90, 95, 99};
  std::string percentile_metrics = "ttft,tpot,itl,e2el";  // in the printed table; the JSON has all
  Goodput goodput;
  bool save_detailed = false;
  bool save_result = false;     // write JSON to result_dir/result_filename
  bool append_result = false;   // as one more line of that file
  std::string result_dir;       // empty: the working directory
  std::string result_filename;  // empty: backend-rate-model-time.json
  std::string label;            // copied into the result
  std::string html;             // report file; empty: none
  bool quiet = false;
};

// INVALID_ARGUMENT names flag and value.
absl::StatusOr<Options> ParseOptions(std::span<const std::string> args);
std::string OptionsHelp();

}  // namespace linspec::loadtest
