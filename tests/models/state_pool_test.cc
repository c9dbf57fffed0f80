#include "models/state_pool.h"

#include <cstdint>
#include <utility>
#include <vector>

#include "tests/models/model_test_util.h"

namespace linspec {
namespace {

std::unique_ptr<StatePool> MakePool(int num_slots) {
  auto pool = StatePool::Create(TinyConfig(), num_slots);
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
    EXPECT_NE(held.back().id(), 0) << "slot 0 is for padding";
    EXPECT_EQ(pool->num_free() + i, pool->capacity());
  }
  EXPECT_FALSE(pool->Acquire().valid());
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
      float* s = pool->layer(id, i).s;
      std::fill(s, s + config.StateFloatsPerLayer(), 7.0f);
    }
    pool->set_length(id, 99);
  }
  const StateSlot again = pool->Acquire();
  EXPECT_EQ(again.id(), id);
  EXPECT_EQ(pool->length(id), 0);
  for (const float value : StateOf(*pool, id, config)) ASSERT_EQ(value, 0.0f);
}

TEST(StatePoolTest, LayersAreDisjointAndAligned) {
  const ModelConfig config = TinyConfig();
  const auto pool = MakePool(2);
  const StateSlot a = pool->Acquire(), b = pool->Acquire();
  std::vector<std::pair<float*, float*>> ranges;
  for (const int32_t id : {a.id(), b.id()}) {
    for (int i = 0; i < config.num_layers; ++i) {
      const LayerState state = pool->layer(id, i);
      const int64_t d = config.head_dim, heads = config.num_kv_heads, ring = heads * d * 8;
      EXPECT_EQ(reinterpret_cast<uintptr_t>(state.s) % 64, 0u);
      EXPECT_EQ(state.ring_k, state.s + heads * d * d);
      EXPECT_EQ(state.ring_v, state.ring_k + ring);
      for (const auto& [begin, end] : ranges) EXPECT_TRUE(state.ring_v + ring <= begin || state.s >= end);
      ranges.emplace_back(state.s, state.ring_v + ring);
    }
  }
  EXPECT_EQ(pool->bytes_per_slot(), config.StateBytes());
  EXPECT_EQ(pool->total_bytes(), 3 * pool->bytes_per_slot());
}

TEST(StatePoolTest, CopySlotCopiesStateAndLength) {
  const auto pool = MakePool(2);
  const StateSlot a = pool->Acquire(), b = pool->Acquire();
  pool->layer(a.id(), 1).ring_v[3] = 2.5f;
  pool->set_length(a.id(), 11);
  pool->CopySlot(a.id(), b.id());
  EXPECT_EQ(pool->length(b.id()), 11);
  EXPECT_TRUE(SameBits(StateOf(*pool, a.id(), TinyConfig()), StateOf(*pool, b.id(), TinyConfig())));
  pool->layer(a.id(), 1).ring_v[3] = 0.0f;
  EXPECT_EQ(pool->layer(b.id(), 1).ring_v[3], 2.5f);
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
