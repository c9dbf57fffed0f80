#include "models/weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "kernels/check.h"
#include "models/json_check.h"

namespace linspec {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr int64_t kMaxIndexBytes = 100'000'000;

bool Exists(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

bool HasPickledWeights(const std::string& folder) {
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    const std::string extension = it->path().extension().string();
    if (extension == ".bin" || extension == ".pt" || extension == ".pth" || extension == ".pkl") return true;
  }
  return false;
}

// A shard name comes from a file that may be hostile: it must stay inside the folder.
bool IsPlainFileName(const std::string& name) {
  return !name.empty() && name.size() <= 255 && name[0] != '.' &&
         name.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
}

// tensor -> shard
absl::StatusOr<std::map<std::string, std::string>> ReadIndex(const std::string& path) {
  absl::StatusOr<std::string> text = ReadTextFile(path, kMaxIndexBytes);
  if (!text.ok()) return text.status();
  if (absl::Status checked = CheckJson(*text); !checked.ok()) {
    return absl::InvalidArgumentError(fmt::format("{}: {}", path, std::string(checked.message())));
  }
  const json root = json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!root.is_object() || !root.contains("weight_map") || !root["weight_map"].is_object()) {
    return absl::InvalidArgumentError(fmt::format("{}: weight_map is missing or not an object", path));
  }
  std::map<std::string, std::string> index;
  for (const auto& [tensor, shard] : root["weight_map"].items()) {
    if (!shard.is_string() || !IsPlainFileName(shard.get<std::string>())) {
      return absl::InvalidArgumentError(fmt::format("{}: tensor {}: shard {:.200} is not a plain file name", path,
                                                    tensor, shard.dump(-1, ' ', true)));
    }
    index.emplace(tensor, shard.get<std::string>());
  }
  return index;
}

absl::StatusOr<TensorMap> OpenShards(const std::string& folder) {
  const std::string index_path = (fs::path(folder) / kIndexFile).string();
  absl::StatusOr<std::map<std::string, std::string>> index = ReadIndex(index_path);
  if (!index.ok()) return index.status();
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : *index) shards.insert(shard);

  TensorMap all;
  for (const std::string& shard : shards) {
    absl::StatusOr<TensorMap> tensors = OpenSafetensors((fs::path(folder) / shard).string());
    if (!tensors.ok()) return tensors.status();
    for (auto& [name, view] : *tensors) {
      const auto listed = index->find(name);
      if (listed == index->end() || listed->second != shard) {
        return absl::InvalidArgumentError(
            fmt::format("{}: tensor {} is in shard {}, but the index does not say so", index_path, name, shard));
      }
      index->erase(listed);
      all.emplace(name, std::move(view));
    }
  }
  if (index->empty()) return all;
  return absl::InvalidArgumentError(
      fmt::format("{}: tensor {} is not in its shard {}", index_path, index->begin()->first, index->begin()->second));
}

// Buffers of the published checkpoints that follow from the configuration.
bool IsDerivedBuffer(const std::string& name) {
  return name.ends_with(".self_attn.conv_mask") || name.ends_with(".rotary_emb.inv_freq");
}

// True if no element has an all-ones exponent (infinity or NaN).
template <typename Bits>
bool AllFinite(const TensorView& tensor, Bits exponent_mask) {
  const Bits* bits = reinterpret_cast<const Bits*>(tensor.data);
  bool finite = true;
  for (int64_t i = 0; i < tensor.num_elements(); ++i) finite &= (bits[i] & exponent_mask) != exponent_mask;
  return finite;
}

bool IsFinite(const TensorView& tensor) {
  switch (tensor.dtype) {
    case DType::kF32:
      return AllFinite<uint32_t>(tensor, 0x7F800000u);
    case DType::kF16:
      return AllFinite<uint16_t>(tensor, 0x7C00u);
    case DType::kBF16:
      return AllFinite<uint16_t>(tensor, 0x7F80u);
    default:
      return true;
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<WeightMap>> WeightMap::Open(const std::string& folder) {
  absl::StatusOr<TensorMap> tensors;
  if (Exists(fs::path(folder) / kSingleFile)) {
    tensors = OpenSafetensors((fs::path(folder) / kSingleFile).string());
  } else if (Exists(fs::path(folder) / kIndexFile)) {
    tensors = OpenShards(folder);
  } else if (HasPickledWeights(folder)) {
    return absl::FailedPreconditionError(
        fmt::format("{}: only pickled weights here. Unpickling runs code, so they are not read: convert them to {}",
                    folder, kSingleFile));
  } else {
    return absl::NotFoundError(fmt::format("{}: neither {} nor {}", folder, kSingleFile, kIndexFile));
  }
  if (!tensors.ok()) return tensors.status();
  std::erase_if(*tensors, [](const auto& item) { return IsDerivedBuffer(item.first); });
  return std::unique_ptr<WeightMap>(new WeightMap(folder, *std::move(tensors)));
}

absl::StatusOr<std::unique_ptr<WeightMap>> WeightMap::OpenFile(const std::string& path) {
  absl::StatusOr<TensorMap> tensors = OpenSafetensors(path);
  if (!tensors.ok()) return tensors.status();
  return std::unique_ptr<WeightMap>(new WeightMap(path, *std::move(tensors)));
}

absl::StatusOr<TensorView> WeightMap::Take(const std::string& name, std::vector<int64_t> shape) {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) return absl::InvalidArgumentError(fmt::format("{}: tensor {} is missing", path_, name));
  if (it->second.shape != shape) {
    return absl::InvalidArgumentError(fmt::format("{}: tensor {} has shape {}, expected {}", path_, name,
                                                  ShapeText(it->second.shape), ShapeText(shape)));
  }
  if (!IsFinite(it->second)) {
    return absl::InvalidArgumentError(fmt::format("{}: tensor {} holds an infinity or NaN", path_, name));
  }
  TensorView tensor = std::move(it->second);
  tensors_.erase(it);
  return tensor;
}

absl::Status WeightMap::CheckAllTaken() const {
  if (tensors_.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(fmt::format("{}: unexpected tensor {} ({} in all) for this configuration", path_,
                                                tensors_.begin()->first, tensors_.size()));
}

absl::StatusOr<std::string> ReadTextFile(const std::string& path, int64_t max_bytes) {
  std::error_code error;
  const auto size = fs::file_size(path, error);
  if (error) return absl::ErrnoToStatus(error.value(), fmt::format("cannot read {}", path));
  if (size > static_cast<uint64_t>(max_bytes)) {
    return absl::InvalidArgumentError(fmt::format("{}: {} bytes, expected at most {}", path, size, max_bytes));
  }
  std::string text(size, '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.read(text.data(), static_cast<std::streamsize>(size))) {
    return absl::UnavailableError(fmt::format("cannot read {}", path));
  }
  return text;
}

std::vector<float> ToFloats(const TensorView& tensor) {
  std::vector<float> floats(tensor.num_elements());
  if (tensor.dtype == DType::kF32) {
    std::memcpy(floats.data(), tensor.data, tensor.num_bytes);
    return floats;
  }
  LINSPEC_CHECK(tensor.dtype == DType::kF16 || tensor.dtype == DType::kBF16);
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(tensor.data);
  std::transform(bits, bits + floats.size(), floats.begin(),
                 tensor.dtype == DType::kF16 ? HalfToFloat : BFloat16ToFloat);
  return floats;
}

}  // namespace linspec
