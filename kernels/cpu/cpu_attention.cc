// How a row finds its window. The arithmetic is in the tables; here are positions, ancestors and folds.
//
// A row at position p sees the positions max(0, min(group start of p, p - conv_kernel + 1)) .. p. Committed positions
// come from the ring, newer ones from the rows of the call; either way they enter the sum at the same place. Rows of
// one group are computed in tiles that load what their windows share once.
#include "kernels/cpu/cpu_attention.h"

#include <algorithm>
#include <cstring>
#include <list>
#include <numeric>
#include <span>
#include <vector>

#include "kernels/check.h"
#include "kernels/state_rounding.h"

namespace linspec::cpu {
namespace {

// A row's ancestors in the call from the root on, itself last (indices inside the request).
using Path = std::span<const int32_t>;

// T: of the state, float or the bits of bf16. num_rows: how many rows of qkv from row_begin on may be read.
template <typename T>
class KvHead {
 public:
  KvHead(const IsaTable& table, const AttentionLayer& layer, const LayerState& state, int64_t length, int64_t row_begin,
         int64_t num_rows, const float* qkv, int kv_head, AttentionScratch* scratch)
      : table_(table),
        layer_(layer),
        length_(length),
        d_(layer.head_dim),
        group_(layer.group_size),
        kv_head_(kv_head),
        scratch_(*scratch) {
    stride_ = int64_t{layer.num_heads + 2 * layer.num_kv_heads} * d_;
    rows_ = qkv + row_begin * stride_;
    s_ = static_cast<T*>(state.s) + int64_t{kv_head} * d_ * d_;
    ring_k_ = static_cast<T*>(state.ring_k) + int64_t{kv_head} * group_ * d_;
    ring_v_ = static_cast<T*>(state.ring_v) + int64_t{kv_head} * group_ * d_;
    const size_t weights = kMaxQueryRows * (kMaxWindow + d_);
    if (scratch_.weights.size() < weights) scratch_.weights.resize(weights);
    if constexpr (kNarrow) NarrowRows(num_rows);
  }

  // Attention of the last rows of `paths`, 1 to kMaxQueryRows of one group. s: the folded state at that group.
  void Attend(std::span<const Path> paths, const T* s, float* out);

  // target <- decay * target + K^T V over the group that ends with the last row of path.
  void Fold(Path path, T* target) {
    const int64_t end = Position(path) + 1;
    Point(end - group_, end, path, 0);
    StateTableOf<T>(table_).fold(
        {.s = target,
         .decay = layer_.decay != nullptr ? layer_.decay[kv_head_] : 1.0f,
         .k = k_,
         .v = v_,
         .num_tokens = group_,
         .head_dim = d_,
         .rounding_key = RoundingKey(layer_.index, Group(path)) + static_cast<uint32_t>(kv_head_ * state_size())});
  }

  void Append(int64_t position, int64_t row) {
    std::memcpy(ring_k_ + position % group_ * d_, RowK(row), d_ * sizeof(T));
    std::memcpy(ring_v_ + position % group_ * d_, RowK(row) + v_offset(), d_ * sizeof(T));
  }

  int64_t Position(Path path) const { return length_ + static_cast<int64_t>(path.size()) - 1; }
  int64_t Group(Path path) const { return Position(path) / group_; }
  bool EndsGroup(Path path) const { return (Position(path) + 1) % group_ == 0; }
  T* s() { return s_; }
  int64_t state_size() const { return int64_t{d_} * d_; }

 private:
  static constexpr bool kNarrow = sizeof(T) < sizeof(float);

  const float* FloatK(int64_t row) const { return rows_ + row * stride_ + int64_t{layer_.num_heads + kv_head_} * d_; }
  int64_t FloatVOffset() const { return int64_t{layer_.num_kv_heads} * d_; }
  // k and v of the rows as the ring would hold them.
  void NarrowRows(int64_t num_rows) {
    const size_t size = num_rows * 2 * d_;
    if (scratch_.rows.size() < size) scratch_.rows.resize(size);
    for (int64_t row = 0; row < num_rows; ++row) {
      table_.to_bf16(FloatK(row), &scratch_.rows[row * 2 * d_], d_);
      table_.to_bf16(FloatK(row) + FloatVOffset(), &scratch_.rows[(row * 2 + 1) * d_], d_);
    }
  }
  const T* RowK(int64_t row) const {
    if constexpr (kNarrow)
      return scratch_.rows.data() + row * 2 * d_;
    else
      return FloatK(row);
  }
  int64_t v_offset() const { return kNarrow ? d_ : FloatVOffset(); }
  void CollectTokens(std::span<const Path> paths, AttentionTile<T>* tile);
  // Points k_ and v_ from index `at` on at the tokens of positions [first, end); returns the index behind them.
  int Point(int64_t first, int64_t end, Path path, int at) {
    int64_t slot = first % group_;  // divided once: the loop is short
    for (int64_t p = first; p < end; ++p, ++at) {
      if (p < length_) {
        k_[at] = ring_k_ + slot * d_;
        v_[at] = ring_v_ + slot * d_;
        slot = slot + 1 == group_ ? 0 : slot + 1;
      } else {
        k_[at] = RowK(path[p - length_]);
        v_[at] = k_[at] + v_offset();
      }
    }
    return at;
  }
  // First position that a row sees.
  int64_t WindowBegin(int64_t position) const {
    const int64_t local = layer_.local ? position - position % group_ : position;
    return std::max<int64_t>(0, std::min(local, position - layer_.conv_kernel + 1));
  }

  const IsaTable& table_;
  const AttentionLayer& layer_;
  const int64_t length_;
  const int d_, group_, kv_head_;
  int64_t stride_;
  const float* rows_;
  T *s_, *ring_k_, *ring_v_;
  // Tokens of a fold, or of a tile: the shared ones, then each row's own.
  const T* k_[kMaxWindow + kMaxQueryRows * kMaxWindow];
  const T* v_[kMaxWindow + kMaxQueryRows * kMaxWindow];
  AttentionScratch& scratch_;
};

// Shared tokens: what is committed and the ancestors that all rows have.
template <typename T>
void KvHead<T>::CollectTokens(std::span<const Path> paths, AttentionTile<T>* tile) {
  const int64_t group_begin = Group(paths[0]) * group_;
  int64_t begin = WindowBegin(Position(paths[0])), common = static_cast<int64_t>(paths[0].size());
  for (const Path& path : paths.subspan(1)) {
    begin = std::min(begin, WindowBegin(Position(path)));
    const auto first = paths[0].begin();
    common = std::mismatch(first, first + common, path.begin(), path.end()).first - first;
  }
  const int64_t shared_end = std::max(begin, length_ + common);
  const auto local_begin = [&](int64_t first, int64_t end) {  // of tokens [first, end)
    return static_cast<int>((layer_.local ? std::clamp(group_begin, first, end) : end) - first);
  };
  tile->k = k_;
  tile->v = v_;
  tile->num_shared = static_cast<int>(shared_end - begin);
  tile->local_begin = local_begin(begin, shared_end);
  int used = Point(begin, shared_end, paths[0], 0);
  for (size_t r = 0; r < paths.size(); ++r) {
    const int64_t end = Position(paths[r]) + 1, window_begin = WindowBegin(end - 1);
    const int64_t own_begin = std::max(window_begin, shared_end);
    QueryRow<T>& row = tile->rows[r];
    row.first = static_cast<int>(std::min(window_begin, shared_end) - begin);
    row.num_own = static_cast<int>(end - own_begin);
    row.own_local_begin = local_begin(own_begin, end);
    row.own_k = k_ + used;
    row.own_v = v_ + used;
    used = Point(own_begin, end, paths[r], used);
  }
}

template <typename T>
void KvHead<T>::Attend(std::span<const Path> paths, const T* s, float* out) {
  const bool rms_norm = layer_.global == GlobalBranch::kRmsNorm;
  AttentionTile<T> tile{};
  tile.num_rows = static_cast<int>(paths.size());
  CollectTokens(paths, &tile);
  tile.num_taps = layer_.conv_kernel;
  // Before the first fold S is zero and RMSNorm(0) = 0: the branch contributes nothing, so it is skipped.
  tile.s = layer_.global != GlobalBranch::kNone && Group(paths[0]) > 0 ? s : nullptr;
  tile.rms_norm = rms_norm;
  tile.eps = layer_.global_norm_eps;
  tile.head_dim = d_;
  tile.scratch = scratch_.weights.data();
  const int heads_per_kv = layer_.num_heads / layer_.num_kv_heads;
  for (int h = kv_head_ * heads_per_kv; h < (kv_head_ + 1) * heads_per_kv; ++h) {
    for (size_t r = 0; r < paths.size(); ++r) {
      const int64_t row = paths[r].back();
      tile.rows[r].q = rows_ + row * stride_ + int64_t{h} * d_;
      tile.rows[r].out = out + row * layer_.num_heads * d_ + int64_t{h} * d_;
    }
    tile.taps = layer_.conv_taps + int64_t{h} * layer_.conv_kernel;
    tile.global_scale = rms_norm ? layer_.global_gain[h] : layer_.global_factor;
    StateTableOf<T>(table_).attention_tile(tile);
  }
}

// Attends to paths[begin, end) in tiles; all lie in one group.
template <typename T>
void AttendAll(KvHead<T>& head, std::span<const Path> paths, const T* s, float* out) {
  for (size_t i = 0; i < paths.size(); i += kMaxQueryRows) {
    head.Attend(paths.subspan(i, std::min<size_t>(kMaxQueryRows, paths.size() - i)), s, out);
  }
}

// Paths of a request's rows, in scratch->paths: of a chain prefixes of one list, of a tree a list each.
void FindPaths(const WindowRequest& request, AttentionScratch* scratch) {
  const int n = request.num_rows;
  std::vector<int32_t>& nodes = scratch->nodes;
  std::vector<Path>& paths = scratch->paths;
  paths.resize(n);
  if (request.parents == nullptr) {
    nodes.resize(n);
    std::iota(nodes.begin(), nodes.end(), 0);
    for (int i = 0; i < n; ++i) paths[i] = Path(nodes).first(i + 1);
    return;
  }
  nodes.clear();
  nodes.reserve(int64_t{n} * (n + 1) / 2);  // a path holds smaller indices and itself: spans stay valid
  for (int i = 0; i < n; ++i) {
    const int parent = request.parents[i];
    LINSPEC_CHECK(parent < i);
    const size_t begin = nodes.size();
    for (int j = 0; parent >= 0 && j < static_cast<int>(paths[parent].size()); ++j) nodes.push_back(paths[parent][j]);
    nodes.push_back(i);
    paths[i] = Path(nodes).subspan(begin);
  }
}

// A row that completes a group owns a folded copy for its children, exactly what sequential decoding would have in the
// pool.
template <typename T>
void Verify(const IsaTable& table, const AttentionLayer& layer, const WindowRequest& request, const float* qkv,
            float* out, int kv_head, AttentionScratch* scratch) {
  const int n = request.num_rows;
  KvHead<T> head(table, layer, request.state, request.length, request.row_begin, n, qkv, kv_head, scratch);
  float* request_out = out + request.row_begin * layer.num_heads * layer.head_dim;
  FindPaths(request, scratch);
  const std::span<const Path> paths = scratch->paths;
  const auto parent = [&request](int row) { return request.parents == nullptr ? row - 1 : request.parents[row]; };

  std::vector<const void*>& states = scratch->states;          // the folded state that the row reads
  std::vector<const void*>& after = scratch->children_states;  // the one its children read, where that differs
  states.assign(n, head.s());
  after.assign(n, nullptr);
  std::list<std::vector<T>> folded;
  for (int i = 0; i < n; ++i) {
    if (parent(i) >= 0) states[i] = after[parent(i)] != nullptr ? after[parent(i)] : states[parent(i)];
    if (!head.EndsGroup(paths[i])) continue;
    bool has_child = false;
    for (int child = i + 1; child < n && !has_child; ++child) has_child = parent(child) == i;
    if (!has_child) continue;
    const T* s = static_cast<const T*>(states[i]);
    std::vector<T>& copy = folded.emplace_back(s, s + head.state_size());
    head.Fold(paths[i], copy.data());
    after[i] = copy.data();
  }
  for (int begin = 0; begin < n;) {  // rows that read the same state lie in the same group
    int end = begin + 1;
    while (end < n && states[end] == states[begin] && head.Group(paths[end]) == head.Group(paths[begin])) ++end;
    AttendAll(head, paths.subspan(begin, end - begin), static_cast<const T*>(states[begin]), request_out);
    begin = end;
  }
}

template <typename T>
void Commit(const IsaTable& table, const AttentionLayer& layer, const CommitRequest& request, const float* qkv,
            int kv_head, AttentionScratch* scratch) {
  if (request.path.empty()) return;
  const int64_t num_rows = request.path.back() + 1;  // ancestors come first
  KvHead<T> head(table, layer, request.state, request.length, request.row_begin, num_rows, qkv, kv_head, scratch);
  for (size_t i = 0; i < request.path.size(); ++i) {
    head.Append(request.length + static_cast<int64_t>(i), request.path[i]);
    const Path path = request.path.first(i + 1);
    if (head.EndsGroup(path)) head.Fold(path, head.s());
  }
}

template <typename T>
void Prefill(const IsaTable& table, const AttentionLayer& layer, const WindowRequest& request, const float* qkv,
             float* out, int kv_head, AttentionScratch* scratch) {
  LINSPEC_CHECK(request.parents == nullptr);
  const int num_rows = request.num_rows;
  KvHead<T> head(table, layer, request.state, request.length, request.row_begin, num_rows, qkv, kv_head, scratch);
  float* request_out = out + request.row_begin * layer.num_heads * layer.head_dim;
  FindPaths(request, scratch);
  const std::span<const Path> paths = scratch->paths;
  // The ring is written last: until then rows of this call read older positions from it.
  for (int begin = 0; begin < num_rows;) {
    int end = begin + 1;
    while (end < num_rows && !head.EndsGroup(paths[end - 1])) ++end;
    AttendAll(head, paths.subspan(begin, end - begin), static_cast<const T*>(head.s()), request_out);
    if (head.EndsGroup(paths[end - 1])) head.Fold(paths[end - 1], head.s());
    begin = end;
  }
  const int first = std::max(0, num_rows - layer.group_size);
  for (int i = first; i < num_rows; ++i) head.Append(request.length + i, i);
}

bool IsNarrow(const LayerState& state) {
  LINSPEC_CHECK(state.dtype == DType::kF32 || state.dtype == DType::kBF16);
  return state.dtype == DType::kBF16;
}

}  // namespace

void VerifyKvHead(const IsaTable& table, const AttentionLayer& layer, const WindowRequest& request, const float* qkv,
                  float* out, int kv_head, AttentionScratch* scratch) {
  const auto verify = IsNarrow(request.state) ? Verify<uint16_t> : Verify<float>;
  verify(table, layer, request, qkv, out, kv_head, scratch);
}

void CommitKvHead(const IsaTable& table, const AttentionLayer& layer, const CommitRequest& request, const float* qkv,
                  int kv_head, AttentionScratch* scratch) {
  const auto commit = IsNarrow(request.state) ? Commit<uint16_t> : Commit<float>;
  commit(table, layer, request, qkv, kv_head, scratch);
}

void PrefillKvHead(const IsaTable& table, const AttentionLayer& layer, const WindowRequest& request, const float* qkv,
                   float* out, int kv_head, AttentionScratch* scratch) {
  const auto prefill = IsNarrow(request.state) ? Prefill<uint16_t> : Prefill<float>;
  prefill(table, layer, request, qkv, out, kv_head, scratch);
}

void PrefetchKvHead(const AttentionLayer& layer, const WindowRequest& request, int kv_head) {
  const int64_t size = IsNarrow(request.state) ? 2 : 4;
  const int64_t d = layer.head_dim, group = layer.group_size, phase = request.length % group;
  const auto prefetch = [size](const void* of, int64_t first, int64_t count) {  // elements
    const char* begin = static_cast<const char*>(of) + first * size;
    for (int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(begin + i, 0, 2);
  };
  if (layer.global != GlobalBranch::kNone && request.length >= group) {
    prefetch(request.state.s, kv_head * d * d, d * d);
  }
  const int64_t ring = kv_head * group * d;
  if (layer.local) prefetch(request.state.ring_k, ring, phase * d);
  prefetch(request.state.ring_v, ring, phase * d);
  if (request.length <= phase) return;
  const int64_t reach = std::clamp<int64_t>(layer.conv_kernel - 1 - phase, 0, group - phase);
  prefetch(request.state.ring_v, ring + (group - reach) * d, reach * d);  // values of the group before
}

}  // namespace linspec::cpu
