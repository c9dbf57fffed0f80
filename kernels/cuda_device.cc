#include "kernels/cuda_device.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <filesystem>
#include <utility>
#include <vector>

namespace linspec {
namespace {

namespace fs = std::filesystem;

constexpr const char* kPluginName = "liblinspec_cuda.so";

// Beside the executable (a build), or where an installation has it.
std::vector<fs::path> PluginPlaces() {
  std::error_code error;
  const fs::path binary = fs::read_symlink("/proc/self/exe", error).parent_path();
  return {binary / kPluginName, binary / ".." / "lib" / kPluginName};
}

absl::StatusOr<void*> LoadPlugin(const std::string& plugin) {
  const std::vector<fs::path> places = plugin.empty() ? PluginPlaces() : std::vector<fs::path>{plugin};
  std::string looked;
  for (const fs::path& place : places) {
    std::error_code error;
    looked += fmt::format("\n  {}", place.lexically_normal().string());
    if (!fs::exists(place, error)) continue;
    if (void* library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    return absl::FailedPreconditionError(fmt::format("cannot load the CUDA plugin: {}", dlerror()));
  }
  return absl::NotFoundError(
      fmt::format("no CUDA plugin; build it with `./dev build cuda`, or use --device cpu. Looked for:{}", looked));
}

}  // namespace

absl::StatusOr<std::shared_ptr<CudaDevice>> CudaDevice::Open(const std::string& plugin, int index) {
  absl::StatusOr<void*> library = LoadPlugin(plugin);
  if (!library.ok()) return library.status();
  const auto entry = reinterpret_cast<LinspecCudaEntry>(dlsym(*library, LINSPEC_CUDA_ENTRY));
  const LinspecCudaApi* api = entry == nullptr ? nullptr : entry(LINSPEC_CUDA_ABI_VERSION);
  if (api == nullptr) {
    dlclose(*library);
    return absl::FailedPreconditionError("the CUDA plugin belongs to another version of linspec; install both anew");
  }
  LinspecCudaContext* context = nullptr;
  if (api->create(index, &context) != kLinspecCudaOk) {
    const std::string why = api->last_error(nullptr);
    dlclose(*library);
    return absl::FailedPreconditionError(fmt::format("CUDA is not usable: {}", why));
  }
  return std::shared_ptr<CudaDevice>(new CudaDevice(*library, api, context));
}

// The library stays loaded: cudart registers handlers that run when the process ends.
CudaDevice::~CudaDevice() { api_->destroy(context_); }

absl::Status CudaDevice::Check(int32_t code, const std::string& what) {
  if (code == kLinspecCudaOk) return absl::OkStatus();
  const std::string message = fmt::format("{}: {}", what, api_->last_error(context_));
  switch (code) {
    case kLinspecCudaOutOfMemory:
      return absl::ResourceExhaustedError(message);
    case kLinspecCudaUnsupported:
      return absl::UnimplementedError(message);
    case kLinspecCudaNoDevice:
      return absl::FailedPreconditionError(message);
    case kLinspecCudaDeviceError:
      failed_ = true;
      return absl::InternalError("the GPU failed: " + message);
    default:
      return absl::InternalError(message);
  }
}

absl::Status CudaDevice::health() const {
  return failed_ ? absl::InternalError("the GPU failed; restart the server") : absl::OkStatus();
}

absl::StatusOr<LinspecCudaDeviceInfo> CudaDevice::Info() {
  LinspecCudaDeviceInfo info = {};
  if (absl::Status status = Check(api_->device_info(context_, &info), "GPU info"); !status.ok()) return status;
  return info;
}

absl::StatusOr<LinspecCudaCeilings> CudaDevice::Measure() {
  LinspecCudaCeilings ceilings = {};
  if (absl::Status status = Check(api_->measure(context_, &ceilings), "measure the GPU"); !status.ok()) return status;
  return ceilings;
}

absl::StatusOr<CudaMemory> CudaMemory::Allocate(std::shared_ptr<CudaDevice> device, int64_t bytes) {
  CudaMemory memory;
  const int32_t code = device->api().alloc(device->context(), bytes, &memory.data_);
  if (absl::Status status = device->Check(code, "GPU memory"); !status.ok()) return status;
  memory.device_ = std::move(device);
  memory.bytes_ = bytes;
  return memory;
}

CudaMemory::CudaMemory(CudaMemory&& other) noexcept
    : device_(std::move(other.device_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

CudaMemory& CudaMemory::operator=(CudaMemory&& other) noexcept {
  if (this == &other) return *this;
  Release();
  device_ = std::move(other.device_);
  data_ = std::exchange(other.data_, nullptr);
  bytes_ = std::exchange(other.bytes_, 0);
  return *this;
}

CudaMemory::~CudaMemory() { Release(); }

// A failed free means a failed device, which the next call reports.
void CudaMemory::Release() {
  if (data_ != nullptr) device_->api().release(device_->context(), std::exchange(data_, nullptr));
}

}  // namespace linspec
