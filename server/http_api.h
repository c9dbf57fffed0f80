// The routes of the REST front end: method and content checks, authorization, and which operation answers.
//
// Threads: called on connection strands, any number at once.
#pragma once

#include <memory>

#include "server/auth.h"
#include "server/http_server.h"
#include "server/service.h"

namespace linspec {

class HttpApi {
 public:
  struct RouteInfo {
    const char* path;
    const char* method;
  };

  HttpApi(Service* service, Authenticator* auth);

  std::unique_ptr<HttpOperation> Handle(HttpRequest request, HttpNotify notify);
  HttpReply ErrorReply(const absl::Status& status) const;
  void Observe(const HttpRequest& request, int status, double seconds);  // for the metrics

 private:
  absl::StatusOr<std::unique_ptr<HttpOperation>> Route(HttpRequest* request, const RouteInfo* route, HttpNotify notify);
  static std::unique_ptr<HttpOperation> Preflight(const RouteInfo& route);
  absl::StatusOr<std::unique_ptr<HttpOperation>> Generate(const HttpRequest& request, bool chat,
                                                          const std::string& tenant, HttpNotify notify);
  absl::StatusOr<HttpReply> Tokenize(const HttpRequest& request) const;
  absl::StatusOr<HttpReply> Detokenize(const HttpRequest& request) const;
  absl::StatusOr<HttpReply> Model(const std::string& name) const;
  HttpReply Models() const;
  HttpReply Ready() const;
  HttpReply CanGenerate() const;
  std::string ModelJson() const;

  Service* const service_;
  Authenticator* const auth_;
};

// The OpenAPI 3.1 description of these routes (openapi.cc).
std::string OpenApiJson();

}  // namespace linspec
