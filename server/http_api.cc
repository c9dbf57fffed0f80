#include "server/http_api.h"

#include <fmt/format.h>

#include <algorithm>

#include "server/errors.h"
#include "server/generation.h"
#include "server/http_text.h"
#include "server/json_text.h"
#include "server/openai_json.h"

namespace linspec {
namespace {

constexpr std::string_view kModelPrefix = "/v1/models/";

class ReadyOperation : public HttpOperation {
 public:
  explicit ReadyOperation(HttpReply reply) : reply_(std::move(reply)) {}
  bool Poll(HttpReply* reply) override { return *reply = std::move(reply_), true; }

 private:
  HttpReply reply_;
};

// An id that a client may give its request: it comes back in headers, answers and the log.
bool IsUsableId(const std::string& id) {
  return !id.empty() && id.size() <= 128 && std::ranges::all_of(id, [](char c) {
    return std::isalnum(static_cast<uint8_t>(c)) || c == '-' || c == '_' || c == '.';
  });
}

absl::Status CheckContentType(const HttpRequest& request) {
  std::string type = request.content_type.substr(0, request.content_type.find(';'));
  while (!type.empty() && type.back() == ' ') type.pop_back();
  std::ranges::transform(type, type.begin(),
                         [](char c) { return static_cast<char>(std::tolower(static_cast<uint8_t>(c))); });
  if (!type.empty() && type != "application/json") {
    return HttpError(415, fmt::format("Content-Type: '{}'; send application/json", type.substr(0, 100)));
  }
  if (!request.content_encoding.empty() && request.content_encoding != "identity") {
    return HttpError(415,
                     fmt::format("Content-Encoding: '{}' is not supported", request.content_encoding.substr(0, 100)));
  }
  return absl::OkStatus();
}

}  // namespace

const HttpApi::RouteInfo HttpApi::kRoutes[] = {{"/v1/completions", "POST", nullptr, ParseCompletion},
                                               {"/v1/chat/completions", "POST", nullptr, ParseChat},
                                               {"/v1/responses", "POST", nullptr, ParseResponses},
                                               {"/v1/models", "GET", &HttpApi::Models},
                                               {"/v1/models/{id}", "GET", &HttpApi::Model},
                                               {"/tokenize", "POST", &HttpApi::Tokenize},
                                               {"/detokenize", "POST", &HttpApi::Detokenize},
                                               {"/health", "GET", &HttpApi::Alive},
                                               {"/ping", "GET", &HttpApi::Alive},  // SageMaker's and vLLM's
                                               {"/ready", "GET", &HttpApi::Ready},
                                               {"/health_generate", "GET", &HttpApi::CanGenerate},
                                               {"/version", "GET", &HttpApi::Version},
                                               {"/props", "GET", &HttpApi::Props},  // llama.cpp's
                                               {"/metrics", "GET", &HttpApi::MetricsText},
                                               {"/openapi.json", "GET", &HttpApi::OpenApi}};

const HttpApi::RouteInfo* HttpApi::FindRoute(const std::string& path) {
  const bool model = path.starts_with(kModelPrefix) && path.size() > kModelPrefix.size();
  const std::string_view name = model ? "/v1/models/{id}" : std::string_view(path);
  const auto found = std::ranges::find_if(kRoutes, [&](const RouteInfo& route) { return name == route.path; });
  return found == std::end(kRoutes) ? nullptr : found;
}

HttpApi::HttpApi(Service* service, Authenticator* auth) : service_(service), auth_(auth) {}

HttpReply HttpApi::ErrorReply(const absl::Status& status) const {
  HttpReply reply{.status = HttpStatusOf(status), .body = OpenAiErrorJson(status)};
  if (const int seconds = RetryAfterSeconds(status); seconds > 0)
    reply.headers.emplace_back("Retry-After", std::to_string(seconds));
  if (reply.status == 401) reply.headers.emplace_back("WWW-Authenticate", "Bearer");
  return reply;
}

std::unique_ptr<HttpOperation> HttpApi::Handle(HttpRequest request, HttpNotify notify) {
  if (!IsUsableId(request.request_id)) request.request_id.clear();
  const RouteInfo* route = FindRoute(request.path);
  const bool cors = !service_->config().network.cors_origin.empty();
  if (route != nullptr && request.method == "OPTIONS" && cors)
    return Preflight(*route);  // browsers send it without key
  auto operation = Route(request, route, std::move(notify));
  if (operation.ok()) return *std::move(operation);
  if (request.request_id.empty()) request.request_id = NewRequestId();
  HttpReply reply = ErrorReply(operation.status());
  // Field and code only: messages may quote what the client sent.
  service_->log().Write(LogLevel::kInfo, "request refused",
                        {{"request_id", request.request_id},
                         {"handler", route == nullptr ? "other" : route->path},
                         {"status", static_cast<int64_t>(reply.status)},
                         {"param", ErrorField(operation.status())}});
  if (reply.status == 405) {
    reply.headers.emplace_back("Allow", std::string_view(route->method) == "GET" ? "GET, HEAD" : route->method);
  }
  reply.headers.emplace_back("X-Request-Id", request.request_id);
  return std::make_unique<ReadyOperation>(std::move(reply));
}

std::unique_ptr<HttpOperation> HttpApi::Preflight(const RouteInfo& route) {
  HttpReply reply{.status = 204,
                  .headers = {{"Access-Control-Allow-Methods", fmt::format("{}, OPTIONS", route.method)},
                              {"Access-Control-Allow-Headers", "Authorization, Content-Type, X-Request-Id, *"},
                              {"Access-Control-Max-Age", "600"}}};
  return std::make_unique<ReadyOperation>(std::move(reply));
}

// The key comes first: without one, not even which paths exist is told.
absl::StatusOr<std::unique_ptr<HttpOperation>> HttpApi::Route(const HttpRequest& request, const RouteInfo* route,
                                                              HttpNotify notify) {
  std::string tenant;
  if (!auth_->IsPublicRoute(request.path)) {
    auto checked = auth_->Check(request.authorization);
    if (!checked.ok()) return checked.status();
    tenant = *std::move(checked);
  }
  if (route == nullptr) return HttpError(404, fmt::format("no such path: {}", request.path.substr(0, 200)));
  const bool head = request.method == "HEAD" && std::string_view(route->method) == "GET";
  if (request.method != route->method && !head) {
    return HttpError(405, fmt::format("{} does not answer {}", route->path, request.method.substr(0, 50)));
  }
  if (request.method == "POST") {
    if (absl::Status status = CheckContentType(request); !status.ok()) return status;
  }
  if (route->parse != nullptr) return Generate(request, route->parse, tenant, std::move(notify));
  auto reply = (this->*route->answer)(request);
  if (!reply.ok()) return reply.status();
  reply->headers.emplace_back("X-Request-Id", request.request_id.empty() ? NewRequestId() : request.request_id);
  return std::unique_ptr<HttpOperation>(std::make_unique<ReadyOperation>(*std::move(reply)));
}

absl::StatusOr<std::unique_ptr<HttpOperation>> HttpApi::Generate(const HttpRequest& request, Parse parse,
                                                                 const std::string& tenant, HttpNotify notify) {
  if (absl::Status status = service_->CheckAdmission(tenant); !status.ok()) return status;
  auto call = parse(request.body, service_->call_limits());
  if (!call.ok()) return call.status();
  if (absl::Status status = service_->CheckModelName(call->generate.model); !status.ok()) return status;
  if (!call->request_id.empty() && !IsUsableId(call->request_id)) {
    return FieldError("request_id", "is not up to 128 letters, digits, '-', '_' and '.'");
  }
  // The header's first, then the body's, else one of ours.
  std::string id = request.request_id.empty() ? call->request_id : request.request_id;
  if (id.empty()) id = NewRequestId();
  call->generate.tenant = tenant;
  call->generate.log_id = id;
  return StartGeneration(service_, *std::move(call), std::move(id), std::move(notify));
}

absl::StatusOr<HttpReply> HttpApi::Tokenize(const HttpRequest& request) const {
  auto call = ParseTokenize(request.body, service_->call_limits());
  if (!call.ok()) return call.status();
  if (absl::Status status = service_->CheckModelName(call->model); !status.ok()) return status;
  absl::StatusOr<std::vector<int32_t>> tokens;
  if (const auto* text = std::get_if<std::string>(&call->prompt)) {  // may be empty, and longer than a prompt
    tokens =
        service_->tokenizer().Encode(*text, {.add_special_tokens = call->add_special_tokens, .parse_special = true});
  } else {
    tokens = service_->ToTokens(call->prompt);
  }
  if (!tokens.ok()) return tokens.status();
  HttpReply reply{.body = fmt::format("{{\"count\":{},\"max_model_len\":{},\"tokens\":[{}]", tokens->size(),
                                      service_->config().engine.max_prompt_tokens, fmt::join(*tokens, ","))};
  if (call->return_token_strs) {
    reply.body += ",\"token_strs\":[";
    for (size_t i = 0; i < tokens->size(); ++i) {
      if (i > 0) reply.body += ',';
      AppendJsonString(service_->tokenizer().IdToToken((*tokens)[i]), &reply.body);
    }
    reply.body += ']';
  }
  reply.body += '}';
  return reply;
}

absl::StatusOr<HttpReply> HttpApi::Detokenize(const HttpRequest& request) const {
  auto call = ParseDetokenize(request.body);
  if (!call.ok()) return call.status();
  if (absl::Status status = service_->CheckModelName(call->model); !status.ok()) return status;
  auto text = service_->tokenizer().Decode(call->tokens, call->skip_special_tokens);
  if (!text.ok()) return FieldError("tokens", std::string(text.status().message()));
  HttpReply reply{.body = "{\"prompt\":"};
  AppendJsonString(*text, &reply.body);
  reply.body += '}';
  return reply;
}

std::string HttpApi::ModelJson() const {
  std::string json = "{\"id\":";
  AppendJsonString(service_->model_name(), &json);
  json += fmt::format(",\"object\":\"model\",\"created\":{},\"owned_by\":\"linspec\",\"max_model_len\":{}}}",
                      service_->started_at(), service_->config().engine.max_prompt_tokens);
  return json;
}

absl::StatusOr<HttpReply> HttpApi::Models(const HttpRequest&) const {
  return HttpReply{.body = fmt::format("{{\"object\":\"list\",\"data\":[{}]}}", ModelJson())};
}

absl::StatusOr<HttpReply> HttpApi::Model(const HttpRequest& request) const {
  const std::string name =
      PercentDecoded(request.path.substr(kModelPrefix.size()));  // clients escape the / of "org/model"
  if (absl::Status status = service_->CheckModelName(name); !status.ok()) return status;
  return HttpReply{.body = ModelJson()};
}

absl::StatusOr<HttpReply> HttpApi::Alive(const HttpRequest&) const { return HttpReply{.body = "{\"status\":\"ok\"}"}; }

absl::StatusOr<HttpReply> HttpApi::Ready(const HttpRequest&) const {
  if (service_->draining()) return HttpReply{.status = 503, .body = "{\"status\":\"draining\"}"};
  if (!service_->engine().health().ok()) return HttpReply{.status = 503, .body = "{\"status\":\"failed\"}"};
  return HttpReply{.body = "{\"status\":\"ready\"}"};
}

absl::StatusOr<HttpReply> HttpApi::CanGenerate(const HttpRequest&) const {
  if (!service_->can_generate()) return HttpReply{.status = 503, .body = "{\"status\":\"no tokens come out\"}"};
  return HttpReply{.body = "{\"status\":\"ok\"}"};
}

absl::StatusOr<HttpReply> HttpApi::Version(const HttpRequest&) const {
  return HttpReply{.body = fmt::format("{{\"version\":\"{}\"}}", kVersion)};
}

// What clients of llama.cpp look up: how long a prompt may be, how many slots there are, the template. n_ctx: there is
// no context window, so it is the longest prompt. A path on this machine is nobody's business: the model goes by its
// name.
absl::StatusOr<HttpReply> HttpApi::Props(const HttpRequest&) const {
  SamplingParams defaults;
  service_->generation().sampling.Apply(&defaults);
  std::string name;
  AppendJsonString(service_->model_name(), &name);
  std::string body = fmt::format(
      "{{\"default_generation_settings\":{{\"n_ctx\":{},\"params\":{{\"temperature\":{},\"top_k\":{},\"top_p\":{},"
      "\"min_p\":{},\"typical_p\":{},\"repeat_penalty\":{},\"presence_penalty\":{},\"frequency_penalty\":{},"
      "\"max_tokens\":{}}}}},\"total_slots\":{},\"model_alias\":{},\"model_path\":{},"
      "\"modalities\":{{\"vision\":false,\"audio\":false}},\"build_info\":\"linspec {}\",\"chat_template\":",
      service_->config().engine.max_prompt_tokens, defaults.temperature, defaults.top_k, defaults.top_p, defaults.min_p,
      defaults.typical_p, defaults.repetition_penalty, defaults.presence_penalty, defaults.frequency_penalty,
      defaults.max_tokens, service_->engine().options().max_requests, name, name, kVersion);
  AppendJsonString(service_->chat_template_source(), &body);
  body += ",\"bos_token\":";
  AppendJsonString(service_->BosToken(), &body);
  body += ",\"eos_token\":";
  AppendJsonString(service_->EosToken(), &body);
  return HttpReply{.body = body + "}"};
}

absl::StatusOr<HttpReply> HttpApi::MetricsText(const HttpRequest&) const {
  if (!service_->config().operations.metrics) {
    return HttpError(404, "this server keeps no metrics (--metrics false)");
  }
  return HttpReply{.content_type = "text/plain; version=0.0.4; charset=utf-8", .body = service_->MetricsText()};
}

absl::StatusOr<HttpReply> HttpApi::OpenApi(const HttpRequest&) const { return HttpReply{.body = OpenApiJson()}; }

void HttpApi::Observe(const HttpRequest& request, int status, double seconds) {
  const RouteInfo* route = FindRoute(request.path);
  const bool known =
      request.method == "GET" || request.method == "POST" || request.method == "HEAD" || request.method == "OPTIONS";
  service_->metrics().OnHttp(route == nullptr ? "other" : route->path, known ? request.method : "other", status,
                             seconds);
  service_->log().Write(LogLevel::kDebug, "http",
                        {{"request_id", request.request_id},
                         {"handler", route == nullptr ? "other" : route->path},
                         {"status", static_cast<int64_t>(status)},
                         {"ms", seconds * 1e3}});
}

}  // namespace linspec
