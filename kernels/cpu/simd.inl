// The fast tables, written once over a vector V of 16 floats. Included by table_avx2.cc and table_avx512.cc inside their
// anonymous namespace, after they define V and its operations, so that no symbol compiled for one instruction set can be
// picked by the linker for another. For the same reason nothing here calls a standard library template.
//
// Needs: V, I (16 int32), Zero, Set1, Load and LoadPartial (of floats and of bf16), Store, StorePartial, Add, Sub, Mul,
// Div, Fma, Min, Max, Neg, ReduceAdd (the 16-lane tree of scalar.cc), ReduceMax, Abs, ScaleByExponent, for bf16
// LoadPairs, StorePairs, StoreNearest and StoreStochastic, and for int8 StoreQuantized, InitAcc, DotStep, ToFloat.
// Register tiles: kFloatRows x kFloatBlocks, kIntRows x kIntBlocks and for few rows kWideIntRows x kWideIntBlocks,
// kDotTile dots (reduced by ReduceDots), kWindowTile vectors of several rows of attention, kFoldRows rows of S.

// body(0) .. body(kCount - 1), written out. A tile stays in registers only if its indices are constants before the
// compiler splits arrays into scalars; loops that it unrolls later (-O3, #pragma unroll) leave the accumulators on the
// stack, 10 times slower. For the same reason the tile functions are [[gnu::flatten]]: every lambda is inlined early.
template <int kCount, int kIndex = 0, typename Body>
inline void Unroll(const Body& body) {
  if constexpr (kIndex < kCount) {
    body(kIndex);
    Unroll<kCount, kIndex + 1>(body);
  }
}

template <typename T>
float DotProduct(const float* a, const T* b, int64_t n) {
  V sum = Zero();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = Fma(Load(a + i), Load(b + i), sum);
  if (i < n) sum = Fma(LoadPartial(a + i, n - i), LoadPartial(b + i, n - i), sum);
  return ReduceAdd(sum);
}

V ExpV(V x) {  // see scalar.cc
  x = Min(Max(x, Set1(-87.0f)), Set1(88.0f));
  const V shifted = Fma(x, Set1(1.44269504f), Set1(12582912.0f));
  const V n = Sub(shifted, Set1(12582912.0f));
  V r = Fma(n, Set1(-0.693359375f), x);
  r = Fma(n, Set1(2.12194440e-4f), r);
  V p = Set1(1.9875691500e-4f);
  p = Fma(p, r, Set1(1.3981999507e-3f));
  p = Fma(p, r, Set1(8.3334519073e-3f));
  p = Fma(p, r, Set1(4.1665795894e-2f));
  p = Fma(p, r, Set1(1.6666665459e-1f));
  p = Fma(p, r, Set1(5.0000001201e-1f));
  return ScaleByExponent(Add(Fma(Mul(p, r), r, r), Set1(1.0f)), shifted);
}

void StoreOut(float* out, V value, int64_t lanes, bool accumulate) {
  if (lanes >= kLanes) {
    Store(out, accumulate ? Add(Load(out), value) : value);
  } else {
    StorePartial(out, accumulate ? Add(LoadPartial(out, lanes), value) : value, lanes);
  }
}

// Out of line, so that its branches do not cost the tile loops registers.
[[gnu::noinline]] void StoreTile(const float* tile, int rows, int blocks, float* y, int64_t stride, int64_t lanes,
                                 bool accumulate) {
  for (int r = 0; r < rows; ++r) {
    for (int b = 0; b < blocks; ++b, tile += kLanes) {
      StoreOut(y + r * stride + b * kLanes, Load(tile), lanes - b * kLanes, accumulate);
    }
  }
}

template <typename T, int kRows, int kBlocks>
[[gnu::flatten]] void FloatTile(const PackedMatrix& w, const float* x, float* y, int64_t m, int64_t block,
                                bool accumulate) {
  V acc[kRows][kBlocks];
  Unroll<kRows>([&](int r) { Unroll<kBlocks>([&](int b) { acc[r][b] = Zero(); }); });
  const T* data = static_cast<const T*>(w.data) + block * w.cols * kLanes;
  for (int64_t k = 0; k < w.cols; ++k) {
    V weights[kBlocks];
    Unroll<kBlocks>([&](int b) { weights[b] = Load(data + (b * w.cols + k) * kLanes); });
    Unroll<kRows>([&](int r) {
      const V value = Set1(x[(m + r) * w.cols + k]);
      Unroll<kBlocks>([&](int b) { acc[r][b] = Fma(value, weights[b], acc[r][b]); });
    });
  }
  alignas(64) float tile[kRows][kBlocks][kLanes];
  Unroll<kRows>([&](int r) { Unroll<kBlocks>([&](int b) { Store(tile[r][b], acc[r][b]); }); });
  const int64_t n = block * kLanes;
  StoreTile(tile[0][0], kRows, kBlocks, y + m * w.rows + n, w.rows, w.rows - n, accumulate);
}

template <typename T, int kBlocks>
void FloatRows(const PackedMatrix& w, const float* x, float* y, int64_t num_rows, int64_t block, bool accumulate) {
  int64_t m = 0;
  for (; m + kFloatRows <= num_rows; m += kFloatRows) FloatTile<T, kFloatRows, kBlocks>(w, x, y, m, block, accumulate);
  for (; m < num_rows; ++m) FloatTile<T, 1, kBlocks>(w, x, y, m, block, accumulate);
}

template <typename T>
void MatmulFloat(const PackedMatrix& w, const float* x, float* y, int64_t num_rows, int64_t block_begin,
                 int64_t block_end, bool accumulate) {
  int64_t block = block_begin;
  for (; block + kFloatBlocks <= block_end; block += kFloatBlocks) {
    FloatRows<T, kFloatBlocks>(w, x, y, num_rows, block, accumulate);
  }
  for (; block < block_end; ++block) FloatRows<T, 1>(w, x, y, num_rows, block, accumulate);
}

// Out of line like StoreTile: int32 dots to floats.
[[gnu::noinline]] void StoreIntTile(const I* tile, int rows, int blocks, const float* row_scales, const float* scales,
                                    float* y, int64_t stride, int64_t lanes, bool accumulate) {
  for (int r = 0; r < rows; ++r) {
    const V row_scale = Set1(row_scales[r]);
    for (int b = 0; b < blocks; ++b, ++tile) {
      const V value = Mul(Mul(ToFloat(*tile), row_scale), Load(scales + b * kLanes));
      StoreOut(y + r * stride + b * kLanes, value, lanes - b * kLanes, accumulate);
    }
  }
}

// kFirst: the weights come from memory, so each step asks for the line of the next tile at the same place. Processors
// follow the streams on their own, but stop at the end of each page and then wait.
template <int kRows, int kBlocks, bool kFirst>
[[gnu::flatten]] void IntTile(const PackedMatrix& w, const QuantizedRows& x, float* y, int64_t m, int64_t block,
                              bool accumulate) {
  I acc[kRows][kBlocks];
  Unroll<kRows>(
      [&](int r) { Unroll<kBlocks>([&](int b) { acc[r][b] = InitAcc(w.row_sums + (block + b) * kLanes); }); });
  const int8_t* data = static_cast<const int8_t*>(w.data) + block * x.stride * kLanes;
  const int64_t block_bytes = x.stride * kLanes;
  for (int64_t k = 0; k < x.stride; k += 4) {
    IntWeights weights[kBlocks];
    Unroll<kBlocks>([&](int b) {
      const int8_t* line = data + b * block_bytes + k * kLanes;
      weights[b] = LoadIntWeights(line);
      if constexpr (kFirst) __builtin_prefetch(line + kBlocks * block_bytes, 0, 2);
    });
    Unroll<kRows>([&](int r) {
      const IntInput value = BroadcastInput(x, (m + r) * x.stride + k);
      Unroll<kBlocks>([&](int b) { acc[r][b] = DotStep(acc[r][b], value, weights[b]); });
    });
  }
  const int64_t n = block * kLanes;
  StoreIntTile(acc[0], kRows, kBlocks, x.scales + m, w.scales + n, y + m * w.rows + n, w.rows, w.rows - n, accumulate);
}

// The tile of `rows` <= kRows rows.
template <int kRows, int kBlocks>
void IntTileOf(int64_t rows, const PackedMatrix& w, const QuantizedRows& x, float* y, int64_t m, int64_t block,
               bool accumulate) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return IntTileOf<kRows - 1, kBlocks>(rows, w, x, y, m, block, accumulate);
  }
  const auto tile = m == 0 ? IntTile<kRows, kBlocks, true> : IntTile<kRows, kBlocks, false>;
  tile(w, x, y, m, block, accumulate);
}

// All rows over blocks [block, block_end), kBlocks at a time; returns the first block not done. Rows are cut into tiles
// of nearly equal height: a tile of one or two rows leaves most of the multipliers idle.
template <int kRows, int kBlocks>
int64_t IntBlocks(const PackedMatrix& w, const QuantizedRows& x, float* y, int64_t num_rows, int64_t block,
                  int64_t block_end, bool accumulate) {
  const int64_t tiles = (num_rows + kRows - 1) / kRows;
  for (; block + kBlocks <= block_end; block += kBlocks) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = num_rows * t / tiles, end = num_rows * (t + 1) / tiles;
      IntTileOf<kRows, kBlocks>(end - m, w, x, y, m, block, accumulate);
    }
  }
  return block;
}

void MatmulI8(const PackedMatrix& w, const QuantizedRows& x, float* y, int64_t num_rows, int64_t block_begin,
              int64_t block_end, bool accumulate) {
  int64_t block = block_begin;
  if (num_rows <= kWideIntRows) {
    block = IntBlocks<kWideIntRows, kWideIntBlocks>(w, x, y, num_rows, block, block_end, accumulate);
  } else {
    block = IntBlocks<kIntRows, kIntBlocks>(w, x, y, num_rows, block, block_end, accumulate);
  }
  IntBlocks<kIntRows, 1>(w, x, y, num_rows, block, block_end, accumulate);
}

void QuantizeRow(const float* x, int64_t cols, int64_t padded_cols, uint8_t* out, float* scale) {
  V largest = Zero();
  int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes) largest = Max(Abs(Load(x + i)), largest);
  if (i < cols) largest = Max(Abs(LoadPartial(x + i, cols - i)), largest);
  const float max_abs = ReduceMax(largest);
  *scale = max_abs / 127.0f;
  const V inverse = Set1(max_abs > 0 ? 127.0f / max_abs : 0.0f);
  for (i = 0; i + kLanes <= cols; i += kLanes) StoreQuantized(Mul(Load(x + i), inverse), out + i);
  if (i == padded_cols) return;
  uint8_t rest[kLanes];
  StoreQuantized(Mul(LoadPartial(x + i, cols - i), inverse), rest);  // zeros behind the last column
  for (int64_t j = i; j < padded_cols; ++j) out[j] = rest[j - i];
}

template <typename Body>
void ForLanes(int64_t n, Body body) {  // body(offset, lanes): whole vectors, then the rest
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, int64_t{kLanes});
  if (i < n) body(i, n - i);
}

template <typename T>
V LoadLanes(const T* p, int64_t lanes) {
  return lanes == kLanes ? Load(p) : LoadPartial(p, lanes);
}
void StoreLanes(float* p, V v, int64_t lanes) { lanes == kLanes ? Store(p, v) : StorePartial(p, v, lanes); }

void RmsNorm(const float* x, const float* weight, float* out, int64_t dim, float eps) {
  const V scale = Set1(1.0f / __builtin_sqrtf(DotProduct(x, x, dim) / static_cast<float>(dim) + eps));
  ForLanes(dim, [&](int64_t i, int64_t lanes) {
    StoreLanes(out + i, Mul(Mul(LoadLanes(x + i, lanes), scale), LoadLanes(weight + i, lanes)), lanes);
  });
}

void SiluMul(const float* gate, const float* up, float* out, int64_t dim) {
  ForLanes(dim, [&](int64_t i, int64_t lanes) {
    const V g = LoadLanes(gate + i, lanes);
    const V sigmoid_denominator = Add(Set1(1.0f), ExpV(Neg(g)));
    StoreLanes(out + i, Mul(Div(g, sigmoid_denominator), LoadLanes(up + i, lanes)), lanes);
  });
}

void RopeNormalize(float* x, const float* cosines, const float* sines, int head_dim, float eps) {
  const int half = head_dim / 2;
  ForLanes(half, [&](int64_t i, int64_t lanes) {
    const V a = LoadLanes(x + i, lanes), b = LoadLanes(x + half + i, lanes);
    const V c = LoadLanes(cosines + i, lanes), s = LoadLanes(sines + i, lanes);
    StoreLanes(x + i, Fma(a, c, Neg(Mul(b, s))), lanes);
    StoreLanes(x + half + i, Fma(b, c, Mul(a, s)), lanes);
  });
  const V scale = Set1(1.0f / __builtin_sqrtf(DotProduct(x, x, head_dim) + eps));
  ForLanes(head_dim, [&](int64_t i, int64_t lanes) { StoreLanes(x + i, Mul(LoadLanes(x + i, lanes), scale), lanes); });
}

#include "kernels/cpu/simd_attention.inl"

constexpr IsaTable kTable = {MatmulFloat<float>,
                             MatmulFloat<uint16_t>,
                             MatmulI8,
                             QuantizeRow,
                             RmsNorm,
                             SiluMul,
                             RopeNormalize,
                             ToBFloat16,
                             {ComputeAttentionTile<float>, Fold<float>},
                             {ComputeAttentionTile<uint16_t>, Fold<uint16_t>}};
