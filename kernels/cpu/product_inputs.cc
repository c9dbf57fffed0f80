#include "kernels/cpu/product_inputs.h"

namespace linspec::cpu {
namespace {

constexpr int64_t kSharedFrom = 16384;  // values: below it, waking the pool costs more than it saves

template <typename T>
void GrowTo(AlignedVector<T>& values, int64_t size) {
  if (static_cast<int64_t>(values.size()) < size) values.resize(size);
}

}  // namespace

ProductInputs::ProductInputs(const IsaTable* table, ThreadPool* pool)
    : table_(*table), pool_(*pool), own_(pool->num_threads()) {}

void ProductInputs::Reserve(Rows* rows) {
  if (int8()) {
    GrowTo(rows->quantized, p_.num_rows * stride());
    GrowTo(rows->scales, p_.num_rows);
  }
  if (p_.norm_weight != nullptr) GrowTo(rows->normed, (int8() ? 1 : p_.num_rows) * p_.w->cols());
}

void ProductInputs::PrepareRow(int64_t m, Rows* to, float* row_scratch) {
  const int64_t cols = p_.w->cols();
  const float* row = p_.x + m * cols;
  if (p_.norm_weight != nullptr) {
    float* normed = int8() ? row_scratch : to->normed.data() + m * cols;
    table_.rms_norm(row, p_.norm_weight, normed, cols, p_.norm_eps);
    row = normed;
  }
  if (int8()) table_.quantize_row(row, cols, stride(), to->quantized.data() + m * stride(), &to->scales[m]);
}

void ProductInputs::Begin(const MatmulParams& p) {
  p_ = p;
  ++product_;
  shared_ = p.num_rows * p.w->cols() >= kSharedFrom;
  if (!shared_ || (!int8() && p.norm_weight == nullptr)) return;
  Reserve(&together_);
  pool_.ParallelForThreads(p.num_rows, 1, [this](int thread, int64_t begin, int64_t end) {
    if (int8()) GrowTo(own_[thread].normed, p_.w->cols());
    for (int64_t m = begin; m < end; ++m) PrepareRow(m, &together_, own_[thread].normed.data());
  });
}

ProductInput ProductInputs::Get(int thread) {
  Rows& rows = shared_ ? together_ : own_[thread];
  if (!shared_ && rows.product != product_) {
    Reserve(&rows);
    for (int64_t m = 0; m < p_.num_rows; ++m) PrepareRow(m, &rows, rows.normed.data());
    rows.product = product_;
  }
  return {.rows = p_.norm_weight != nullptr ? rows.normed.data() : p_.x,
          .quantized = {rows.quantized.data(), rows.scales.data(), stride()}};
}

}  // namespace linspec::cpu
