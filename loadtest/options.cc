#include "loadtest/options.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <functional>
#include <variant>

namespace linspec::loadtest {
namespace {

using Target = std::variant<std::string*, int*, double*, uint64_t*, bool*, std::vector<double>*, Goodput*>;

struct Flag {
  std::string_view name;
  Target target;
  std::string_view help;
};

// The one place where a flag is declared: parsing and help derive from it.
std::vector<Flag> Flags(Options* o) {
  return {
      {"backend", &o->backend, "openai (completions), openai-chat, grpc (linspec.v1)"},
      {"base-url", &o->base_url, "http[s]://host:port[/path before the endpoint] instead of --host and --port"},
      {"host", &o->host, "server to load; only what you name is ever contacted"},
      {"port", &o->port, "0: 8000, or 50051 for grpc"},
      {"metrics-port", &o->metrics_port, "HTTP port of /metrics when the backend is grpc"},
      {"endpoint", &o->endpoint, "path, when it is not the usual one"},
      {"model", &o->model, "empty: the first model the server lists"},
      {"api-key-file", &o->api_key_file, "file with the bearer token"},
      {"tls", &o->tls, "speak TLS, as https:// in --base-url and each of the next three says too"},
      {"tls-ca", &o->tls_ca, "PEM certificates that must have signed the server's; default: those of the system"},
      {"tls-cert", &o->tls_cert, "PEM certificate chain of this client (mutual TLS)"},
      {"tls-key", &o->tls_key, "its PEM private key"},
      {"dataset-name", &o->dataset_name,
       "random, custom (jsonl), sharegpt (json), trace (csv: arrival, prompt, output tokens)"},
      {"dataset-path", &o->dataset_path, "file of custom, sharegpt or trace"},
      {"num-prompts", &o->num_prompts, "requests to send"},
      {"num-warmups", &o->num_warmups, "requests before the clock starts"},
      {"random-input-len", &o->random_input_len, "words per random prompt"},
      {"random-output-len", &o->random_output_len, "max_tokens of random and custom prompts"},
      {"custom-output-len", &o->random_output_len, "the same, under the name it has for custom prompts"},
      {"random-range-ratio", &o->random_range_ratio, "lengths are uniform in len * [1 - r, 1 + r]"},
      {"length-distribution", &o->length_distribution, "uniform, lognormal (sigma: the range ratio), exponential"},
      {"request-rate", &o->request_rate, "arrivals per second; inf: all at once"},
      {"burstiness", &o->burstiness, "gamma shape of the gaps: 1 Poisson, below 1 burstier"},
      {"ramp-up-strategy", &o->ramp_up_strategy, "linear or exponential: the rate moves over the requests"},
      {"ramp-up-start-rps", &o->ramp_up_start_rps, "rate of the first request"},
      {"ramp-up-end-rps", &o->ramp_up_end_rps, "rate of the last request"},
      {"max-concurrency", &o->max_concurrency, "at most so many in flight (closed loop); 0: unbounded"},
      {"trace-speed", &o->trace_speed, "2 replays a trace twice as fast"},
      {"trace-arrivals", &o->trace_arrivals, "false: only lengths from the trace, arrivals from --request-rate"},
      {"duration", &o->duration, "start no request after so many seconds; 0: send them all"},
      {"timeout", &o->timeout, "seconds one request may take"},
      {"seed", &o->seed, "of arrivals, prompts and faults"},
      {"temperature", &o->temperature, "of the requests"},
      {"top-p", &o->top_p, "of the requests"},
      {"ignore-eos", &o->ignore_eos, "generate exactly max_tokens"},
      {"cancel-fraction", &o->cancel_fraction, "of requests, dropped mid-stream"},
      {"cancel-after", &o->cancel_after, "chunks before a drop"},
      {"slow-fraction", &o->slow_fraction, "of requests, read slowly"},
      {"slow-delay-ms", &o->slow_delay_ms, "pause between a slow reader's reads"},
      {"threads", &o->threads, "event loops of this client"},
      {"metric-percentiles", &o->metric_percentiles, "comma-separated"},
      {"percentile-metrics", &o->percentile_metrics, "rows of the table, of ttft,tpot,itl,e2el"},
      {"goodput", &o->goodput, "SLOs in ms, e.g. \"ttft:200 tpot:20 e2el:5000\""},
      {"save-detailed", &o->save_detailed, "per-request values in the JSON"},
      {"save-result", &o->save_result, "write the figures as JSON"},
      {"append-result", &o->append_result, "as one more line of the file"},
      {"result-dir", &o->result_dir, "folder of the file"},
      {"result-filename", &o->result_filename,
       "its name, which also says that you want it; default: backend-rateqps-model-time.json"},
      {"label", &o->label, "copied into the result"},
      {"html", &o->html, "report with plots to write"},
      {"quiet", &o->quiet, "no live progress"},
      {"disable-tqdm", &o->quiet, "the same"},
  };
}

absl::Status Bad(std::string_view name, std::string_view value, std::string_view why) {
  return absl::InvalidArgumentError(fmt::format("--{} {}: {}", name, value, why));
}

template <typename T>
bool ParseNumber(std::string_view text, T* out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *out);
  return error == std::errc() && end == text.data() + text.size();
}

std::vector<std::string_view> Split(std::string_view text, std::string_view separators) {
  std::vector<std::string_view> parts;
  while (!text.empty()) {
    const size_t end = std::min(text.find_first_of(separators), text.size());
    if (end > 0) parts.push_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return parts;
}

bool ParseGoodput(std::string_view text, Goodput* out) {
  for (const std::string_view part : Split(text, " ,")) {
    const size_t colon = part.find(':');
    if (colon == std::string_view::npos) return false;
    const std::string_view key = part.substr(0, colon);
    double* bound = key == "ttft" ? &out->ttft : key == "tpot" ? &out->tpot : key == "e2el" ? &out->e2el : nullptr;
    if (bound == nullptr || !ParseNumber(part.substr(colon + 1), bound) || !(*bound > 0)) return false;
  }
  return out->any();
}

// "http[s]://host:port/prefix": the prefix goes before the endpoint.
absl::Status ApplyBaseUrl(Options* o) {
  constexpr std::string_view kPlain = "http://", kTls = "https://";
  std::string_view rest = o->base_url;
  const bool tls = rest.starts_with(kTls);
  if (!tls && !rest.starts_with(kPlain)) return Bad("base-url", o->base_url, "starts with http:// or https://");
  o->tls |= tls;
  rest.remove_prefix(tls ? kTls.size() : kPlain.size());
  const size_t slash = std::min(rest.find('/'), rest.size());
  const std::string_view authority = rest.substr(0, slash), prefix = rest.substr(slash);
  const size_t colon = authority.rfind(':');
  o->host = authority.substr(0, colon);
  o->port = tls ? 443 : 80;
  if (colon != std::string_view::npos && !ParseNumber(authority.substr(colon + 1), &o->port)) {
    return Bad("base-url", o->base_url, "has no port after ':'");
  }
  if (o->host.empty()) return Bad("base-url", o->base_url, "names no host");
  o->path_prefix = prefix.ends_with('/') ? prefix.substr(0, prefix.size() - 1) : prefix;
  return absl::OkStatus();
}

bool ParseValue(std::string_view text, const Target& target) {
  struct Visitor {
    std::string_view text;
    bool operator()(std::string* out) const { return out->assign(text), true; }
    bool operator()(int* out) const { return ParseNumber(text, out); }
    bool operator()(double* out) const { return ParseNumber(text, out); }
    bool operator()(uint64_t* out) const { return ParseNumber(text, out); }
    bool operator()(bool* out) const { return *out = text == "true", text == "true" || text == "false"; }
    bool operator()(Goodput* out) const { return ParseGoodput(text, out); }
    bool operator()(std::vector<double>* out) const {
      out->clear();
      for (const std::string_view part : Split(text, ",")) {
        double value = 0;
        if (!ParseNumber(part, &value) || !(value > 0 && value <= 100)) return false;
        out->push_back(value);
      }
      return !out->empty();
    }
  };
  return std::visit(Visitor{text}, target);
}

absl::Status Validate(const Options& o) {
  const struct {
    std::string_view name, value;
    std::initializer_list<std::string_view> choices;
  } words[] = {{"backend", o.backend, {"openai", "openai-chat", "grpc"}},
               {"dataset-name", o.dataset_name, {"random", "custom", "sharegpt", "trace"}},
               {"length-distribution", o.length_distribution, {"uniform", "lognormal", "exponential"}},
               {"ramp-up-strategy", o.ramp_up_strategy, {"", "linear", "exponential"}}};
  for (const auto& word : words) {
    if (std::find(word.choices.begin(), word.choices.end(), word.value) == word.choices.end()) {
      return Bad(word.name, word.value, fmt::format("is none of {}", fmt::join(word.choices, " ")));
    }
  }
  for (const std::string_view metric : Split(o.percentile_metrics, ",")) {
    if (metric != "ttft" && metric != "tpot" && metric != "itl" && metric != "e2el") {
      return Bad("percentile-metrics", metric, "is none of ttft tpot itl e2el");
    }
  }
  if (!o.ramp_up_strategy.empty() && !(o.ramp_up_start_rps > 0 && o.ramp_up_end_rps > 0)) {
    return Bad("ramp-up-strategy", o.ramp_up_strategy, "needs --ramp-up-start-rps and --ramp-up-end-rps above 0");
  }
  if (o.dataset_name != "random" && o.dataset_path.empty()) return Bad("dataset-path", "", "is needed by this dataset");
  if (o.tls_cert.empty() != o.tls_key.empty()) return Bad("tls-cert", o.tls_cert, "goes together with --tls-key");
  if (o.port < 0 || o.port > 65535) return Bad("port", std::to_string(o.port), "is not a port");
  const struct {
    std::string_view name;
    double value, low, high;
  } ranges[] = {
      {"metrics-port", double(o.metrics_port), 1, 65535},
      {"num-prompts", double(o.num_prompts), 1, 10e6},
      {"num-warmups", double(o.num_warmups), 0, 1e4},
      {"random-input-len", double(o.random_input_len), 1, 1e6},
      {"random-output-len", double(o.random_output_len), 1, 1e6},
      {"random-range-ratio", o.random_range_ratio, 0, o.length_distribution == "lognormal" ? 3.0 : 1.0},
      {"ramp-up-start-rps", o.ramp_up_start_rps, 0, 1e6},
      {"ramp-up-end-rps", o.ramp_up_end_rps, 0, 1e6},
      {"request-rate", o.request_rate, 1e-6, std::numeric_limits<double>::infinity()},
      {"burstiness", o.burstiness, 1e-3, 1e3},
      {"max-concurrency", double(o.max_concurrency), 0, 1e6},
      {"trace-speed", o.trace_speed, 1e-3, 1e6},
      {"duration", o.duration, 0, 1e7},
      {"timeout", o.timeout, 1e-3, 1e6},
      {"temperature", o.temperature, 0, 100},
      {"top-p", o.top_p, 1e-9, 1},
      {"cancel-fraction", o.cancel_fraction, 0, 1},
      {"cancel-after", double(o.cancel_after), 0, 1e6},
      {"slow-fraction", o.slow_fraction, 0, 1},
      {"slow-delay-ms", double(o.slow_delay_ms), 1, 1e6},
      {"threads", double(o.threads), 1, 256},
  };
  for (const auto& range : ranges) {
    if (!(range.value >= range.low && range.value <= range.high)) {
      return Bad(range.name, fmt::format("{}", range.value), fmt::format("is outside [{}, {}]", range.low, range.high));
    }
  }
  return absl::OkStatus();
}

}  // namespace

bool Goodput::any() const { return std::isfinite(ttft) || std::isfinite(tpot) || std::isfinite(e2el); }

absl::StatusOr<Options> ParseOptions(std::span<const std::string> args) {
  Options options;
  const std::vector<Flag> flags = Flags(&options);
  for (size_t i = 0; i < args.size(); ++i) {
    std::string_view name = args[i];
    if (!name.starts_with("--")) return absl::InvalidArgumentError(fmt::format("'{}': flags start with --", name));
    name.remove_prefix(2);
    const size_t equals = name.find('=');
    const bool inline_value = equals != std::string_view::npos;
    std::string_view value = inline_value ? name.substr(equals + 1) : std::string_view();
    name = name.substr(0, equals);

    const Flag* flag = nullptr;
    for (const Flag& candidate : flags) {
      if (candidate.name == name) flag = &candidate;
    }
    if (flag == nullptr) return absl::InvalidArgumentError(fmt::format("unknown flag --{}; see --help", name));
    if (!inline_value) {
      if (std::holds_alternative<bool*>(flag->target)) {
        value = "true";
      } else if (++i < args.size()) {
        value = args[i];
      } else {
        return Bad(name, "", "needs a value");
      }
    }
    if (!ParseValue(value, flag->target)) return Bad(name, value, "is not understood");
  }
  if (!options.base_url.empty()) {
    if (const absl::Status status = ApplyBaseUrl(&options); !status.ok()) return status;
  }
  options.tls |= !options.tls_ca.empty() || !options.tls_cert.empty();
  if (const absl::Status status = Validate(options); !status.ok()) return status;
  if (options.port == 0) options.port = options.backend == "grpc" ? 50051 : 8000;
  return options;
}

std::string OptionsHelp() {
  Options defaults;
  std::string help = "usage: linspec loadtest [flags]\n\n";
  for (const Flag& flag : Flags(&defaults)) help += fmt::format("  --{:<22} {}\n", flag.name, flag.help);
  return help;
}

}  // namespace linspec::loadtest
