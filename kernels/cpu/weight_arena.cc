#include "kernels/cpu/weight_arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

namespace linspec::cpu {
namespace {

constexpr int64_t kLine = 64, kHugePage = int64_t{2} << 20, kBlock = 8 * kHugePage;

int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

std::shared_ptr<uint8_t> WeightArena::Allocate(int64_t bytes) {
  bytes = RoundUp(bytes, kLine);
  if (used_ + bytes > size_) {
    size_ = std::max(kBlock, RoundUp(bytes, kHugePage));
    used_ = 0;
    constexpr std::align_val_t kAlignment{kHugePage};
    block_ = std::shared_ptr<uint8_t>(static_cast<uint8_t*>(::operator new(size_, kAlignment)),
                                      [](uint8_t* block) { ::operator delete(block, kAlignment); });
    madvise(block_.get(), size_, MADV_HUGEPAGE);  // a hint: where it is refused the weights are read more slowly
  }
  std::shared_ptr<uint8_t> piece(block_, block_.get() + used_);
  used_ += bytes;
  std::memset(piece.get(), 0, bytes);
  return piece;
}

}  // namespace linspec::cpu
