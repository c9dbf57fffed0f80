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
constexpr int64_t kLine = 64;  // bytes

int64_t PhysicalMemory() { return int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE); }

class HostMemory final : public StateMemory {
 public:
  explicit HostMemory(std::byte* data) : data_(data) {}
  ~HostMemory() override { std::free(data_); }
  std::byte* data() override { return data_; }
  void Zero(int64_t offset, int64_t size) override { std::memset(data_ + offset, 0, size); }
  void Copy(int64_t from, int64_t to, int64_t size) override { std::memcpy(data_ + to, data_ + from, size); }

 private:
  std::byte* const data_;
};

}  // namespace

StateSlot::StateSlot(StateSlot&& other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)), id_(std::exchange(other.id_, -1)) {}

StateSlot& StateSlot::operator=(StateSlot&& other) noexcept {
  if (this != &other) {
    Release();
    pool_ = std::exchange(other.pool_, nullptr);
    id_ = std::exchange(other.id_, -1);
  }
  return *this;
}

StateSlot::~StateSlot() { Release(); }

void StateSlot::Release() {
  if (pool_ != nullptr) std::exchange(pool_, nullptr)->Free(std::exchange(id_, -1));
}

// Overcommitting systems grant any size and kill the process later: compare with what the machine has.
absl::StatusOr<std::unique_ptr<StateMemory>> StatePool::AllocateOnHost(int64_t bytes) {
  if (bytes > PhysicalMemory()) {
    return absl::ResourceExhaustedError(
        fmt::format("{} bytes exceed this machine's memory of {}", bytes, PhysicalMemory()));
  }
  const int64_t whole_pages = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  auto* data = static_cast<std::byte*>(std::aligned_alloc(kHugePage, whole_pages));
  if (data == nullptr) return absl::ResourceExhaustedError(fmt::format("cannot allocate {} bytes", bytes));
  // A step streams whole states; small pages would miss the TLB on the way. A hint: without it that is all that
  // happens.
  madvise(data, whole_pages, MADV_HUGEPAGE);
  return std::make_unique<HostMemory>(data);
}

absl::StatusOr<std::unique_ptr<StatePool>> StatePool::Create(const ModelConfig& config, int num_slots, DType dtype,
                                                             const StateAllocator& allocate) {
  LINSPEC_CHECK(dtype == DType::kF32 || dtype == DType::kBF16);
  if (num_slots < 1)
    return absl::InvalidArgumentError(fmt::format("state pool of {} slots: expected 1 or more", num_slots));
  auto pool = std::unique_ptr<StatePool>(new StatePool());
  const int64_t bytes_of_layer = config.StateSizePerLayer() * static_cast<int64_t>(DTypeSize(dtype));
  pool->config_ = config;
  pool->dtype_ = dtype;
  pool->bytes_per_layer_ = (bytes_of_layer + kLine - 1) / kLine * kLine;
  pool->bytes_per_slot_ = pool->bytes_per_layer_ * config.num_layers;
  pool->num_slots_ = num_slots;

  const std::string what = fmt::format("state pool of {} slots of {} bytes", num_slots, pool->bytes_per_slot());
  int64_t bytes = 0;
  if (__builtin_mul_overflow(pool->bytes_per_slot(), int64_t{num_slots}, &bytes)) {
    return absl::ResourceExhaustedError(what + ": more than any memory");
  }
  absl::StatusOr<std::unique_ptr<StateMemory>> memory = allocate(bytes);
  if (!memory.ok()) {
    return absl::Status(memory.status().code(), fmt::format("{}: {}", what, std::string(memory.status().message())));
  }
  pool->memory_ = *std::move(memory);
  pool->data_ = pool->memory_->data();
  pool->lengths_.assign(pool->num_slots_, 0);
  for (int id = num_slots; id-- > 0;) pool->free_.push_back(id);
  return pool;
}

StateSlot StatePool::Acquire() {
  if (free_.empty()) return StateSlot();
  const int32_t id = free_.back();
  free_.pop_back();
  memory_->Zero(id * bytes_per_slot_, bytes_per_slot_);
  lengths_[id] = 0;
  return StateSlot(this, id);
}

void StatePool::Free(int32_t id) {
  LINSPEC_CHECK(id >= 0 && id < num_slots_);
  LINSPEC_CHECK(std::find(free_.begin(), free_.end(), id) == free_.end());
  free_.push_back(id);
}

int StatePool::capacity() const { return num_slots_; }
int StatePool::num_free() const { return static_cast<int>(free_.size()); }
int64_t StatePool::total_bytes() const { return bytes_per_slot_ * num_slots_; }

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
  const auto size = static_cast<int64_t>(DTypeSize(dtype_));
  const int64_t head = config_.num_kv_heads * config_.head_dim * size,
                ring = head * config_.linear_attention.group_size;
  std::byte* s = data_ + slot * bytes_per_slot_ + layer * bytes_per_layer_;
  std::byte* ring_k = s + head * config_.head_dim;
  return {.s = s, .ring_k = ring_k, .ring_v = ring_k + ring, .dtype = dtype_};
}

void StatePool::CopySlot(int32_t from, int32_t to) {
  LINSPEC_CHECK(from >= 0 && from < num_slots_ && to >= 0 && to < num_slots_);
  if (from == to) return;
  memory_->Copy(from * bytes_per_slot_, to * bytes_per_slot_, bytes_per_slot_);
  lengths_[to] = lengths_[from];
}

}  // namespace linspec
