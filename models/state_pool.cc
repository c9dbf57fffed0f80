#include "models/state_pool.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "kernels/check.h"

namespace linspec {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kFloatsPerLine = 64 / sizeof(float);

int64_t PhysicalMemory() { return int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE); }

class HostMemory final : public StateMemory {
 public:
  explicit HostMemory(float* data) : data_(data) {}
  ~HostMemory() override { std::free(data_); }
  float* data() override { return data_; }
  void Zero(int64_t offset, int64_t size) override { std::memset(data_ + offset, 0, size * sizeof(float)); }
  void Copy(int64_t from, int64_t to, int64_t size) override {
    std::memcpy(data_ + to, data_ + from, size * sizeof(float));
  }

 private:
  float* const data_;
};

}  // namespace

StateSlot::StateSlot(StateSlot&& other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)), id_(std::exchange(other.id_, 0)) {}

StateSlot& StateSlot::operator=(StateSlot&& other) noexcept {
  if (this != &other) {
    Release();
    pool_ = std::exchange(other.pool_, nullptr);
    id_ = std::exchange(other.id_, 0);
  }
  return *this;
}

StateSlot::~StateSlot() { Release(); }

void StateSlot::Release() {
  if (pool_ != nullptr) std::exchange(pool_, nullptr)->Free(std::exchange(id_, 0));
}

// Overcommitting systems grant any size and kill the process later: compare with what the machine has.
absl::StatusOr<std::unique_ptr<StateMemory>> StatePool::AllocateOnHost(int64_t bytes) {
  if (bytes > PhysicalMemory()) {
    return absl::ResourceExhaustedError(
        fmt::format("{} bytes exceed this machine's memory of {}", bytes, PhysicalMemory()));
  }
  const int64_t whole_pages = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  auto* data = static_cast<float*>(std::aligned_alloc(kHugePage, whole_pages));
  if (data == nullptr) return absl::ResourceExhaustedError(fmt::format("cannot allocate {} bytes", bytes));
  // A step streams whole states; small pages would miss the TLB on the way. A hint: without it that is all that happens.
  madvise(data, whole_pages, MADV_HUGEPAGE);
  return std::make_unique<HostMemory>(data);
}

absl::StatusOr<std::unique_ptr<StatePool>> StatePool::Create(const ModelConfig& config, int num_slots,
                                                             const StateAllocator& allocate) {
  if (num_slots < 1)
    return absl::InvalidArgumentError(fmt::format("state pool of {} slots: expected 1 or more", num_slots));
  auto pool = std::unique_ptr<StatePool>(new StatePool());
  const int64_t floats = config.StateFloatsPerLayer();
  pool->config_ = config;
  pool->floats_per_layer_ = (floats + kFloatsPerLine - 1) / kFloatsPerLine * kFloatsPerLine;
  pool->floats_per_slot_ = pool->floats_per_layer_ * config.num_layers;
  pool->num_slots_ = num_slots + 1;

  const std::string what = fmt::format("state pool of {} slots of {} bytes", num_slots, pool->bytes_per_slot());
  int64_t bytes = 0;
  if (__builtin_mul_overflow(pool->bytes_per_slot(), int64_t{num_slots} + 1, &bytes)) {
    return absl::ResourceExhaustedError(what + ": more than any memory");
  }
  absl::StatusOr<std::unique_ptr<StateMemory>> memory = allocate(bytes);
  if (!memory.ok()) {
    return absl::Status(memory.status().code(), fmt::format("{}: {}", what, std::string(memory.status().message())));
  }
  pool->memory_ = *std::move(memory);
  pool->data_ = pool->memory_->data();
  pool->memory_->Zero(0, pool->floats_per_slot_);  // the padding slot; the others are zeroed when acquired
  pool->lengths_.assign(pool->num_slots_, 0);
  for (int id = num_slots; id >= 1; --id) pool->free_.push_back(id);
  return pool;
}

StateSlot StatePool::Acquire() {
  if (free_.empty()) return StateSlot();
  const int32_t id = free_.back();
  free_.pop_back();
  memory_->Zero(id * floats_per_slot_, floats_per_slot_);
  lengths_[id] = 0;
  return StateSlot(this, id);
}

void StatePool::Free(int32_t id) {
  LINSPEC_CHECK(id >= 1 && id < num_slots_);
  LINSPEC_CHECK(std::find(free_.begin(), free_.end(), id) == free_.end());
  free_.push_back(id);
}

int StatePool::capacity() const { return num_slots_ - 1; }
int StatePool::num_free() const { return static_cast<int>(free_.size()); }
int64_t StatePool::bytes_per_slot() const { return floats_per_slot_ * static_cast<int64_t>(sizeof(float)); }
int64_t StatePool::total_bytes() const { return bytes_per_slot() * num_slots_; }

int64_t StatePool::length(int32_t slot) const {
  LINSPEC_CHECK(slot >= 0 && slot < num_slots_);
  return lengths_[slot];
}

void StatePool::set_length(int32_t slot, int64_t length) {
  LINSPEC_CHECK(slot >= 0 && slot < num_slots_ && length >= 0);
  lengths_[slot] = length;
}

LayerState StatePool::layer(int32_t slot, int layer) { return static_cast<const StatePool*>(this)->layer(slot, layer); }

LayerState StatePool::layer(int32_t slot, int layer) const {
  LINSPEC_CHECK(slot >= 0 && slot < num_slots_ && layer >= 0 && layer < config_.num_layers);
  const int64_t d = config_.head_dim, ring = config_.num_kv_heads * d * config_.linear_attention.group_size;
  float* s = data_ + slot * floats_per_slot_ + layer * floats_per_layer_;
  float* ring_k = s + config_.num_kv_heads * d * d;
  return {.s = s, .ring_k = ring_k, .ring_v = ring_k + ring};
}

void StatePool::CopySlot(int32_t from, int32_t to) {
  LINSPEC_CHECK(from >= 0 && from < num_slots_ && to >= 1 && to < num_slots_);
  if (from == to) return;
  memory_->Copy(from * floats_per_slot_, to * floats_per_slot_, floats_per_slot_);
  lengths_[to] = lengths_[from];
}

}  // namespace linspec
