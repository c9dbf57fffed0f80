// The rows that a product multiplies with: after RmsNorm and, for int8 weights, quantised.
//
// Few rows are prepared by every thread for itself: that takes no longer than one thread doing it while the others
// wait, needs no barrier, and leaves nothing that two processors share; taking back a line that another one has read
// costs tens of nanoseconds where they have no cache in common. Many rows are prepared once, all threads sharing the
// work. Private to kernels/. Threads: Begin by the caller of a loop, Get inside it.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/aligned_vector.h"
#include "kernels/cpu/isa_table.h"
#include "kernels/ops.h"
#include "kernels/thread_pool.h"

namespace linspec::cpu {

struct ProductInput {
  const float* rows;        // [num_rows, cols] for float weights
  QuantizedRows quantized;  // for int8 weights
};

class ProductInputs {
 public:
  // Both borrowed.
  ProductInputs(const IsaTable* table, ThreadPool* pool);

  // Starts a product; p's pointers are borrowed until the next call.
  void Begin(const MatmulParams& p);
  // The input as `thread` (of the pool) is to read it; valid until the next Begin.
  ProductInput Get(int thread);

 private:
  // Grown by the thread that fills it, so that its memory is near that thread.
  struct alignas(64) Rows {
    int64_t product = 0;  // the one that these rows belong to
    AlignedVector<uint8_t> quantized;
    AlignedVector<float> scales;
    AlignedVector<float> normed;  // [num_rows, cols]; of one row where it is quantised at once
  };
  bool int8() const { return p_.w->dtype() == DType::kI8; }
  int64_t stride() const { return (p_.w->cols() + 3) / 4 * 4; }
  void Reserve(Rows* rows);
  // Row m of p_.x into `to`; row_scratch: where a normalised row goes that is quantised at once.
  void PrepareRow(int64_t m, Rows* to, float* row_scratch);

  const IsaTable& table_;
  ThreadPool& pool_;
  MatmulParams p_{};
  int64_t product_ = 0;
  bool shared_ = false;
  Rows together_;
  std::vector<Rows> own_;  // [threads]
};

}  // namespace linspec::cpu
