// How a row finds its window. The arithmetic is in the tables; here are positions, ancestors and folds.
//
// A row at position p sees the positions max(0, min(group start of p, p - conv_kernel + 1)) .. p. Committed positions come
// from the ring, newer ones from the rows of the call; either way they enter the sum at the same place.
#include "kernels/cpu/cpu_attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/check.h"

namespace linspec::cpu {
namespace {

class KvHead {
 public:
  KvHead(const IsaTable& table, const AttentionLayer& layer, const LayerState& state, int64_t length, int64_t row_begin,
         const float* qkv, int kv_head)
      : table_(table), layer_(layer), length_(length), d_(layer.head_dim), group_(layer.group_size), kv_head_(kv_head) {
    stride_ = int64_t{layer.num_heads + 2 * layer.num_kv_heads} * d_;
    rows_ = qkv + row_begin * stride_;
    s_ = state.s + int64_t{kv_head} * d_ * d_;
    ring_k_ = state.ring_k + int64_t{kv_head} * group_ * d_;
    ring_v_ = state.ring_v + int64_t{kv_head} * group_ * d_;
    scratch_.resize(d_);
  }

  const float* RowK(int64_t row) const { return rows_ + row * stride_ + int64_t{layer_.num_heads + kv_head_} * d_; }
  const float* RowV(int64_t row) const { return RowK(row) + int64_t{layer_.num_kv_heads} * d_; }

  // Window of the row `path.back()`, whose ancestors from the root on are `path` (rows of this call).
  // s: the folded state at the row's group.
  template <typename Path>
  void Attend(const Path& path, int64_t path_length, const float* s, float* out) {
    const int64_t position = length_ + path_length - 1;
    const int64_t group_begin = position - position % group_;
    int64_t begin = layer_.local ? group_begin : position;
    begin = std::max<int64_t>(0, std::min(begin, position - layer_.conv_kernel + 1));
    const int window = static_cast<int>(position - begin + 1);
    for (int j = 0; j < window; ++j) {
      const int64_t p = begin + j;
      k_[j] = p < length_ ? ring_k_ + p % group_ * d_ : RowK(path(p - length_));
      v_[j] = p < length_ ? ring_v_ + p % group_ * d_ : RowV(path(p - length_));
    }
    const int64_t row = path(path_length - 1);
    const int heads_per_kv = layer_.num_heads / layer_.num_kv_heads;
    for (int h = kv_head_ * heads_per_kv; h < (kv_head_ + 1) * heads_per_kv; ++h) {
      // Before the first fold S is zero and RMSNorm(0) = 0: the branch contributes nothing, so it is skipped.
      const bool has_global = layer_.global != GlobalBranch::kNone && group_begin > 0;
      const bool rms_norm = layer_.global == GlobalBranch::kRmsNorm;
      table_.attention_row({.q = rows_ + row * stride_ + int64_t{h} * d_,
                            .out = out + row * layer_.num_heads * d_ + int64_t{h} * d_,
                            .k = k_,
                            .v = v_,
                            .window = window,
                            .local_begin = layer_.local ? static_cast<int>(group_begin - begin) : window,
                            .taps = layer_.conv_taps + int64_t{h} * layer_.conv_kernel,
                            .num_taps = layer_.conv_kernel,
                            .s = has_global ? s : nullptr,
                            .global_scale = rms_norm ? layer_.global_gain[h] : layer_.global_factor,
                            .rms_norm = rms_norm,
                            .eps = layer_.global_norm_eps,
                            .head_dim = d_,
                            .scratch = scratch_.data()});
    }
  }

  // target <- decay * target + K^T V over the group that ends at path position `path_length - 1`.
  template <typename Path>
  void Fold(const Path& path, int64_t path_length, float* target) {
    const int64_t end = length_ + path_length;
    for (int j = 0; j < group_; ++j) {
      const int64_t p = end - group_ + j;
      k_[j] = p < length_ ? ring_k_ + p % group_ * d_ : RowK(path(p - length_));
      v_[j] = p < length_ ? ring_v_ + p % group_ * d_ : RowV(path(p - length_));
    }
    table_.fold(target, layer_.decay != nullptr ? layer_.decay[kv_head_] : 1.0f, k_, v_, group_, d_);
  }

  bool EndsGroup(int64_t path_length) const { return (length_ + path_length) % group_ == 0; }

  void Append(int64_t position, int64_t row) {
    std::memcpy(ring_k_ + position % group_ * d_, RowK(row), d_ * sizeof(float));
    std::memcpy(ring_v_ + position % group_ * d_, RowV(row), d_ * sizeof(float));
  }

  float* s() { return s_; }
  int64_t state_floats() const { return int64_t{d_} * d_; }

 private:
  const IsaTable& table_;
  const AttentionLayer& layer_;
  const int64_t length_;
  const int d_, group_, kv_head_;
  int64_t stride_;
  const float* rows_;
  float *s_, *ring_k_, *ring_v_;
  std::vector<float> scratch_;
  const float* k_[kMaxWindow];
  const float* v_[kMaxWindow];
};

// Tree rows. states[i] is the folded state that row i reads; a row that completes a group owns a folded copy for its
// children, exactly what sequential decoding would have in the pool.
void VerifyTree(KvHead& head, const WindowRequest& request, float* out) {
  const int n = request.num_rows;
  std::vector<const float*> states(n);
  std::vector<std::vector<float>> folded(n);
  std::vector<int32_t> path;
  for (int i = 0; i < n; ++i) {
    path.clear();
    for (int node = i; node >= 0; node = request.parents[node]) path.push_back(node);
    std::reverse(path.begin(), path.end());
    const auto at = [&path](int64_t index) { return path[index]; };
    const int parent = request.parents[i];
    const float* inherited = parent < 0 ? head.s() : folded[parent].empty() ? states[parent] : folded[parent].data();
    states[i] = inherited;
    head.Attend(at, static_cast<int64_t>(path.size()), inherited, out);
    const bool has_child = std::find(request.parents + i + 1, request.parents + n, i) != request.parents + n;
    if (!has_child || !head.EndsGroup(static_cast<int64_t>(path.size()))) continue;
    folded[i].assign(inherited, inherited + head.state_floats());
    head.Fold(at, static_cast<int64_t>(path.size()), folded[i].data());
  }
}

void VerifyChain(KvHead& head, int num_rows, float* out) {
  const auto at = [](int64_t index) { return index; };
  std::vector<float> folded;
  const float* state = head.s();
  for (int i = 0; i < num_rows; ++i) {
    head.Attend(at, i + 1, state, out);
    if (i + 1 == num_rows || !head.EndsGroup(i + 1)) continue;
    if (folded.empty()) folded.assign(state, state + head.state_floats());
    head.Fold(at, i + 1, folded.data());
    state = folded.data();
  }
}

}  // namespace

void VerifyKvHead(const IsaTable& table, const AttentionLayer& layer, const WindowRequest& request, const float* qkv,
                  float* out, int kv_head) {
  KvHead head(table, layer, request.state, request.length, request.row_begin, qkv, kv_head);
  float* request_out = out + request.row_begin * layer.num_heads * layer.head_dim;
  if (request.parents == nullptr) {
    VerifyChain(head, request.num_rows, request_out);
  } else {
    VerifyTree(head, request, request_out);
  }
}

void CommitKvHead(const IsaTable& table, const AttentionLayer& layer, const CommitRequest& request, const float* qkv,
                  int kv_head) {
  KvHead head(table, layer, request.state, request.length, request.row_begin, qkv, kv_head);
  const auto at = [&request](int64_t index) { return request.path[index]; };
  for (int64_t i = 0; i < static_cast<int64_t>(request.path.size()); ++i) {
    head.Append(request.length + i, request.path[i]);
    if (head.EndsGroup(i + 1)) head.Fold(at, i + 1, head.s());
  }
}

void PrefillKvHead(const IsaTable& table, const AttentionLayer& layer, const WindowRequest& request, const float* qkv,
                   float* out, int kv_head) {
  LINSPEC_CHECK(request.parents == nullptr);
  KvHead head(table, layer, request.state, request.length, request.row_begin, qkv, kv_head);
  float* request_out = out + request.row_begin * layer.num_heads * layer.head_dim;
  const auto at = [](int64_t index) { return index; };
  // The ring is written last: until then rows of this call read older positions from it.
  for (int64_t i = 0; i < request.num_rows; ++i) {
    head.Attend(at, i + 1, head.s(), request_out);
    if (head.EndsGroup(i + 1)) head.Fold(at, i + 1, head.s());
  }
  const int64_t first = std::max<int64_t>(0, request.num_rows - layer.group_size);
  for (int64_t i = first; i < request.num_rows; ++i) head.Append(request.length + i, i);
}

}  // namespace linspec::cpu
