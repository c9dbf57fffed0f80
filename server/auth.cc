#include "server/auth.h"

#include <fmt/format.h>
#include <openssl/crypto.h>
#include <openssl/sha.h>
#include <sys/stat.h>

#include <charconv>
#include <fstream>

namespace linspec {
namespace {

constexpr std::string_view kHashPrefix = "sha256:";
constexpr size_t kMaxKeyBytes = 512;

std::array<uint8_t, 32> Sha256(std::string_view text) {
  std::array<uint8_t, 32> digest;
  SHA256(reinterpret_cast<const uint8_t*>(text.data()), text.size(), digest.data());
  return digest;
}

bool ParseHex(std::string_view hex, std::array<uint8_t, 32>* digest) {
  if (hex.size() != 64) return false;
  for (size_t i = 0; i < 32; ++i) {
    const char* begin = hex.data() + 2 * i;
    if (std::from_chars(begin, begin + 2, (*digest)[i], 16).ptr != begin + 2) return false;
  }
  return true;
}

bool SameTime(const std::timespec& a, const std::timespec& b) { return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec; }

}  // namespace

absl::StatusOr<std::unique_ptr<Authenticator>> Authenticator::Create(const std::string& path, bool public_metrics,
                                                                     Log* log) {
  std::unique_ptr<Authenticator> auth(new Authenticator(path, public_metrics, log));
  if (!path.empty()) {
    if (absl::Status status = auth->Load(); !status.ok()) return status;
  }
  return auth;
}

absl::Status Authenticator::Load() {
  struct stat info{};
  std::ifstream file(path_);
  if (!file || stat(path_.c_str(), &info) != 0) {
    return absl::NotFoundError(fmt::format("--api-key-file: cannot read '{}'", path_));
  }
  std::vector<Digest> keys;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    while (!line.empty() && (line.back() == '\r' || line.back() == ' ')) line.pop_back();
    if (line.empty() || line[0] == '#') continue;
    Digest digest;
    if (line.starts_with(kHashPrefix)) {
      if (!ParseHex(std::string_view(line).substr(kHashPrefix.size()), &digest)) {
        return absl::InvalidArgumentError(
            fmt::format("--api-key-file: {}:{}: sha256: needs 64 hex digits", path_, number));
      }
    } else {
      digest = Sha256(line);
    }
    keys.push_back(digest);
  }
  if (keys.empty()) return absl::InvalidArgumentError(fmt::format("--api-key-file: '{}' holds no key", path_));
  keys_ = std::move(keys);
  modified_ = info.st_mtim;
  return absl::OkStatus();
}

void Authenticator::ReloadIfChanged() {
  const auto now = std::chrono::steady_clock::now();
  if (now - checked_ < std::chrono::seconds(1)) return;
  checked_ = now;
  struct stat info{};
  if (stat(path_.c_str(), &info) != 0 || SameTime(info.st_mtim, modified_)) return;
  modified_ = info.st_mtim;  // a bad file is complained about once
  const absl::Status status = Load();
  if (status.ok() && watcher_) watcher_(keys_.size());
  const std::string why(status.message());
  if (log_ == nullptr) return;
  if (status.ok()) log_->Write(LogLevel::kInfo, "keys reread", {{"keys", static_cast<int64_t>(keys_.size())}});
  if (!status.ok())
    log_->Write(LogLevel::kError, "keys not reread, the old ones stay", {{"why", std::string_view(why)}});
}

void Authenticator::WatchKeys(std::function<void(size_t)> watcher) {
  std::lock_guard lock(mutex_);
  watcher_ = std::move(watcher);
  watcher_(keys_.size());
}

bool Authenticator::IsPublicRoute(std::string_view path) const {
  return path == "/health" || path == "/ping" || path == "/ready" || path == "/version" ||
         (path == "/metrics" && public_metrics_);
}

absl::StatusOr<std::string> Authenticator::Check(std::string_view authorization) {
  if (!enabled()) return std::string();
  constexpr std::string_view kScheme = "Bearer ";
  const bool has_scheme = authorization.starts_with(kScheme) && authorization.size() - kScheme.size() <= kMaxKeyBytes;
  const Digest given = Sha256(has_scheme ? authorization.substr(kScheme.size()) : std::string_view());
  std::lock_guard lock(mutex_);
  ReloadIfChanged();
  bool match = false;
  for (const Digest& key : keys_) match |= CRYPTO_memcmp(key.data(), given.data(), given.size()) == 0;
  if (!has_scheme || !match) {
    return absl::UnauthenticatedError(authorization.empty() ? "missing API key; send 'Authorization: Bearer <key>'"
                                                            : "invalid API key");
  }
  return fmt::format("{:02x}{:02x}{:02x}{:02x}", given[0], given[1], given[2], given[3]);
}

}  // namespace linspec
