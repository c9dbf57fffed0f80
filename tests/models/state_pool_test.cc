#include "models/state_pool.h"

#include <cstdint>
#include <utility>
#include <vector>

#include "tests/models/model_test_util.h"

namespace linspec {
namespace {

std::unique_ptr<StatePool> MakePool(int num_slots, DType dtype = DType::kF32) {
  auto pool = StatePool::Create(TinyConfig(), num_slots, dtype);
  EXPECT_TRUE(pool.ok());
  return *std::move(pool);
}

TEST(StatePoolTest, FreeAndHeldAddUpToCapacity) {
  const auto pool = MakePool(3);
  EXPECT_EQ(pool->capacity(), 3);
  std::vector<StateSlot> held;
  for (int i = 1; i <= 3; ++i) {
    held.push_back(pool->Acquire());
    ASSERT_TRUE(held.back().valid());
    EXPECT_EQ(pool->num_free() + i, pool->capacity());
    for (int other = 0; other + 1 < i; ++other) EXPECT_NE(held.back().id(), held[other].id());
  }
  EXPECT_FALSE(pool->Acquire().valid());
  EXPECT_LT(pool->Acquire().id(), 0) << "no slot";
  held.erase(held.begin());
  EXPECT_EQ(pool->num_free(), 1);
  EXPECT_TRUE(pool->Acquire().valid());
  held.clear();
  EXPECT_EQ(pool->num_free(), pool->capacity());
}

TEST(StatePoolTest, MovingHandsTheSlotOver) {
  const auto pool = MakePool(2);
  StateSlot a = pool->Acquire();
  const int32_t id = a.id();
  StateSlot b = std::move(a);
  EXPECT_FALSE(a.valid());
  EXPECT_EQ(b.id(), id);
  b = pool->Acquire();
  EXPECT_EQ(pool->num_free(), 1) << "the slot that b held before went back";
  StateSlot& self = b;
  b = std::move(self);
  EXPECT_TRUE(b.valid());
  b.Release();
  b.Release();
  EXPECT_EQ(pool->num_free(), 2);
}

TEST(StatePoolTest, ReusedSlotIsZero) {
  const ModelConfig config = TinyConfig();
  const auto pool = MakePool(1);
  int32_t id = 0;
  {
    StateSlot slot = pool->Acquire();
    id = slot.id();
    for (int i = 0; i < config.num_layers; ++i) {
      auto* s = static_cast<float*>(pool->layer(id, i).s);
      std::fill(s, s + config.StateSizePerLayer(), 7.0f);
    }
    pool->set_length(id, 99);
  }
  const StateSlot again = pool->Acquire();
  EXPECT_EQ(again.id(), id);
  EXPECT_EQ(pool->length(id), 0);
  for (const std::byte value : StateOf(*pool, id)) ASSERT_EQ(value, std::byte{0});
}

class StatePoolOfTest : public testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(All, StatePoolOfTest, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return DTypeName(info.param); });

TEST_P(StatePoolOfTest, LayersAreDisjointAndAligned) {
  const ModelConfig config = TinyConfig();
  const auto pool = MakePool(2, GetParam());
  EXPECT_EQ(pool->dtype(), GetParam());
  const StateSlot a = pool->Acquire(), b = pool->Acquire();
  std::vector<std::pair<std::byte*, std::byte*>> ranges;
  for (const int32_t id : {a.id(), b.id()}) {
    for (int i = 0; i < config.num_layers; ++i) {
      const LayerState state = pool->layer(id, i);
      EXPECT_EQ(state.dtype, GetParam());
      const auto size = static_cast<int64_t>(DTypeSize(GetParam()));
      const int64_t d = config.head_dim, heads = config.num_kv_heads, ring = heads * d * 8 * size;
      auto *s = static_cast<std::byte*>(state.s), *ring_v = static_cast<std::byte*>(state.ring_v);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(s) % 64, 0u);
      EXPECT_EQ(state.ring_k, s + heads * d * d * size);
      EXPECT_EQ(ring_v, static_cast<std::byte*>(state.ring_k) + ring);
      for (const auto& [begin, end] : ranges) EXPECT_TRUE(ring_v + ring <= begin || s >= end);
      ranges.emplace_back(s, ring_v + ring);
    }
  }
  EXPECT_EQ(pool->bytes_per_slot(), config.StateBytes(GetParam()));
  EXPECT_EQ(pool->bytes_per_slot(), pool->bytes_per_layer() * config.num_layers);
  EXPECT_EQ(pool->total_bytes(), 2 * pool->bytes_per_slot());
}

TEST(StatePoolTest, CopySlotCopiesStateAndLength) {
  const auto pool = MakePool(2);
  const StateSlot a = pool->Acquire(), b = pool->Acquire();
  const auto value = [&pool](const StateSlot& slot) -> float& {
    return static_cast<float*>(pool->layer(slot.id(), 1).ring_v)[3];
  };
  value(a) = 2.5f;
  pool->set_length(a.id(), 11);
  pool->CopySlot(a.id(), b.id());
  EXPECT_EQ(pool->length(b.id()), 11);
  EXPECT_EQ(StateOf(*pool, a.id()), StateOf(*pool, b.id()));
  value(a) = 0.0f;
  EXPECT_EQ(value(b), 2.5f);
}

TEST(StatePoolTest, CreateErrors) {
  ExpectError(StatePool::Create(TinyConfig(), 0).status(), absl::StatusCode::kInvalidArgument, "0 slots");
  ModelConfig huge = TinyConfig();
  huge.num_layers = 512;
  huge.num_kv_heads = 1024;
  huge.head_dim = 512;
  ExpectError(StatePool::Create(huge, 1 << 30).status(), absl::StatusCode::kResourceExhausted, "memory");
}

}  // namespace
}  // namespace linspec
