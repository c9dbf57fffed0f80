// Where a column of an int8 or fp8 matrix lies in its row on the device: within each 16 columns, word s of the four
// holds columns 2 s, 8 + 2 s, 2 s + 1, 8 + 2 s + 1. That is what lane s of four brings of 16 of k to a tensor-core
// instruction, its even and its odd bytes two pairs in order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace linspec::cuda {

__host__ __device__ constexpr int64_t StoredColumn(int64_t column) {
  const int64_t k = column % 16;
  return column - k + k % 8 / 2 * 4 + k % 2 * 2 + k / 8;
}
static_assert(StoredColumn(0) == 0 && StoredColumn(8) == 1 && StoredColumn(1) == 2 && StoredColumn(9) == 3);
static_assert(StoredColumn(16 + 6) == 16 + 12 && StoredColumn(16 + 15) == 16 + 15);

}  // namespace linspec::cuda
