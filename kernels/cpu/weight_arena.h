// Memory of packed weights: blocks on huge pages, handed out in pieces in the order in which a step reads them.
//
// A step streams all weights; on pages of 4 KiB that misses the TLB once in 64 cache lines.
// Ownership: a piece keeps its block alive. Threads: one at a time. Errors: std::bad_alloc, as for a std::vector.
#pragma once

#include <cstdint>
#include <memory>

namespace linspec::cpu {

class WeightArena {
 public:
  // bytes > 0 zeroed bytes, aligned to a cache line.
  std::shared_ptr<uint8_t> Allocate(int64_t bytes);

 private:
  std::shared_ptr<uint8_t> block_;  // the one that pieces come from
  int64_t size_ = 0, used_ = 0;     // of block_
};

}  // namespace linspec::cpu
