// The routes of the REST front end: method and content checks, authorization, and which operation answers.
//
// Threads: called on connection strands, any number at once.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/auth.h"
#include "server/http_server.h"
#include "server/openai_json.h"
#include "server/service.h"

namespace linspec {

class HttpApi {
 public:
  HttpApi(Service* service, Authenticator* auth);

  std::unique_ptr<HttpOperation> Handle(HttpRequest request, HttpNotify notify);
  HttpReply ErrorReply(const absl::Status& status) const;
  void Observe(const HttpRequest& request, int status, double seconds);  // for the metrics

 private:
  using Answer = absl::StatusOr<HttpReply> (HttpApi::*)(const HttpRequest& request) const;
  using Parse = absl::StatusOr<OpenAiCall> (*)(const std::string& body, const CallLimits& limits);
  struct RouteInfo {
    const char* path;
    const char* method;     // GET routes also answer HEAD
    Answer answer;          // of a route that answers at once
    Parse parse = nullptr;  // of one that generates: how its body is read
  };
  static const RouteInfo kRoutes[];

  static const RouteInfo* FindRoute(const std::string& path);
  absl::StatusOr<std::unique_ptr<HttpOperation>> Route(const HttpRequest& request, const RouteInfo* route,
                                                       HttpNotify notify);
  static std::unique_ptr<HttpOperation> Preflight(const RouteInfo& route);
  absl::StatusOr<std::unique_ptr<HttpOperation>> Generate(const HttpRequest& request, Parse parse,
                                                          const std::string& tenant, HttpNotify notify);
  absl::StatusOr<HttpReply> Tokenize(const HttpRequest& request) const;
  absl::StatusOr<HttpReply> Detokenize(const HttpRequest& request) const;
  absl::StatusOr<HttpReply> Models(const HttpRequest& request) const;
  absl::StatusOr<HttpReply> Model(const HttpRequest& request) const;
  absl::StatusOr<HttpReply> Alive(const HttpRequest& request) const;
  absl::StatusOr<HttpReply> Ready(const HttpRequest& request) const;
  absl::StatusOr<HttpReply> CanGenerate(const HttpRequest& request) const;
  absl::StatusOr<HttpReply> Version(const HttpRequest& request) const;
  absl::StatusOr<HttpReply> Props(const HttpRequest& request) const;
  absl::StatusOr<HttpReply> MetricsText(const HttpRequest& request) const;
  absl::StatusOr<HttpReply> OpenApi(const HttpRequest& request) const;
  std::string ModelJson() const;

  Service* const service_;
  Authenticator* const auth_;
};

// The OpenAPI 3.1 description of these routes (openapi.cc).
std::string OpenApiJson();

}  // namespace linspec
