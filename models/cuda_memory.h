// State slots and small weight vectors in GPU memory. Threads: engine thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda_device.h"
#include "models/state_pool.h"

namespace linspec {

class CudaStates final : public StateMemory {
 public:
  CudaStates(std::shared_ptr<CudaDevice> device, CudaMemory memory)
      : device_(std::move(device)), memory_(std::move(memory)) {}
  std::byte* data() override { return memory_.as<std::byte>(); }
  void Zero(int64_t offset, int64_t size) override {
    Note(device_->api().zero(device_->context(), data() + offset, size));
  }
  void Copy(int64_t from, int64_t to, int64_t size) override {
    Note(device_->api().copy(device_->context(), data() + to, data() + from, size));
  }

 private:
  // A device that fails here fails the next call too; the device remembers.
  void Note(int32_t code) { device_->Check(code, "state memory").IgnoreError(); }
  std::shared_ptr<CudaDevice> device_;
  CudaMemory memory_;
};

// A pool in device memory as the plugin reads it.
inline LinspecCudaStates StatesOf(const StatePool& pool) {
  return {.base = pool.data(), .bytes_per_slot = pool.bytes_per_slot(), .bytes_per_layer = pool.bytes_per_layer()};
}

// The weights' small vectors on the device, in one block.
class DeviceVectors {
 public:
  // Where `values` will be; null for none. Call Upload when all are added.
  int64_t Add(const std::vector<float>& values) {
    if (values.empty()) return -1;
    const auto at = static_cast<int64_t>(host_.size());
    host_.insert(host_.end(), values.begin(), values.end());
    host_.resize((host_.size() + 3) / 4 * 4);
    return at;
  }
  absl::Status Upload(const std::shared_ptr<CudaDevice>& device) {
    const int64_t bytes = static_cast<int64_t>(host_.size() * sizeof(float));
    auto memory = CudaMemory::Allocate(device, bytes);
    if (!memory.ok()) return memory.status();
    memory_ = *std::move(memory);
    return device->Check(device->api().upload(device->context(), memory_.as<void>(), host_.data(), bytes),
                         "load weights");
  }
  const float* At(int64_t offset) const { return offset < 0 ? nullptr : memory_.as<float>() + offset; }

 private:
  std::vector<float> host_;
  CudaMemory memory_;
};

}  // namespace linspec
