#include "server/http_api.h"

#include <fmt/format.h>

#include <algorithm>

#include "server/errors.h"
#include "server/generation.h"
#include "server/json_text.h"
#include "server/openai_json.h"

namespace linspec {
namespace {

// Order: none. GET routes also answer HEAD.
constexpr HttpApi::RouteInfo kRoutes[] = {
    {"/v1/completions", "POST"}, {"/v1/chat/completions", "POST"}, {"/v1/models", "GET"},
    {"/tokenize", "POST"},       {"/detokenize", "POST"},          {"/health", "GET"},
    {"/ready", "GET"},           {"/health_generate", "GET"},      {"/version", "GET"},
    {"/metrics", "GET"},         {"/openapi.json", "GET"},         {"/ping", "GET"}};
constexpr std::string_view kModelPrefix = "/v1/models/";

const HttpApi::RouteInfo* FindRoute(const std::string& path) {
  if (path.starts_with(kModelPrefix) && path.size() > kModelPrefix.size()) return FindRoute("/v1/models");
  const auto found = std::ranges::find_if(kRoutes, [&](const HttpApi::RouteInfo& route) { return path == route.path; });
  return found == std::end(kRoutes) ? nullptr : found;
}

class ReadyOperation : public HttpOperation {
 public:
  explicit ReadyOperation(HttpReply reply) : reply_(std::move(reply)) {}
  bool Poll(HttpReply* reply) override { return *reply = std::move(reply_), true; }

 private:
  HttpReply reply_;
};

// The client's id if it is short and printable, else one of ours.
std::string RequestId(const std::string& given) {
  const bool usable = !given.empty() && given.size() <= 128 && std::ranges::all_of(given, [](char c) {
    return std::isalnum(static_cast<uint8_t>(c)) || c == '-' || c == '_' || c == '.';
  });
  if (usable) return given;
  return NewRequestId();
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

HttpApi::HttpApi(Service* service, Authenticator* auth) : service_(service), auth_(auth) {}

HttpReply HttpApi::ErrorReply(const absl::Status& status) const {
  HttpReply reply{.status = HttpStatusOf(status), .body = OpenAiErrorJson(status)};
  if (const int seconds = RetryAfterSeconds(status); seconds > 0)
    reply.headers.emplace_back("Retry-After", std::to_string(seconds));
  if (reply.status == 401) reply.headers.emplace_back("WWW-Authenticate", "Bearer");
  return reply;
}

std::unique_ptr<HttpOperation> HttpApi::Handle(HttpRequest request, HttpNotify notify) {
  request.request_id = RequestId(request.request_id);
  const RouteInfo* route = FindRoute(request.path);
  const bool cors = !service_->config().network.cors_origin.empty();
  if (route != nullptr && request.method == "OPTIONS" && cors)
    return Preflight(*route);  // browsers send it without key
  auto operation = Route(&request, route, std::move(notify));
  if (operation.ok()) return *std::move(operation);
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
                              {"Access-Control-Allow-Headers", "Authorization, Content-Type, X-Request-Id"},
                              {"Access-Control-Max-Age", "600"}}};
  return std::make_unique<ReadyOperation>(std::move(reply));
}

// The key comes first: without one, not even which paths exist is told.
absl::StatusOr<std::unique_ptr<HttpOperation>> HttpApi::Route(HttpRequest* request, const RouteInfo* route,
                                                              HttpNotify notify) {
  std::string tenant;
  if (!auth_->IsPublicRoute(request->path)) {
    auto checked = auth_->Check(request->authorization);
    if (!checked.ok()) return checked.status();
    tenant = *std::move(checked);
  }
  if (route == nullptr) return HttpError(404, fmt::format("no such path: {}", request->path.substr(0, 200)));
  const bool head = request->method == "HEAD" && std::string_view(route->method) == "GET";
  if (request->method != route->method && !head) {
    return HttpError(405, fmt::format("{} does not answer {}", route->path, request->method.substr(0, 50)));
  }
  const std::string& path = request->path;
  if (request->method == "POST") {
    if (absl::Status status = CheckContentType(*request); !status.ok()) return status;
    if (path == "/v1/completions") return Generate(*request, false, tenant, std::move(notify));
    if (path == "/v1/chat/completions") return Generate(*request, true, tenant, std::move(notify));
  }
  if (path == "/metrics" && !service_->config().operations.metrics) {
    return HttpError(404, "this server keeps no metrics (--metrics false)");
  }
  absl::StatusOr<HttpReply> reply = HttpReply{};
  if (path == "/tokenize")
    reply = Tokenize(*request);
  else if (path == "/detokenize")
    reply = Detokenize(*request);
  else if (path == "/v1/models")
    reply = Models();
  else if (path.starts_with(kModelPrefix))
    reply = Model(path.substr(kModelPrefix.size()));
  else if (path == "/health" || path == "/ping")
    reply->body = "{\"status\":\"ok\"}";
  else if (path == "/ready")
    reply = Ready();
  else if (path == "/health_generate")
    reply = CanGenerate();
  else if (path == "/version")
    reply->body = fmt::format("{{\"version\":\"{}\"}}", kVersion);
  else if (path == "/metrics")
    *reply = {.content_type = "text/plain; version=0.0.4; charset=utf-8", .body = service_->MetricsText()};
  else
    reply->body = OpenApiJson();
  if (!reply.ok()) return reply.status();
  reply->headers.emplace_back("X-Request-Id", request->request_id);
  return std::unique_ptr<HttpOperation>(std::make_unique<ReadyOperation>(*std::move(reply)));
}

absl::StatusOr<std::unique_ptr<HttpOperation>> HttpApi::Generate(const HttpRequest& request, bool chat,
                                                                 const std::string& tenant, HttpNotify notify) {
  if (absl::Status status = service_->CheckAdmission(tenant); !status.ok()) return status;
  const CallLimits limits = service_->call_limits();
  auto call = chat ? ParseChat(request.body, limits) : ParseCompletion(request.body, limits);
  if (!call.ok()) return call.status();
  if (absl::Status status = service_->CheckModelName(call->generate.model); !status.ok()) return status;
  call->generate.tenant = tenant;
  call->generate.log_id = request.request_id;
  return StartGeneration(service_, *std::move(call), request.request_id, std::move(notify));
}

absl::StatusOr<HttpReply> HttpApi::Tokenize(const HttpRequest& request) const {
  auto call = ParseTokenize(request.body, service_->call_limits());
  if (!call.ok()) return call.status();
  if (absl::Status status = service_->CheckModelName(call->model); !status.ok()) return status;
  absl::StatusOr<std::vector<int32_t>> tokens;
  if (const auto* text = std::get_if<std::string>(&call->prompt)) {
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

HttpReply HttpApi::Models() const {
  return {.body = fmt::format("{{\"object\":\"list\",\"data\":[{}]}}", ModelJson())};
}

absl::StatusOr<HttpReply> HttpApi::Model(const std::string& name) const {
  if (absl::Status status = service_->CheckModelName(name); !status.ok()) return status;
  return HttpReply{.body = ModelJson()};
}

HttpReply HttpApi::Ready() const {
  if (service_->draining()) return {.status = 503, .body = "{\"status\":\"draining\"}"};
  if (!service_->engine().health().ok()) return {.status = 503, .body = "{\"status\":\"failed\"}"};
  return {.body = "{\"status\":\"ready\"}"};
}

HttpReply HttpApi::CanGenerate() const {
  if (!service_->can_generate()) return {.status = 503, .body = "{\"status\":\"no tokens come out\"}"};
  return {.body = "{\"status\":\"ok\"}"};
}

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
