// An NVIDIA GPU through liblinspec_cuda.so, which is looked for at run time: without plugin, driver or GPU the rest of
// linspec works as if CUDA did not exist. The only door from C++ to kernels/cuda.
//
// Errors: NOT_FOUND (no plugin), FAILED_PRECONDITION (no driver or GPU), RESOURCE_EXHAUSTED (device memory),
// UNIMPLEMENTED (a shape or type without a kernel), INTERNAL (a fault on the device). After a fault every call fails;
// health() tells. Threads: Open and calls of one device by one thread at a time; health() from any.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/plugin_api.h"

namespace linspec {

class CudaDevice : public std::enable_shared_from_this<CudaDevice> {
 public:
  // plugin: a file, or empty for the places where an installation or a build has it.
  static absl::StatusOr<std::shared_ptr<CudaDevice>> Open(const std::string& plugin = "", int index = 0);
  ~CudaDevice();

  const LinspecCudaApi& api() const { return *api_; }
  LinspecCudaContext* context() const { return context_; }
  // The code of a call as a status, `what` in front.
  absl::Status Check(int32_t code, const std::string& what);
  absl::Status health() const;

  absl::StatusOr<LinspecCudaDeviceInfo> Info();
  absl::StatusOr<LinspecCudaCeilings> Measure();

 private:
  CudaDevice(void* library, const LinspecCudaApi* api, LinspecCudaContext* context)
      : library_(library), api_(api), context_(context) {}

  void* const library_;
  const LinspecCudaApi* const api_;
  LinspecCudaContext* const context_;
  std::atomic<bool> failed_ = false;
};

// Device memory; keeps its device alive.
class CudaMemory {
 public:
  static absl::StatusOr<CudaMemory> Allocate(std::shared_ptr<CudaDevice> device, int64_t bytes);
  CudaMemory() = default;
  CudaMemory(CudaMemory&& other) noexcept;
  CudaMemory& operator=(CudaMemory&& other) noexcept;
  ~CudaMemory();

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }
  CudaDevice* device() const { return device_.get(); }

 private:
  void Release();
  std::shared_ptr<CudaDevice> device_;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace linspec
