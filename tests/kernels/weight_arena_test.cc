#include "kernels/cpu/weight_arena.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace linspec::cpu {
namespace {

TEST(WeightArenaTest, PiecesAreAlignedZeroedAndApart) {
  WeightArena arena;
  std::vector<std::shared_ptr<uint8_t>> pieces;
  const std::vector<int64_t> sizes = {1, 63, 64, 65, 1000, int64_t{20} << 20, int64_t{10} << 20, int64_t{10} << 20, 7};
  for (const int64_t size : sizes) {
    const std::shared_ptr<uint8_t> piece = arena.Allocate(size);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(piece.get()) % 64, 0u) << size;
    EXPECT_EQ(std::count(piece.get(), piece.get() + size, 0), size);
    std::memset(piece.get(), static_cast<int>(pieces.size()) + 1, size);
    pieces.push_back(piece);
  }
  for (size_t i = 0; i < sizes.size(); ++i) {
    EXPECT_EQ(std::count(pieces[i].get(), pieces[i].get() + sizes[i], i + 1), sizes[i]) << i;
  }
}

TEST(WeightArenaTest, APieceOutlivesItsArena) {
  std::shared_ptr<uint8_t> piece;
  {
    WeightArena arena;
    piece = arena.Allocate(100);
    arena.Allocate(int64_t{64} << 20);  // another block
  }
  piece.get()[99] = 5;
  EXPECT_EQ(piece.get()[99], 5);
}

}  // namespace
}  // namespace linspec::cpu
