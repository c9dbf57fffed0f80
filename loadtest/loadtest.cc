#include "loadtest/loadtest.h"

#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "loadtest/client.h"
#include "loadtest/options.h"
#include "loadtest/report.h"
#include "loadtest/runner.h"
#include "loadtest/wire_text.h"
#include "loadtest/workload.h"

namespace linspec {
namespace loadtest {
namespace {

constexpr int kFailed = 1, kUsage = 2;

Target RestTarget(const Options& options) {
  Target target;
  target.host = options.host;
  target.port = options.backend == "grpc" ? options.metrics_port : options.port;
  target.prefix = options.path_prefix;
  target.path = target.prefix + (!options.endpoint.empty()          ? options.endpoint
                                 : options.backend == "openai-chat" ? "/v1/chat/completions"
                                                                    : "/v1/completions");
  return target;
}

absl::StatusOr<std::string> FirstModel(const Target& target) {
  const absl::StatusOr<std::string> body = HttpGet(target, target.prefix + "/v1/models");
  if (!body.ok()) return body.status();
  const nlohmann::json models = nlohmann::json::parse(*body, nullptr, /*allow_exceptions=*/false);
  const auto id = models.is_object() ? models.value("/data/0/id"_json_pointer, nlohmann::json()) : nlohmann::json();
  if (!id.is_string()) return absl::NotFoundError("the server lists no model; name one with --model");
  return id.get<std::string>();
}

// A server without metrics is no error: the report then has no figures of speculation.
SpeculationCounters ReadSpeculation(const Target& target) {
  const absl::StatusOr<std::string> text = HttpGet(target, target.prefix + "/metrics");
  return text.ok() ? ParseSpeculationCounters(*text) : SpeculationCounters();
}

absl::Status WriteFile(const std::string& path, const std::string& text, std::ios::openmode mode = std::ios::trunc) {
  std::ofstream file(path, std::ios::binary | mode);
  file << text;
  file.close();
  return file ? absl::OkStatus() : absl::UnavailableError("cannot write " + path);
}

absl::Status SaveResult(const nlohmann::ordered_json& report, const Options& options) {
  const auto word = [&](const char* key) {
    return report.at(key).is_string() ? report.at(key).get<std::string>() : report.at(key).dump();
  };
  std::string name = options.result_filename;
  if (name.empty()) {
    name = fmt::format("{}-{}qps-{}-{}.json", word("backend"), word("request_rate"), word("model_id"), word("date"));
    std::replace(name.begin(), name.end(), '/', '-');
  }
  const std::filesystem::path path = std::filesystem::path(options.result_dir) / name;
  const auto replace = nlohmann::json::error_handler_t::replace;
  if (options.append_result) return WriteFile(path, report.dump(-1, ' ', false, replace) + "\n", std::ios::app);
  return WriteFile(path, report.dump(1, ' ', false, replace) + "\n");
}

// Every stream is an open file.
void RaiseFileLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);  // what remains too low shows as failed requests, with the reason
}

absl::StatusOr<nlohmann::ordered_json> Run(const Options& options) {
  absl::StatusOr<std::vector<PlannedRequest>> workload = MakeWorkload(options);
  if (!workload.ok()) return workload.status();

  Target rest = RestTarget(options);
  if (!options.api_key_file.empty()) {
    std::ifstream key(options.api_key_file);
    if (!std::getline(key, rest.bearer_token)) return absl::NotFoundError("cannot read " + options.api_key_file);
  }
  auto tls = LoadTls(options);
  if (!tls.ok()) return tls.status();
  rest.tls = *std::move(tls);
  rest.model = options.model;
  if (rest.model.empty()) {
    absl::StatusOr<std::string> model = FirstModel(rest);
    if (!model.ok()) return model.status();
    rest.model = *std::move(model);
  }
  const ClientFactory factory = [&](boost::asio::io_context* loop) {
    if (options.backend != "grpc") return CreateRestClient(loop, rest, &options);
    Target grpc = rest;
    grpc.port = options.port;
    return CreateGrpcClient(loop, grpc, &options);
  };

  if (options.num_warmups > 0) {
    Options warmup_options = options;
    warmup_options.quiet = true;
    warmup_options.max_concurrency = 1;
    std::vector<PlannedRequest> warmup(static_cast<size_t>(options.num_warmups), workload->front());
    for (PlannedRequest& request : warmup) {
      request.cancel_after_chunks = -1;
      request.read_delay_ms = 0;
    }
    const RunResult result = RunWorkload(warmup, warmup_options, factory);
    for (const RequestRecord& record : result.records) {
      if (!record.ok) return absl::UnavailableError("the warm-up request failed: " + record.error);
    }
  }

  const SpeculationCounters before = ReadSpeculation(rest);
  const RunResult result = RunWorkload(*workload, options, factory);
  const SpeculationCounters speculation = ReadSpeculation(rest).Since(before);
  nlohmann::ordered_json report = ReportJson(result, options, rest.model, speculation);
  if (!options.html.empty()) {
    if (absl::Status status = WriteFile(options.html, ReportHtml(report, result)); !status.ok()) return status;
  }
  if (options.save_result || options.append_result || !options.result_filename.empty()) {
    if (absl::Status status = SaveResult(report, options); !status.ok()) return status;
  }
  return report;
}

}  // namespace
}  // namespace loadtest

int LoadTestMain(int argc, char** argv) {
  const std::vector<std::string> args(argv + std::min(argc, 1), argv + argc);
  if (std::find(args.begin(), args.end(), "--help") != args.end()) {
    fmt::print("{}", loadtest::OptionsHelp());
    return 0;
  }
  const absl::StatusOr<loadtest::Options> options = loadtest::ParseOptions(args);
  if (!options.ok()) {
    fmt::print(stderr, "loadtest: {}\n", std::string(options.status().message()));
    return loadtest::kUsage;
  }
  loadtest::RaiseFileLimit();
  const absl::StatusOr<nlohmann::ordered_json> report = loadtest::Run(*options);
  if (!report.ok()) {
    fmt::print(stderr, "loadtest: {}\n", std::string(report.status().message()));
    return loadtest::kFailed;
  }
  fmt::print("{}", loadtest::ReportTable(*report, options->percentile_metrics));
  return report->at("failed").get<int64_t>() == 0 ? 0 : loadtest::kFailed;
}

}  // namespace linspec
