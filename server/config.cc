#include "server/config.h"

#include <fmt/format.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <limits>
#include <numeric>
#include <sstream>
#include <type_traits>

namespace linspec {
namespace {

struct FlagInfo {
  const char* group;
  const char* name;
  const char* help;
  double min = -1e18, max = 1e18;         // numbers
  std::vector<std::string> choices = {};  // strings; empty: free text
};

// The flags of each group; visit(info, field). Options is const or not.
template <class Options, class Visit>
void VisitModelFlags(Options& o, Visit&& visit) {
  constexpr const char* g = "Model";
  visit(
      FlagInfo{g, "model", "model folder (config.json, model.safetensors, tokenizer.json); default: the bundled model"},
      o.path);
  visit(FlagInfo{g, "draft-model", "folder of the draft model with the same tokenizer; none: do not load one"},
        o.draft_path);
  visit(FlagInfo{g, "served-model-name", "name that clients send as `model`; default: the folder's name"},
        o.served_name);
  visit(FlagInfo{g,
                 "generation-config",
                 "what requests get that do not say; auto: the model's generation_config.json, none: OpenAI's defaults",
                 0,
                 0,
                 {"auto", "none"}},
        o.generation_config);
  visit(FlagInfo{g, "threads", "threads of the engine's arithmetic; 0: one per core", 0, 1024}, o.threads);
  visit(FlagInfo{g, "device", "where the models run; auto: a GPU if there is one", 0, 0, {"auto", "cpu", "cuda"}},
        o.device);
  visit(FlagInfo{g, "cuda-plugin", "liblinspec_cuda.so; default: where an installation or a build has it"},
        o.cuda_plugin);
  visit(FlagInfo{g, "deterministic", "GPU: a reply never depends on what else runs, at any batch; costs speed"},
        o.deterministic);
  visit(FlagInfo{g, "isa", "instruction set of the CPU", 0, 0, {"auto", "scalar", "avx2", "avx512", "amx"}}, o.isa);
  visit(FlagInfo{g, "weight-dtype", "weights in memory; auto: as stored", 0, 0, {"auto", "f32", "bf16", "int8", "fp8"}},
        o.weight_dtype);
  visit(FlagInfo{g, "state-dtype", "states of requests, in memory; bf16: half of it", 0, 0, {"f32", "bf16"}},
        o.state_dtype);
}

template <class Options, class Visit>
void VisitNetworkFlags(Options& o, Visit&& visit) {
  constexpr const char* g = "Network";
  visit(FlagInfo{g, "host", "address to listen on"}, o.host);
  visit(FlagInfo{g, "http-port", "REST port; 0: any free port, -1: no REST", -1, 65535}, o.http_port);
  visit(FlagInfo{g, "grpc-port", "gRPC port; 0: any free port, -1: no gRPC", -1, 65535}, o.grpc_port);
  visit(FlagInfo{g, "io-threads", "threads that serve HTTP connections", 1, 256}, o.io_threads);
  visit(FlagInfo{g, "max-connections", "open HTTP connections; more are answered 503", 1, 1e6}, o.max_connections);
  visit(FlagInfo{g, "max-body-bytes", "largest request body and gRPC message", 1024, 1 << 30}, o.max_body_bytes);
  visit(FlagInfo{g, "max-header-bytes", "largest head of an HTTP request: request line and headers", 1024, 1 << 20},
        o.max_header_bytes);
  visit(FlagInfo{g, "header-timeout", "seconds to send headers and body", 0.1, 3600}, o.header_timeout_s);
  visit(
      FlagInfo{g, "idle-timeout", "seconds a keep-alive connection may stay silent, or a write may stall", 0.1, 86400},
      o.idle_timeout_s);
  visit(FlagInfo{g, "stream-buffer-bytes",
                 "output kept per stream for a slow reader, and the size of its socket buffer; beyond it the stream is "
                 "cancelled",
                 4096, 1 << 30},
        o.stream_buffer_bytes);
  visit(FlagInfo{g, "max-grpc-streams", "gRPC calls open at once on one connection", 1, 1e6}, o.max_grpc_streams);
  visit(FlagInfo{g, "cors-origin", "Access-Control-Allow-Origin to send; empty: no CORS"}, o.cors_origin);
}

template <class Options, class Visit>
void VisitLimitsFlags(Options& o, Visit&& visit) {
  constexpr const char* g = "Limits";
  visit(FlagInfo{g, "max-requests",
                 "requests that run at once (state slots); 0: what fits on the GPU (at most 2048), or 64 on a CPU", 0,
                 1e6},
        o.max_requests);
  visit(FlagInfo{g, "prefix-cache",
                 "prompt beginnings to keep the state of, for prompts that begin the same; each takes a slot beside "
                 "those of requests, so at most as many as those; 0: none",
                 0, 1e6},
        o.prefix_cache);
  visit(FlagInfo{g, "max-queue-requests", "requests that wait; beyond: 503", 0, 1e7}, o.max_queue_requests);
  visit(FlagInfo{g, "max-queue-tokens", "prompt tokens that wait; beyond: 503", 1, 1e12}, o.max_queue_tokens);
  visit(FlagInfo{g, "max-step-tokens", "token budget of one engine step; 0: 2048 on a GPU, 512 on a CPU", 0, 65536},
        o.max_step_tokens);
  visit(FlagInfo{g, "warm-up-seconds", "most for CUDA graphs at start; 0: when they come", 0, 3600}, o.warm_up_s);
  visit(FlagInfo{g, "run-ahead", "on a GPU, start a step before the one ahead is read"}, o.run_ahead);
  visit(FlagInfo{g, "max-prompt-tokens", "longest prompt", 1, 1 << 30}, o.max_prompt_tokens);
  visit(FlagInfo{g, "max-output-tokens", "largest max_tokens", 1, 1 << 30}, o.max_output_tokens);
  visit(FlagInfo{g, "max-n", "largest n and best_of, times the prompts of one call", 1, 4096}, o.max_n);
  visit(FlagInfo{g, "default-chat-tokens",
                 "max_tokens of a chat that gives none; 0: max_new_tokens of generation_config.json, else 1024", 0,
                 1 << 30},
        o.default_chat_tokens);
  visit(FlagInfo{g, "max-stop-strings", "stop strings of a request, and as many stop token ids and bad words", 0, 4096},
        o.max_stop_strings);
  visit(FlagInfo{g, "max-stop-bytes", "longest stop string or bad word", 1, 65536}, o.max_stop_bytes);
  visit(FlagInfo{g, "max-logit-bias", "entries of logit_bias", 0, 1e6}, o.max_logit_bias);
  visit(FlagInfo{g, "max-messages", "messages of a chat", 1, 1e6}, o.max_messages);
  visit(FlagInfo{g, "max-requests-per-key", "open requests of one API key; beyond: 429; 0: no limit", 0, 1e6},
        o.max_requests_per_key);
  visit(FlagInfo{g, "max-running-per-key",
                 "requests of one API key that run at once, more wait; 0: with several keys, seven times as many as "
                 "slots stay free",
                 0, 1e6},
        o.max_running_per_key);
}

template <class Options, class Visit>
void VisitSpeculationFlags(Options& o, Visit&& visit) {
  constexpr const char* g = "Speculation";
  visit(FlagInfo{g,
                 "speculation",
                 "default for requests that do not say",
                 0,
                 0,
                 {"off", "draft", "medusa", "recurrent", "ngram", "auto"}},
        o.speculation);
  visit(FlagInfo{g, "max-draft-nodes", "nodes of a draft tree, root included; 0: 8 on a CPU, 16 on a GPU", 0, 64},
        o.max_draft_nodes);
  visit(FlagInfo{g,
                 "acceptance",
                 "of drafts: gumbel keeps a seed's text, rejection its distribution; typical CHANGES THE DISTRIBUTION",
                 0,
                 0,
                 {"gumbel", "rejection", "typical"}},
        o.acceptance);
  visit(FlagInfo{g, "adaptive-speculation",
                 "draft only what pays by measured costs; false: always max-draft-nodes, whatever it costs"},
        o.adaptive_speculation);
  visit(FlagInfo{g, "max-draft-slowdown", "times that drafts may lengthen a step of several requests; 0: any", 0, 1000},
        o.max_draft_slowdown);
  visit(FlagInfo{g, "draft-depth", "tokens the draft model or the recurrent head looks ahead, at most", 1, 63},
        o.draft_depth);
  visit(FlagInfo{g, "draft-top-k", "children of a node of their trees; 1: chains; 0: 1 on a CPU, 4 on a GPU", 0, 63},
        o.draft_top_k);
  visit(FlagInfo{g,
                 "medusa-tree",
                 "trees of the Medusa heads: the likeliest paths of each step, or those of Medusa's published tree",
                 0,
                 0,
                 {"dynamic", "mc_sim_7b_63"}},
        o.medusa_tree);
}

template <class Options, class Visit>
void VisitSecurityFlags(Options& o, Visit&& visit) {
  constexpr const char* g = "Security";
  visit(FlagInfo{g, "api-key-file", "one key a line, plain or sha256:<hex>; reread when it changes"}, o.api_key_file);
  visit(FlagInfo{g, "public-metrics", "/metrics without a key"}, o.public_metrics);
  visit(FlagInfo{g, "tls-cert", "PEM certificate chain, for REST and gRPC"}, o.tls_cert);
  visit(FlagInfo{g, "tls-key", "PEM private key"}, o.tls_key);
  visit(FlagInfo{g, "tls-client-ca", "PEM certificates that must have signed the client's (mutual TLS)"},
        o.tls_client_ca);
}

template <class Options, class Visit>
void VisitOperationsFlags(Options& o, Visit&& visit) {
  constexpr const char* g = "Operations";
  visit(FlagInfo{g, "drain-timeout", "seconds that running requests get after SIGTERM", 0, 86400}, o.drain_timeout_s);
  visit(FlagInfo{g, "probe-interval", "seconds between looks whether tokens come out (/health_generate); 0: off", 0,
                 3600},
        o.probe_interval_s);
  visit(FlagInfo{g, "log-level", "", 0, 0, {"debug", "info", "warn", "error", "off"}}, o.log_level);
  visit(FlagInfo{g, "log-format", "", 0, 0, {"text", "json"}}, o.log_format);
  visit(FlagInfo{g, "log-prompts", "write prompts to the log: for debugging, they may be private"}, o.log_prompts);
  visit(FlagInfo{g, "metrics", "count and time what happens; false: nothing, and /metrics is not found"}, o.metrics);
  visit(FlagInfo{g, "metrics-alias", "vllm: export the core metrics a second time as vllm:*", 0, 0, {"", "vllm"}},
        o.metrics_alias);
}

// Calls visit(info, field) for each flag. The only list of flags there is.
template <class Config, class Visit>
void VisitFlags(Config& c, Visit&& visit) {
  VisitModelFlags(c.model, visit);
  VisitNetworkFlags(c.network, visit);
  VisitLimitsFlags(c.engine, visit);
  VisitSpeculationFlags(c.engine, visit);
  VisitSecurityFlags(c.security, visit);
  VisitOperationsFlags(c.operations, visit);
}

absl::Status BadValue(const FlagInfo& info, const std::string& value, const std::string& want) {
  return absl::InvalidArgumentError(fmt::format("--{}: '{}' is not {}", info.name, value, want));
}

absl::Status SetField(const FlagInfo& info, const std::string& value, std::string* field) {
  if (!info.choices.empty() && std::ranges::find(info.choices, value) == info.choices.end()) {
    return BadValue(info, value, fmt::format("one of {}", fmt::join(info.choices, ", ")));
  }
  *field = value;
  return absl::OkStatus();
}

absl::Status SetField(const FlagInfo& info, const std::string& value, bool* field) {
  if (value != "true" && value != "false") return BadValue(info, value, "true or false");
  *field = value == "true";
  return absl::OkStatus();
}

template <class Number>
absl::Status SetField(const FlagInfo& info, const std::string& value, Number* field) {
  Number parsed{};
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), parsed);
  const char* kind = std::is_integral_v<Number> ? "an integer" : "a number";
  if (error != std::errc() || end != value.data() + value.size()) return BadValue(info, value, kind);
  const double number = static_cast<double>(parsed);
  if (!(number >= info.min && number <= info.max)) {
    return BadValue(info, value, fmt::format("{} from {} to {}", kind, info.min, info.max));
  }
  *field = parsed;
  return absl::OkStatus();
}

int EditDistance(std::string_view a, std::string_view b) {
  std::vector<int> row(b.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (size_t i = 1; i <= a.size(); ++i) {
    int diagonal = row[0];
    row[0] = static_cast<int>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const int substitute = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substitute});
    }
  }
  return row.back();
}

absl::Status UnknownFlag(const std::string& name, const std::string& where) {
  std::string nearest;
  int best = 4;  // further away is no suggestion
  const ServerConfig defaults;
  VisitFlags(defaults, [&](const FlagInfo& info, const auto&) {
    const int distance = EditDistance(name, info.name);
    if (distance < best) best = distance, nearest = info.name;
  });
  const std::string hint = nearest.empty() ? "see `linspec help serve`" : fmt::format("did you mean --{}?", nearest);
  return absl::InvalidArgumentError(fmt::format("{}unknown flag --{}; {}", where, name, hint));
}

absl::Status SetFlag(const std::string& name, const std::string& value, const std::string& where,
                     ServerConfig* config) {
  bool found = false;
  absl::Status status;
  VisitFlags(*config, [&](const FlagInfo& info, auto& field) {
    if (name != info.name) return;
    found = true;
    status = SetField(info, value, &field);
  });
  return found ? status : UnknownFlag(name, where);
}

struct Assignment {
  std::string name, value;
};

absl::StatusOr<std::vector<Assignment>> SplitArgs(std::span<const std::string> args) {
  std::vector<Assignment> result;
  for (size_t i = 0; i < args.size(); ++i) {
    const std::string& arg = args[i];
    if (!arg.starts_with("--") || arg.size() == 2) {
      return absl::InvalidArgumentError(fmt::format("unexpected argument '{}'; flags are --name value", arg));
    }
    const size_t equals = arg.find('=');
    if (equals != std::string::npos) {
      result.push_back({arg.substr(2, equals - 2), arg.substr(equals + 1)});
    } else if (i + 1 < args.size()) {
      result.push_back({arg.substr(2), args[++i]});
    } else {
      return absl::InvalidArgumentError(fmt::format("{} needs a value", arg));
    }
  }
  return result;
}

template <class T>
std::string Print(const T& value) {
  if constexpr (std::is_same_v<T, std::string>)
    return value.empty() ? "\"\"" : value;
  else
    return fmt::format("{}", value);
}

// Calls visit(info, printed value, whether it differs from the default) for each flag.
template <class Visit>
void VisitValues(const ServerConfig& config, Visit&& visit) {
  std::vector<std::string> defaults;
  const ServerConfig fresh;
  VisitFlags(fresh, [&](const FlagInfo&, auto& field) { defaults.push_back(Print(field)); });
  size_t index = 0;
  VisitFlags(config, [&](const FlagInfo& info, auto& field) {
    const std::string value = Print(field);
    visit(info, value, value != defaults[index++]);
  });
}

}  // namespace

absl::Status ApplyYaml(const std::string& yaml, const std::string& source, ServerConfig* config) {
  try {  // yaml-cpp reports by exceptions; they end here
    const YAML::Node root = YAML::Load(yaml);
    if (root.IsNull()) return absl::OkStatus();
    if (!root.IsMap()) return absl::InvalidArgumentError(fmt::format("{}: expected `flag: value` lines", source));
    for (const auto& item : root) {
      const std::string name = item.first.as<std::string>();
      if (!item.second.IsScalar() && !item.second.IsNull()) {
        return absl::InvalidArgumentError(fmt::format("{}: {}: expected a single value", source, name));
      }
      const std::string value = item.second.IsNull() ? "" : item.second.as<std::string>();
      if (absl::Status status = SetFlag(name, value, source + ": ", config); !status.ok()) {
        return absl::InvalidArgumentError(fmt::format("{}: {}", source, std::string(status.message())));
      }
    }
  } catch (const YAML::Exception& error) {
    return absl::InvalidArgumentError(fmt::format("{}: {}", source, error.what()));
  }
  return absl::OkStatus();
}

absl::Status ValidateConfig(const ServerConfig& config) {
  const auto& security = config.security;
  if (security.tls_cert.empty() != security.tls_key.empty()) {
    return absl::InvalidArgumentError("--tls-cert and --tls-key must be given together");
  }
  if (!security.tls_client_ca.empty() && security.tls_cert.empty()) {
    return absl::InvalidArgumentError("--tls-client-ca needs --tls-cert and --tls-key");
  }
  if (config.network.http_port < 0 && config.network.grpc_port < 0) {
    return absl::InvalidArgumentError("--http-port -1 and --grpc-port -1: nothing left to serve");
  }
  if (config.network.http_port > 0 && config.network.http_port == config.network.grpc_port) {
    return absl::InvalidArgumentError(fmt::format("--http-port and --grpc-port are both {}", config.network.http_port));
  }
  return absl::OkStatus();
}

absl::StatusOr<ServerConfig> ParseServerConfig(std::span<const std::string> args) {
  auto assignments = SplitArgs(args);
  if (!assignments.ok()) return assignments.status();
  ServerConfig config;
  for (const Assignment& a : *assignments) {
    if (a.name != "config") continue;
    std::ifstream file(a.value);
    if (!file) return absl::InvalidArgumentError(fmt::format("--config: cannot read '{}'", a.value));
    std::stringstream text;
    text << file.rdbuf();
    if (absl::Status status = ApplyYaml(text.str(), a.value, &config); !status.ok()) return status;
  }
  for (const Assignment& a : *assignments) {
    if (a.name == "config") continue;
    if (absl::Status status = SetFlag(a.name, a.value, "", &config); !status.ok()) return status;
  }
  if (absl::Status status = ValidateConfig(config); !status.ok()) return status;
  return config;
}

std::string ServerHelp() {
  std::string text =
      "linspec serve [--flag value]...\n\n  --config FILE          the same flags as `name: value` lines of YAML\n";
  std::string group;
  VisitValues(ServerConfig(), [&](const FlagInfo& info, const std::string& value, bool) {
    if (group != info.group) text += fmt::format("\n{}\n", group = info.group);
    text += fmt::format("  --{:<21} {}", info.name, info.help);
    if (!info.choices.empty()) text += fmt::format("{}[{}]", *info.help ? " " : "", fmt::join(info.choices, "|"));
    if (value != "\"\"") text += fmt::format(" (default {})", value);
    text += '\n';
  });
  return text;
}

std::string ChangedFlags(const ServerConfig& config) {
  std::string text;
  VisitValues(config, [&](const FlagInfo& info, const std::string& value, bool changed) {
    if (changed) text += fmt::format("{}--{} {}", text.empty() ? "" : " ", info.name, value);
  });
  return text;
}

std::string DescribeConfig(const ServerConfig& config) {
  std::string text;
  VisitValues(config, [&](const FlagInfo& info, const std::string& value, bool changed) {
    text += fmt::format("  {} --{:<21} {}\n", changed ? '*' : ' ', info.name, value);
  });
  return text;
}

}  // namespace linspec
