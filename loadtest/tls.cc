#include "loadtest/tls.h"

#include <fmt/format.h>

#include <boost/asio/ssl/context.hpp>
#include <fstream>
#include <sstream>
#include <string_view>

namespace linspec::loadtest {
namespace {

namespace ssl = boost::asio::ssl;

absl::StatusOr<std::string> ReadPem(std::string_view flag, const std::string& path) {
  if (path.empty()) return std::string();
  std::ifstream file(path);
  std::stringstream text;
  if (!file || !(text << file.rdbuf())) return absl::NotFoundError(fmt::format("--{} {}: cannot be read", flag, path));
  return text.str();
}

absl::Status Bad(std::string_view flag, const std::string& path, const boost::system::error_code& error) {
  return absl::InvalidArgumentError(fmt::format("--{} {}: {}", flag, path, error.message()));
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Tls>> LoadTls(const Options& options) {
  if (!options.tls) return std::shared_ptr<const Tls>();
  auto tls = std::make_shared<Tls>();
  for (const auto& [flag, path, pem] :
       {std::tuple("tls-ca", &options.tls_ca, &tls->ca), std::tuple("tls-cert", &options.tls_cert, &tls->cert),
        std::tuple("tls-key", &options.tls_key, &tls->key)}) {
    absl::StatusOr<std::string> text = ReadPem(flag, *path);
    if (!text.ok()) return text.status();
    *pem = *std::move(text);
  }
  tls->context = std::make_shared<ssl::context>(ssl::context::tls_client);
  boost::system::error_code error;
  tls->context->set_verify_mode(ssl::verify_peer, error);
  if (options.tls_ca.empty()) {
    tls->context->set_default_verify_paths(error);
    if (error) return Bad("tls-ca", "(the system's)", error);
  } else {
    tls->context->add_certificate_authority(boost::asio::buffer(tls->ca), error);
    if (error) return Bad("tls-ca", options.tls_ca, error);
  }
  if (!options.tls_cert.empty()) {
    tls->context->use_certificate_chain(boost::asio::buffer(tls->cert), error);
    if (error) return Bad("tls-cert", options.tls_cert, error);
    tls->context->use_private_key(boost::asio::buffer(tls->key), ssl::context::pem, error);
    if (error) return Bad("tls-key", options.tls_key, error);
  }
  return tls;
}

}  // namespace linspec::loadtest
