// What the clients need to speak TLS: whom to trust, and who we are. Read once from the files that the flags name.
//
// Threads: constant after loading, shared by all clients.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "loadtest/options.h"

namespace boost::asio::ssl {
class context;
}

namespace linspec::loadtest {

struct Tls {
  std::string ca, cert, key;  // PEM, for gRPC; empty: the system's roots; no client certificate
  std::shared_ptr<boost::asio::ssl::context> context;  // for REST: verifies the server
};

// Null when the options ask for none. NOT_FOUND or INVALID_ARGUMENT names flag and file.
absl::StatusOr<std::shared_ptr<const Tls>> LoadTls(const Options& options);

}  // namespace linspec::loadtest
