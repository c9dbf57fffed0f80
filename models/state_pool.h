// Recurrent states of all requests: fixed-size slots in one allocation.
//
// A slot is acquired zeroed with length 0, and given back by the handle's destructor. free + held == capacity, always.
// Threads: engine thread only. The pool must outlive its slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "models/model_config.h"

namespace linspec {

class StatePool;

// The memory of all slots, on the host or on a device. Offsets and sizes in bytes. Work on a device is queued: a fault
// shows in the model's next call.
class StateMemory {
 public:
  virtual ~StateMemory() = default;
  virtual std::byte* data() = 0;
  virtual void Zero(int64_t offset, int64_t size) = 0;
  virtual void Copy(int64_t from, int64_t to, int64_t size) = 0;
};
using StateAllocator = std::function<absl::StatusOr<std::unique_ptr<StateMemory>>(int64_t bytes)>;

class StateSlot {  // move-only
 public:
  StateSlot() = default;
  StateSlot(StateSlot&& other) noexcept;
  StateSlot& operator=(StateSlot&& other) noexcept;
  ~StateSlot();
  bool valid() const { return pool_ != nullptr; }
  int32_t id() const { return id_; }
  void Release();

 private:
  friend class StatePool;
  StateSlot(StatePool* pool, int32_t id) : pool_(pool), id_(id) {}
  StatePool* pool_ = nullptr;
  int32_t id_ = -1;
};

class StatePool {
 public:
  // num_slots requests fit, in memory from allocate. dtype: kF32 or kBF16, of everything in a slot.
  // RESOURCE_EXHAUSTED if the memory cannot be had.
  static absl::StatusOr<std::unique_ptr<StatePool>> Create(const ModelConfig& config, int num_slots,
                                                           DType dtype = DType::kF32,
                                                           const StateAllocator& allocate = AllocateOnHost);
  static absl::StatusOr<std::unique_ptr<StateMemory>> AllocateOnHost(int64_t bytes);

  StateSlot Acquire();   // !valid() when none is free
  int capacity() const;  // slots that requests can hold
  int num_free() const;
  DType dtype() const { return dtype_; }
  int64_t total_bytes() const;

  int64_t length(int32_t slot) const;  // tokens committed to the state
  void set_length(int32_t slot, int64_t length);
  LayerState layer(int32_t slot, int layer);
  LayerState layer(int32_t slot, int layer) const;  // for reading: verify must not write through it
  void CopySlot(int32_t from, int32_t to);          // deep copy of state and length (n > 1 forks)

  // [slot][layer][S | ring_k | ring_v] in dtype, a layer padded to 64 bytes; in device memory when the allocator's is
  std::byte* data() const { return data_; }
  int64_t bytes_per_slot() const { return bytes_per_slot_; }
  int64_t bytes_per_layer() const { return bytes_per_layer_; }

 private:
  friend class StateSlot;
  StatePool() = default;
  void Free(int32_t id);
  std::unique_ptr<StateMemory> memory_;
  std::byte* data_ = nullptr;  // 64-byte aligned
  ModelConfig config_;
  DType dtype_ = DType::kF32;
  int64_t bytes_per_layer_ = 0, bytes_per_slot_ = 0;
  int num_slots_ = 0;
  std::vector<int64_t> lengths_;
  std::vector<int32_t> free_;
};

}  // namespace linspec
