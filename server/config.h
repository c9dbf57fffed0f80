// ServerConfig: every setting of `linspec serve`. A flag is declared once, in VisitFlags (config.cc); command line,
// YAML file, help text and the start-up print all come from that declaration.
//
// Threads: parsed once at start, constant afterwards.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace linspec {

struct ServerConfig {
  struct ModelOptions {
    std::string path;         // empty: the bundled model
    std::string draft_path;   // empty: the bundled draft model beside a bundled target; "none": no draft
    std::string served_name;  // empty: the folder's name
    std::string generation_config = "auto";
    std::string weight_dtype = "auto";
    std::string state_dtype = "f32";
    std::string device = "auto";
    std::string cuda_plugin;
    bool deterministic = false;
    std::string isa = "auto";
    int threads = 0;
  } model;
  struct NetworkOptions {
    std::string host = "127.0.0.1";
    int http_port = 8000;  // 0: any free port, -1: off
    int grpc_port = 50051;
    int io_threads = 2;
    int max_connections = 16384;
    int64_t max_body_bytes = 4 << 20;
    int64_t max_header_bytes = 16 << 10;
    double header_timeout_s = 10;
    double idle_timeout_s = 60;
    int64_t stream_buffer_bytes = 256 << 10;
    int max_grpc_streams = 4096;
    std::string cors_origin;
  } network;
  struct EngineLimits {
    int max_requests = 0;  // 0: as many as suit the machine
    int prefix_cache = 16;
    int max_queue_requests = 1024;
    int64_t max_queue_tokens = 4 << 20;
    int max_step_tokens = 0;  // 0: what suits the machine
    int max_prompt_tokens = 131072;
    int max_output_tokens = 131072;
    int max_n = 16;
    int default_chat_tokens = 0;  // 0: the model's, or 1024
    int max_stop_strings = 16;
    int max_stop_bytes = 1024;
    int max_logit_bias = 1024;
    int max_messages = 4096;
    int max_requests_per_key = 0;  // 0: no limit
    int max_running_per_key = 0;   // 0: as many as leave slots for other keys, if there are any
    std::string speculation = "auto";
    int max_draft_nodes = 0;  // 0: what suits the machine
    std::string acceptance = "gumbel";
    bool adaptive_speculation = true;
    double max_draft_slowdown = 2;
    double warm_up_s = 10;
    bool run_ahead = true;
    int draft_depth = 6;
    int draft_top_k = 0;  // 0: what suits the machine
    std::string medusa_tree = "dynamic";
  } engine;
  struct SecurityOptions {
    std::string api_key_file;
    std::string tls_cert, tls_key, tls_client_ca;
    bool public_metrics = true;
  } security;
  struct OperationsOptions {
    double drain_timeout_s = 30;
    double probe_interval_s = 10;
    std::string log_level = "info";
    std::string log_format = "text";
    bool log_prompts = false;
    bool metrics = true;
    std::string metrics_alias;
  } operations;
};

// Command line (after the subcommand) over configuration file (--config) over defaults. INVALID_ARGUMENT names flag and
// value; an unknown flag comes with the nearest known one.
absl::StatusOr<ServerConfig> ParseServerConfig(std::span<const std::string> args);
// The file alone: `flag-name: value` lines in YAML.
absl::Status ApplyYaml(const std::string& yaml, const std::string& source, ServerConfig* config);
absl::Status ValidateConfig(const ServerConfig& config);

std::string ServerHelp();                                // grouped, with defaults
std::string ChangedFlags(const ServerConfig& config);    // "--name value ..." of those that differ from the default
std::string DescribeConfig(const ServerConfig& config);  // one `--flag value` per line, those that differ marked with *

}  // namespace linspec
