// Who may call what: API keys from a file, one rule for every route of both protocols. Without a key file everything is
// allowed. The only public routes are the ones listed in IsPublicRoute.
//
// Threads: Check from any thread. The file is looked at again at most once a second, and reread when it changed; a file
// that cannot be read leaves the old keys in force.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/log.h"

namespace linspec {

class Authenticator {
 public:
  // path "": no keys. INVALID_ARGUMENT for a line that is no key, NOT_FOUND for a file that cannot be read.
  // Rereading is told to the log, which must outlive this; null: to nobody.
  static absl::StatusOr<std::unique_ptr<Authenticator>> Create(const std::string& path, bool public_metrics,
                                                               Log* log = nullptr);

  bool enabled() const { return !path_.empty(); }
  // Calls watcher with the number of keys, now and after each rereading. At most one, set before requests come.
  void WatchKeys(std::function<void(size_t)> watcher);
  bool IsPublicRoute(std::string_view path) const;
  // authorization: the header's value, "Bearer <key>". Returns the tenant's name (a prefix of the key's hash), never
  // the key. UNAUTHENTICATED otherwise. Takes the same time whichever key matches.
  absl::StatusOr<std::string> Check(std::string_view authorization);

 private:
  using Digest = std::array<uint8_t, 32>;
  Authenticator(std::string path, bool public_metrics, Log* log)
      : path_(std::move(path)), public_metrics_(public_metrics), log_(log) {}
  absl::Status Load();
  void ReloadIfChanged();

  const std::string path_;
  const bool public_metrics_;
  Log* const log_;
  std::mutex mutex_;  // guards what follows
  std::vector<Digest> keys_;
  std::function<void(size_t)> watcher_;
  std::timespec modified_{};
  std::chrono::steady_clock::time_point checked_;
};

}  // namespace linspec
