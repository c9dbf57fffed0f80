// The sizes that steps are padded to, so that few CUDA graphs serve all of them. Plain C++: what prepares graphs before
// they are needed (models/cuda_warm_up.h) has to know them too.
#pragma once

#include <algorithm>

namespace linspec::cuda {

inline constexpr int kMaxGraphRows = 1024;  // larger steps are launched kernel by kernel: the gaps no longer matter

constexpr int PowerOfTwo(int at_least) {
  int power = 1;
  while (power < at_least) power *= 2;
  return power;
}

// Products cost the same for each 8, 16 and 32 rows; above, at most a third is padding.
constexpr int RowBucket(int rows) {
  const int power = PowerOfTwo(rows), between = power / 4 * 3;
  return rows > 32 && rows <= between ? between : power;
}

// Rows of the largest tree of a step, of which a block takes eight: more sizes would only make more graphs.
constexpr int TreeBucket(int rows) { return rows <= 1 ? 1 : std::max(PowerOfTwo(rows), 8); }

}  // namespace linspec::cuda
