#include "models/safetensors.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "models/json_check.h"

namespace linspec {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // as the reference implementation
constexpr size_t kMaxRank = 8;

std::optional<DType> DTypeFromName(const std::string& name) {
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kI8, DType::kI32, DType::kI64}) {
    if (name == DTypeName(dtype)) return dtype;
  }
  return std::nullopt;
}

// Unmaps when the last view goes.
class Mapping {
 public:
  Mapping(void* address, size_t size) : address_(address), size_(size) {}
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { munmap(address_, size_); }
  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(address_), size_}; }

 private:
  void* address_;
  size_t size_;
};

absl::StatusOr<std::shared_ptr<Mapping>> MapFile(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return absl::ErrnoToStatus(errno, fmt::format("cannot open {}", path));
  struct stat info{};
  absl::StatusOr<std::shared_ptr<Mapping>> mapping;
  if (fstat(file, &info) != 0 || !S_ISREG(info.st_mode)) {
    mapping = absl::InvalidArgumentError(fmt::format("{}: not a regular file", path));
  } else if (info.st_size < 8) {
    mapping =
        absl::InvalidArgumentError(fmt::format("{}: {} bytes is too short for a safetensors file", path, info.st_size));
  } else if (void* address = mmap(nullptr, info.st_size, PROT_READ, MAP_PRIVATE, file, 0); address == MAP_FAILED) {
    mapping = absl::ErrnoToStatus(errno, fmt::format("cannot map {}", path));
  } else {
    mapping = std::make_shared<Mapping>(address, static_cast<size_t>(info.st_size));
  }
  close(file);
  return mapping;
}

// A non-negative integer below 2^63.
std::optional<int64_t> Size(const json& value) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() > INT64_MAX) return std::nullopt;
  return value.get<int64_t>();
}

struct Entry {
  TensorView view;
  int64_t begin = 0, end = 0;  // bytes in the data part
};

// Reads one header entry; the caller adds file and tensor name to the message.
absl::StatusOr<Entry> ParseEntry(const json& value) {
  if (!value.is_object() || value.size() != 3 || !value.contains("dtype") || !value.contains("shape") ||
      !value.contains("data_offsets")) {
    return absl::InvalidArgumentError("expected exactly dtype, shape and data_offsets");
  }
  const json &dtype = value["dtype"], &shape = value["shape"], &offsets = value["data_offsets"];
  Entry entry;
  const std::optional<DType> known = dtype.is_string() ? DTypeFromName(dtype.get<std::string>()) : std::nullopt;
  if (!known) return absl::InvalidArgumentError(fmt::format("unsupported dtype {:.40}", dtype.dump()));
  entry.view.dtype = *known;

  if (!shape.is_array() || shape.size() > kMaxRank) {
    return absl::InvalidArgumentError(fmt::format("shape is not a list of at most {} sizes", kMaxRank));
  }
  int64_t bytes = static_cast<int64_t>(DTypeSize(*known));
  for (const json& dim : shape) {
    const std::optional<int64_t> size = Size(dim);
    if (!size) return absl::InvalidArgumentError(fmt::format("bad size {:.40} in shape", dim.dump()));
    if (__builtin_mul_overflow(bytes, *size, &bytes)) return absl::InvalidArgumentError("shape overflows 64 bits");
    entry.view.shape.push_back(*size);
  }

  const std::optional<int64_t> begin = offsets.is_array() && offsets.size() == 2 ? Size(offsets[0]) : std::nullopt;
  const std::optional<int64_t> end = begin ? Size(offsets[1]) : std::nullopt;
  if (!end || *begin > *end) return absl::InvalidArgumentError(fmt::format("bad data_offsets {:.80}", offsets.dump()));
  if (*end - *begin != bytes) {
    return absl::InvalidArgumentError(fmt::format("shape {} of {} needs {} bytes, data_offsets give {}",
                                                  ShapeText(entry.view.shape), DTypeName(*known), bytes,
                                                  *end - *begin));
  }
  entry.view.num_bytes = bytes;
  entry.begin = *begin;
  entry.end = *end;
  return entry;
}

// Views must be aligned for their type. Writers pad the header to 8 bytes; old ones did not: those tensors are copied.
void PlaceData(std::span<const std::byte> data, const std::shared_ptr<const void>& owner, const Entry& entry,
               TensorView* view) {
  view->data = data.data() + entry.begin;
  view->owner = owner;
  if (reinterpret_cast<uintptr_t>(view->data) % DTypeSize(view->dtype) == 0) return;
  auto copy = std::make_shared<std::vector<std::byte>>(data.begin() + entry.begin, data.begin() + entry.end);
  view->data = copy->data();
  view->owner = std::move(copy);
}

// The tensors must tile the data part: no overlap, no hole, nothing past the end.
absl::Status CheckTiling(std::vector<std::pair<std::string, Entry>>& entries, int64_t data_bytes,
                         const std::string& file) {
  std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second.begin, a.second.end) < std::pair(b.second.begin, b.second.end);
  });
  int64_t covered = 0;
  for (const auto& [name, entry] : entries) {
    if (entry.end > data_bytes) {
      return absl::InvalidArgumentError(
          fmt::format("{}: tensor {} ends at byte {} of {}: file truncated?", file, name, entry.end, data_bytes));
    }
    if (entry.begin != covered) {
      return absl::InvalidArgumentError(
          fmt::format("{}: tensor {} begins at byte {}, {} the end of the one before ({})", file, name, entry.begin,
                      entry.begin < covered ? "overlapping" : "leaving a hole after", covered));
    }
    covered = entry.end;
  }
  if (covered == data_bytes) return absl::OkStatus();
  return absl::InvalidArgumentError(fmt::format("{}: {} bytes after the last tensor", file, data_bytes - covered));
}

absl::StatusOr<json> ParseHeader(std::span<const std::byte> bytes, const std::string& file, int64_t* header_bytes) {
  uint64_t length = 0;
  if (bytes.size() >= sizeof(length)) std::memcpy(&length, bytes.data(), sizeof(length));  // little endian, as x86-64
  if (bytes.size() < sizeof(length) || length > kMaxHeaderBytes || length > bytes.size() - sizeof(length)) {
    return absl::InvalidArgumentError(fmt::format(
        "{}: header of {} bytes in a file of {}: not safetensors, or truncated", file, length, bytes.size()));
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + sizeof(length), length);
  if (absl::Status checked = CheckJson(text); !checked.ok()) {
    return absl::InvalidArgumentError(fmt::format("{}: header: {}", file, std::string(checked.message())));
  }
  json header = json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (!header.is_object()) return absl::InvalidArgumentError(fmt::format("{}: header is not a JSON object", file));
  *header_bytes = static_cast<int64_t>(sizeof(length) + length);
  return header;
}

}  // namespace

std::string ShapeText(std::span<const int64_t> shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

absl::StatusOr<TensorMap> OpenSafetensors(const std::string& path) {
  absl::StatusOr<std::shared_ptr<Mapping>> mapping = MapFile(path);
  if (!mapping.ok()) return mapping.status();
  return ParseSafetensors((*mapping)->bytes(), *mapping, path);
}

absl::StatusOr<TensorMap> ParseSafetensors(std::span<const std::byte> bytes, std::shared_ptr<const void> owner,
                                           const std::string& file) {
  int64_t header_bytes = 0;
  const absl::StatusOr<json> header = ParseHeader(bytes, file, &header_bytes);
  if (!header.ok()) return header.status();

  std::vector<std::pair<std::string, Entry>> entries;
  for (const auto& [name, value] : header->items()) {
    if (name == "__metadata__") continue;
    absl::StatusOr<Entry> entry = ParseEntry(value);
    if (!entry.ok()) {
      return absl::InvalidArgumentError(
          fmt::format("{}: tensor {:.200}: {}", file, name, std::string(entry.status().message())));
    }
    entries.emplace_back(name, *std::move(entry));
  }
  const std::span<const std::byte> data = bytes.subspan(header_bytes);
  if (absl::Status tiled = CheckTiling(entries, static_cast<int64_t>(data.size()), file); !tiled.ok()) return tiled;

  TensorMap tensors;
  for (auto& [name, entry] : entries) {
    PlaceData(data, owner, entry, &entry.view);
    tensors.emplace(name, std::move(entry.view));
  }
  return tensors;
}

}  // namespace linspec
