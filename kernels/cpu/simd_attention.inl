// The attention and fold of simd.inl, which includes this file and whose vector and loop helpers it uses.

template <typename T>
float* TileWeights(const AttentionTile<T>& tile, int row) {
  return tile.scratch + int64_t{row} * (kMaxWindow + tile.head_dim);
}
template <typename T>
float* TileGlobal(const AttentionTile<T>& tile, int row) {
  return TileWeights(tile, row) + kMaxWindow;
}

float SquaredRelu(float dot) {
  const float score = dot > 0.0f ? dot : 0.0f;
  return score * score;
}

// Local weights of rows [first_row, first_row + kRows) for the shared tokens from j on, as many as a tile of dots holds.
template <int kRows, int kKeys, typename T>
[[gnu::flatten]] void ScoreTile(const AttentionTile<T>& tile, int first_row, int j) {
  V acc[kRows * kKeys];
  Unroll<kRows * kKeys>([&](int i) { acc[i] = Zero(); });
  const int d = tile.head_dim;
  int c = 0;
  for (; c + kLanes <= d; c += kLanes) {
    V q[kRows];
    Unroll<kRows>([&](int r) { q[r] = Load(tile.rows[first_row + r].q + c); });
    Unroll<kKeys>([&](int key) {
      const V k = Load(tile.k[j + key] + c);
      Unroll<kRows>([&](int r) { acc[r * kKeys + key] = Fma(q[r], k, acc[r * kKeys + key]); });
    });
  }
  if (c < d) {
    Unroll<kKeys>([&](int key) {
      const V k = LoadPartial(tile.k[j + key] + c, d - c);
      Unroll<kRows>([&](int r) {
        acc[r * kKeys + key] = Fma(LoadPartial(tile.rows[first_row + r].q + c, d - c), k, acc[r * kKeys + key]);
      });
    });
  }
  alignas(64) float dots[kRows * kKeys];
  ReduceDots(acc, dots);
  Unroll<kRows>([&](int r) {
    float* weights = TileWeights(tile, first_row + r) + j;
    for (int key = 0; key < kKeys; ++key) weights[key] = SquaredRelu(dots[r * kKeys + key]);
  });
}

// Weights of all tokens of rows [first_row, first_row + kRows): shared ones at their index, own ones behind them.
template <int kRows, typename T>
void WindowWeights(const AttentionTile<T>& tile, int first_row) {
  constexpr int kKeys = kDotTile / kRows;
  int j = tile.local_begin;
  for (; j + kKeys <= tile.num_shared; j += kKeys) ScoreTile<kRows, kKeys>(tile, first_row, j);
  for (int r = first_row; r < first_row + kRows; ++r) {
    const QueryRow<T>& row = tile.rows[r];
    float* weights = TileWeights(tile, r);
    for (int i = row.first; i < tile.local_begin; ++i) weights[i] = 0;
    for (int i = j; i < tile.num_shared; ++i) weights[i] = SquaredRelu(DotProduct(row.q, tile.k[i], tile.head_dim));
    float* own = weights + tile.num_shared;
    for (int i = 0; i < row.num_own; ++i) {
      own[i] = i < row.own_local_begin ? 0.0f : SquaredRelu(DotProduct(row.q, row.own_k[i], tile.head_dim));
    }
    float* last = own + row.num_own - 1;
    const int seen = tile.num_shared - row.first + row.num_own;
    for (int lag = 0; lag < tile.num_taps && lag < seen; ++lag) last[-lag] += tile.taps[lag];
  }
}

// kChannels vectors from p on. Those of bf16 come in pairs that hold 32 channels as the words of memory do, even ones first
// and odd ones second, which takes an operation each instead of two; StoreChannels puts them in order again.
template <int kChannels>
inline void LoadChannels(const float* p, V (&out)[kChannels]) {
  Unroll<kChannels>([&](int t) { out[t] = Load(p + t * kLanes); });
}
template <int kChannels>
inline void LoadChannels(const uint16_t* p, V (&out)[kChannels]) {
  if constexpr (kChannels == 1) {
    out[0] = Load(p);
  } else {
    Unroll<kChannels / 2>([&](int t) { LoadPairs(p + t * 2 * kLanes, &out[2 * t], &out[2 * t + 1]); });
  }
}
template <typename T, int kChannels>
inline void StoreChannels(float* p, const V (&values)[kChannels]) {
  if constexpr (sizeof(T) == sizeof(float) || kChannels == 1) {
    Unroll<kChannels>([&](int t) { Store(p + t * kLanes, values[t]); });
  } else {
    Unroll<kChannels / 2>([&](int t) { StorePairs(p + t * 2 * kLanes, values[2 * t], values[2 * t + 1]); });
  }
}

// Channels [channel, channel + 16 kChannels), which stay in registers over the whole window and all of S.
template <int kRows, int kChannels, typename T>
[[gnu::flatten]] void WindowTile(const AttentionTile<T>& tile, int first_row, int64_t channel) {
  V acc[kRows][kChannels];
  Unroll<kRows>([&](int r) { Unroll<kChannels>([&](int t) { acc[r][t] = Zero(); }); });
  const float* weights[kRows];
  int all = 0;  // first token that every row sees
  Unroll<kRows>([&](int r) {
    weights[r] = TileWeights(tile, first_row + r);
    all = tile.rows[first_row + r].first > all ? tile.rows[first_row + r].first : all;
  });
  Unroll<kRows>([&](int r) {
    for (int j = tile.rows[first_row + r].first; j < all; ++j) {
      const V weight = Set1(weights[r][j]);
      V values[kChannels];
      LoadChannels(tile.v[j] + channel, values);
      Unroll<kChannels>([&](int t) { acc[r][t] = Fma(weight, values[t], acc[r][t]); });
    }
  });
  for (int j = all; j < tile.num_shared; ++j) {
    V values[kChannels];
    LoadChannels(tile.v[j] + channel, values);
    Unroll<kRows>([&](int r) {
      const V weight = Set1(weights[r][j]);
      Unroll<kChannels>([&](int t) { acc[r][t] = Fma(weight, values[t], acc[r][t]); });
    });
  }
  Unroll<kRows>([&](int r) {
    const QueryRow<T>& row = tile.rows[first_row + r];
    for (int j = 0; j < row.num_own; ++j) {
      const V weight = Set1(weights[r][tile.num_shared + j]);
      V values[kChannels];
      LoadChannels(row.own_v[j] + channel, values);
      Unroll<kChannels>([&](int t) { acc[r][t] = Fma(weight, values[t], acc[r][t]); });
    }
    StoreChannels<T>(row.out + channel, acc[r]);
  });
  if (tile.s == nullptr) return;
  Unroll<kRows>([&](int r) { Unroll<kChannels>([&](int t) { acc[r][t] = Zero(); }); });
  for (int i = 0; i < tile.head_dim; ++i) {
    V s[kChannels];
    LoadChannels(tile.s + int64_t{i} * tile.head_dim + channel, s);
    Unroll<kRows>([&](int r) {
      const V q = Set1(tile.rows[first_row + r].q[i]);
      Unroll<kChannels>([&](int t) { acc[r][t] = Fma(q, s[t], acc[r][t]); });
    });
  }
  Unroll<kRows>([&](int r) { StoreChannels<T>(TileGlobal(tile, first_row + r) + channel, acc[r]); });
}

template <typename T>
void WindowRest(const AttentionTile<T>& tile, int r, int64_t channel) {  // fewer than 16 channels
  const QueryRow<T>& row = tile.rows[r];
  const float* weights = TileWeights(tile, r);
  const int64_t lanes = tile.head_dim - channel;
  V acc = Zero();
  for (int j = row.first; j < tile.num_shared; ++j) {
    acc = Fma(Set1(weights[j]), LoadPartial(tile.v[j] + channel, lanes), acc);
  }
  for (int j = 0; j < row.num_own; ++j) {
    acc = Fma(Set1(weights[tile.num_shared + j]), LoadPartial(row.own_v[j] + channel, lanes), acc);
  }
  StorePartial(row.out + channel, acc, lanes);
  if (tile.s == nullptr) return;
  acc = Zero();
  for (int i = 0; i < tile.head_dim; ++i) {
    acc = Fma(Set1(row.q[i]), LoadPartial(tile.s + int64_t{i} * tile.head_dim + channel, lanes), acc);
  }
  StorePartial(TileGlobal(tile, r) + channel, acc, lanes);
}

template <typename T>
void AddGlobal(const AttentionTile<T>& tile, int r) {
  const int d = tile.head_dim;
  const float* global = TileGlobal(tile, r);
  float* out = tile.rows[r].out;
  float scale = tile.global_scale;
  if (tile.rms_norm) scale /= __builtin_sqrtf(DotProduct(global, global, d) / static_cast<float>(d) + tile.eps);
  ForLanes(d, [&](int64_t i, int64_t lanes) {
    StoreLanes(out + i, Fma(Set1(scale), LoadLanes(global + i, lanes), LoadLanes(out + i, lanes)), lanes);
  });
}

template <int kRows, typename T>
void AttendRows(const AttentionTile<T>& tile, int first_row) {
  constexpr int kChannels = kWindowTile / kRows < 4 ? kWindowTile / kRows : 4;
  WindowWeights<kRows>(tile, first_row);
  int64_t channel = 0;
  for (; channel + kChannels * kLanes <= tile.head_dim; channel += kChannels * kLanes) {
    WindowTile<kRows, kChannels>(tile, first_row, channel);
  }
  for (; channel + kLanes <= tile.head_dim; channel += kLanes) WindowTile<kRows, 1>(tile, first_row, channel);
  for (int r = first_row; r < first_row + kRows; ++r) {
    if (channel < tile.head_dim) WindowRest(tile, r, channel);
    if (tile.s != nullptr) AddGlobal(tile, r);
  }
}

template <typename T>
void ComputeAttentionTile(const AttentionTile<T>& tile) {
  int r = 0;
  for (; r + 4 <= tile.num_rows; r += 4) AttendRows<4>(tile, r);
  for (; r + 2 <= tile.num_rows; r += 2) AttendRows<2>(tile, r);
  for (; r < tile.num_rows; ++r) AttendRows<1>(tile, r);
}

void StoreSum(float* out, V sum, uint32_t, int64_t lanes) { StoreLanes(out, sum, lanes); }
void StoreSum(uint16_t* out, V sum, uint32_t rounding_key, int64_t lanes) {
  StoreStochastic(out, sum, rounding_key, lanes);
}

// k[j][i .. i + kRows) as floats in memory, from where a multiplication takes one in all lanes.
template <int kRows>
class FoldKeys {
 public:
  FoldKeys(const FoldParams<float>& p, int i) : k_(p.k), i_(i) {}
  const float* of(int j) const { return k_[j] + i_; }

 private:
  const float* const* k_;
  const int i_;
};
template <int kRows>
class WidenedFoldKeys {
 public:
  WidenedFoldKeys(const FoldParams<uint16_t>& p, int i) {
    for (int j = 0; j < p.num_tokens; ++j) StorePartial(values_[j], LoadPartial(p.k[j] + i, kRows), kRows);
  }
  const float* of(int j) const { return values_[j]; }

 private:
  float values_[kMaxWindow][kRows];
};
template <int kRows>
FoldKeys<kRows> KeysOf(const FoldParams<float>& p, int i) {
  return {p, i};
}
template <int kRows>
WidenedFoldKeys<kRows> KeysOf(const FoldParams<uint16_t>& p, int i) {
  return {p, i};
}

// s rows [i, i + kRows): they share each load of v and hide the latency of the additions.
template <int kRows, typename T>
[[gnu::flatten]] void FoldRows(const FoldParams<T>& p, int i) {
  const V decay = Set1(p.decay);
  const auto keys = KeysOf<kRows>(p, i);
  ForLanes(p.head_dim, [&](int64_t c, int64_t lanes) {
    const int64_t element = int64_t{i} * p.head_dim + c;
    V sums[kRows];
    Unroll<kRows>([&](int r) { sums[r] = Mul(LoadLanes(p.s + element + int64_t{r} * p.head_dim, lanes), decay); });
    for (int j = 0; j < p.num_tokens; ++j) {
      const V value = LoadLanes(p.v[j] + c, lanes);
      const float* key = keys.of(j);
      Unroll<kRows>([&](int r) { sums[r] = Fma(Set1(key[r]), value, sums[r]); });
    }
    Unroll<kRows>([&](int r) {
      const int64_t at = element + int64_t{r} * p.head_dim;
      StoreSum(p.s + at, sums[r], p.rounding_key + static_cast<uint32_t>(at), lanes);
    });
  });
}

template <typename T>
void Fold(const FoldParams<T>& p) {
  int i = 0;
  for (; i + kFoldRows <= p.head_dim; i += kFoldRows) FoldRows<kFoldRows>(p, i);
  for (; i < p.head_dim; ++i) FoldRows<1>(p, i);
}

void ToBFloat16(const float* x, uint16_t* out, int64_t n) {
  ForLanes(n, [&](int64_t i, int64_t lanes) { StoreNearest(out + i, LoadLanes(x + i, lanes), lanes); });
}
