// The three entry points over window_attention.h, one block per (request, kv head).
//
// Floor at d = 128, G = 64 per (request, kv head), fp32: verify reads S 64 KB + ring 2 * 0.5 KB * (L % G, at least
// 31) +
// 1.5 KB a row, writes 0.5 KB a row; commit moves 1 KB a token twice, and 128 KB + 64 KB each time a group fills.
#pragma once

#include "kernels/cuda/window_attention.h"

namespace linspec::cuda {

LINSPEC_BLOCK float* HeadState(const AttentionParams& p, float* state, int kv_head) {
  return state + static_cast<int64_t>(kv_head) * p.layer.head_dim * p.layer.head_dim;
}

LINSPEC_BLOCK float* SlotState(const AttentionParams& p, const Task& task) { return p.states.Slot<float>(task.slot); }

LINSPEC_BLOCK void LoadState(const Grid& grid, int thread, const float* s, Fragment& fragment) {
  LINSPEC_UNROLL
  for (int r = 0; r < kFragmentRows; ++r) {
    if (grid.Owns(thread, r)) fragment.v[r] = Load4(s + grid.Row(thread, r) * grid.d + grid.Column(thread));
  }
}

LINSPEC_BLOCK void StoreState(const Grid& grid, int thread, float* s, const Fragment& fragment) {
  LINSPEC_UNROLL
  for (int r = 0; r < kFragmentRows; ++r) {
    if (grid.Owns(thread, r)) Store4(s + grid.Row(thread, r) * grid.d + grid.Column(thread), fragment.v[r]);
  }
}

// S <- g S + K^T V over a full ring, ascending position: slot order, because a group starts at slot 0.
LINSPEC_BLOCK void FoldRing(const Window& w, const Grid& grid, int thread, Fragment& s) {
  const float g = w.layer.decay != nullptr ? w.layer.decay[w.kv_head] : 1.0f;
  LINSPEC_UNROLL
  for (int r = 0; r < kFragmentRows; ++r) s.v[r] = {s.v[r].x * g, s.v[r].y * g, s.v[r].z * g, s.v[r].w * g};
  for (int token = 0; token < w.layer.group_size; ++token) {
    const Vec4 v = Load4(w.ring_v + token * grid.d + grid.Column(thread));
    LINSPEC_UNROLL
    for (int r = 0; r < kFragmentRows; ++r) {
      if (grid.Owns(thread, r)) Fma4(w.ring_k[token * grid.d + grid.Row(thread, r)], v, s.v[r]);
    }
  }
}

LINSPEC_BLOCK void AppendRow(const Window& w, int thread, int row, int slot) {
  const int d = w.layer.head_dim, columns = d / 4;
  if (thread >= 2 * columns) return;
  const bool key = thread < columns;
  const int c = thread % columns * 4;
  float* ring = const_cast<float*>(key ? w.ring_k : w.ring_v);
  Store4(ring + slot * d + c, Load4((key ? w.row_k : w.row_v) + row * w.kv_stride + c));
}

// Reads state, never writes it.
template <int kDim, typename Block>
LINSPEC_BLOCK void VerifyBlock(const Block& block, const AttentionParams& p, const Task& task, int kv_head,
                               AttentionShared& shared) {
  if (task.slot < 0) return;
  float* state = SlotState(p, task);
  Window w(p, task.length, task.row_begin, task.num_rows, p.ancestors == nullptr, state, kv_head);
  w.first_out -= task.out_shift;
  w.row_q -= task.out_shift * w.stride;
  if (p.last_rows > 0 && p.last_rows < task.num_rows) w.first_query = task.num_rows - p.last_rows;
  const Grid grid(kDim != 0 ? kDim : p.layer.head_dim);
  typename Block::template PerThread<Fragment> s;
  // Issued first and used last: S travels while the window is worked on.
  block.Phase([&](int t) {
    if (w.folded && w.layer.global != Global::kNone) LoadState(grid, t, HeadState(p, state, kv_head), s[t]);
  });
  Attend<kDim>(block, w, p, shared, s);
}

// Appends `count` rows (those of `path`, or the first) to the ring and folds S at each group that fills.
template <int kDim, typename Block>
LINSPEC_BLOCK void CommitRows(const Block& block, const AttentionParams& p, const Task& task, const int32_t* path,
                              int count, int kv_head) {
  float* state = SlotState(p, task);
  const Window w(p, task.length, task.row_begin, task.num_rows, true, state, kv_head);
  const Grid grid(kDim != 0 ? kDim : p.layer.head_dim);
  int slot = w.phase;
  for (int i = 0; i < count; ++i) {
    block.Phase([&](int t) { AppendRow(w, t, path != nullptr ? path[i] : i, slot); });
    if (++slot < w.layer.group_size) continue;
    slot = 0;
    block.Phase([&](int t) {
      Fragment s = {};
      if (w.folded || i >= w.layer.group_size) LoadState(grid, t, HeadState(p, state, kv_head), s);
      FoldRing(w, grid, t, s);
      StoreState(grid, t, HeadState(p, state, kv_head), s);
    });
  }
}

template <int kDim, typename Block>
LINSPEC_BLOCK void CommitBlock(const Block& block, const AttentionParams& p, const Task& task, int kv_head) {
  if (task.slot < 0 || task.path_length == 0) return;
  CommitRows<kDim>(block, p, task, p.paths + task.path_begin, task.path_length, kv_head);
}

// A chain of any length: pieces that end at group boundaries are attended as chains, appended and folded, with S in
// registers throughout.
template <int kDim, typename Block>
LINSPEC_BLOCK void PrefillBlock(const Block& block, const AttentionParams& p, const Task& task, int kv_head,
                                AttentionShared& shared) {
  if (task.slot < 0) return;
  float* state = SlotState(p, task);
  const Grid grid(kDim != 0 ? kDim : p.layer.head_dim);
  typename Block::template PerThread<Fragment> s;
  block.Phase([&](int t) {
    s[t] = {};
    if (task.length >= p.layer.group_size) LoadState(grid, t, HeadState(p, state, kv_head), s[t]);
  });
  bool changed = false;
  for (int done = 0, rows = 0; done < task.num_rows; done += rows) {
    const int64_t length = task.length + done;
    const int phase = static_cast<int>(length % p.layer.group_size);
    rows = p.layer.group_size - phase < kMaxNodes ? p.layer.group_size - phase : kMaxNodes;
    if (rows > task.num_rows - done) rows = task.num_rows - done;
    const Window w(p, length, task.row_begin + done, rows, true, state, kv_head);
    Attend<kDim>(block, w, p, shared, s);
    block.Phase([&](int t) {
      for (int row = 0; row < rows; ++row) AppendRow(w, t, row, phase + row);
    });
    if (phase + rows < p.layer.group_size) continue;
    changed = true;
    block.Phase([&](int t) { FoldRing(w, grid, t, s[t]); });
  }
  if (changed) {
    block.Phase([&](int t) { StoreState(grid, t, HeadState(p, state, kv_head), s[t]); });
  }
}

}  // namespace linspec::cuda
