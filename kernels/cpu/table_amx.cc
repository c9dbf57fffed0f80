// AMX table (Sapphire Rapids and later): the AVX-512 table with int8 products of several rows in tile registers.
//
// A packed block is a tile operand as it stands: a line of 64 bytes holds four k of 16 outputs, 16 lines make the B
// tile of 64 k. The other operand, A, is up to 16 rows of x, unsigned plus 128 as vpdpbusd takes them. Sums are exact
// integers, so the bits are those of the other tables.
#include <immintrin.h>

#include "kernels/cpu/isa_table.h"

namespace linspec::cpu {
namespace {

constexpr int kTileRows = 16, kTileK = 64, kTileBytes = 1024;
constexpr int kMinRows = 4;    // fewer leave most of a tile idle: AVX-512 is as fast, bound by reading the weights
constexpr int kMaxBlocks = 4;  // of 16 outputs, side by side

// What ldtilecfg reads: bytes a row and rows of each tile.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// (g++ 12's intrinsic tells the compiler of the first eight bytes only.)
void Configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }

// Sums of one tile function: [2 halves of rows][kMaxBlocks][16 rows][16 outputs].
struct alignas(64) Sums {
  int32_t values[2][kMaxBlocks][kTileRows][kLanes];
};

// Tiles 0 to 3 take sums of `rows` rows, 4 their x; 5 to 7 take weights.
void ConfigureOneHalf(int64_t rows) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = static_cast<uint8_t>(t < 5 ? rows : kTileRows);
  }
  Configure(config);
}

// Tiles 0 and 1 take sums of 16 rows, 2 and 3 of `rows` rows, 4 and 5 their x; 6 and 7 take weights.
void ConfigureTwoHalves(int64_t rows) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = static_cast<uint8_t>(t == 2 || t == 3 || t == 5 ? rows : kTileRows);
  }
  Configure(config);
}

// Asks for the lines that the next kBlocks blocks have at the same place: the processor follows the streams on its own,
// but stops at the end of each page.
template <int kBlocks>
inline void PrefetchNext(const int8_t* data, int64_t block_bytes) {
  for (int b = 0; b < kBlocks; ++b) {
    for (int line = 0; line < kTileBytes; line += 64) {
      __builtin_prefetch(data + (kBlocks + b) * block_bytes + line, 0, 2);
    }
  }
}

template <int kBlocks>
void OneHalf(const int8_t* data, int64_t block_bytes, const uint8_t* x, int64_t stride, Sums* sums) {
  _tile_zero(0);
  if constexpr (kBlocks == 4) {
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < stride; k += kTileK, data += kTileBytes) {
    PrefetchNext<kBlocks>(data, block_bytes);
    _tile_loadd(4, x + k, stride);
    _tile_loadd(5, data, 64);
    _tile_dpbusd(0, 4, 5);
    if constexpr (kBlocks == 4) {
      _tile_loadd(6, data + block_bytes, 64);
      _tile_dpbusd(1, 4, 6);
      _tile_loadd(7, data + 2 * block_bytes, 64);
      _tile_dpbusd(2, 4, 7);
      _tile_loadd(5, data + 3 * block_bytes, 64);
      _tile_dpbusd(3, 4, 5);
    }
  }
  _tile_stored(0, sums->values[0][0], 64);
  if constexpr (kBlocks == 4) {
    _tile_stored(1, sums->values[0][1], 64);
    _tile_stored(2, sums->values[0][2], 64);
    _tile_stored(3, sums->values[0][3], 64);
  }
}

template <int kBlocks, bool kFirst>
void TwoHalves(const int8_t* data, int64_t block_bytes, const uint8_t* x, int64_t stride, Sums* sums) {
  const uint8_t* x_high = x + kTileRows * stride;
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (kBlocks == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < stride; k += kTileK, data += kTileBytes) {
    if constexpr (kFirst) PrefetchNext<kBlocks>(data, block_bytes);
    _tile_loadd(4, x + k, stride);
    _tile_loadd(6, data, 64);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(5, x_high + k, stride);
    _tile_dpbusd(2, 5, 6);
    if constexpr (kBlocks == 2) {
      _tile_loadd(7, data + block_bytes, 64);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(3, 5, 7);
    }
  }
  _tile_stored(0, sums->values[0][0], 64);
  _tile_stored(2, sums->values[1][0], 64);
  if constexpr (kBlocks == 2) {
    _tile_stored(1, sums->values[0][1], 64);
    _tile_stored(3, sums->values[1][1], 64);
  }
}

struct Product {
  const PackedMatrix& w;
  const QuantizedRows& x;
  float* y;
  bool accumulate;

  int64_t block_bytes() const { return x.stride * kLanes; }
  const int8_t* weights(int64_t block) const { return static_cast<const int8_t*>(w.data) + block * block_bytes(); }
  const uint8_t* row(int64_t m) const { return x.values + m * x.stride; }
  // Sums of rows [m, m + rows), `blocks` blocks from `block` on, to y. The inputs carry +128: 128 times the row's
  // weights comes off.
  void Store(const Sums& sums, int64_t m, int64_t rows, int64_t block, int blocks) const {
    for (int b = 0; b < blocks; ++b) {
      const int64_t n = (block + b) * kLanes, left = w.rows - n;
      const auto lanes = static_cast<__mmask16>(left >= kLanes ? 0xFFFF : (1u << left) - 1);
      const __m512i bias = _mm512_slli_epi32(_mm512_loadu_si512(w.row_sums + n), 7);
      const __m512 scales = _mm512_loadu_ps(w.scales + n);
      for (int64_t r = 0; r < rows; ++r) {
        const __m512i dots = _mm512_sub_epi32(_mm512_load_si512(sums.values[r / kTileRows][b][r % kTileRows]), bias);
        __m512 value = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dots), _mm512_set1_ps(x.scales[m + r])), scales);
        float* out = y + (m + r) * w.rows + n;
        if (accumulate) value = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, out), value);
        _mm512_mask_storeu_ps(out, lanes, value);
      }
    }
  }
};

// Rows [m, m + rows), at most 16, over blocks [block, block_end).
void MultiplyOneHalf(const Product& p, int64_t m, int64_t rows, int64_t block, int64_t block_end) {
  Sums sums;
  ConfigureOneHalf(rows);
  for (; block + 4 <= block_end; block += 4) {
    OneHalf<4>(p.weights(block), p.block_bytes(), p.row(m), p.x.stride, &sums);
    p.Store(sums, m, rows, block, 4);
  }
  for (; block < block_end; ++block) {
    OneHalf<1>(p.weights(block), p.block_bytes(), p.row(m), p.x.stride, &sums);
    p.Store(sums, m, rows, block, 1);
  }
}

template <int kBlocks>
void TwoHalvesOverRows(const Product& p, int64_t m, int64_t m_end, int64_t block) {
  Sums sums;
  for (bool first = true; m < m_end; m += 2 * kTileRows, first = false) {
    const auto multiply = first ? TwoHalves<kBlocks, true> : TwoHalves<kBlocks, false>;
    multiply(p.weights(block), p.block_bytes(), p.row(m), p.x.stride, &sums);
    p.Store(sums, m, m_end - m < 2 * kTileRows ? m_end - m : 2 * kTileRows, block, kBlocks);
  }
}

// Rows [m, m_end), more than 16, in steps of 32 of which the last may be shorter only if it is the only one.
void MultiplyTwoHalves(const Product& p, int64_t m, int64_t m_end, int64_t block, int64_t block_end) {
  ConfigureTwoHalves(m_end - m < 2 * kTileRows ? m_end - m - kTileRows : kTileRows);
  for (; block + 2 <= block_end; block += 2) TwoHalvesOverRows<2>(p, m, m_end, block);
  for (; block < block_end; ++block) TwoHalvesOverRows<1>(p, m, m_end, block);
}

void MatmulI8(const PackedMatrix& w, const QuantizedRows& x, float* y, int64_t num_rows, int64_t block_begin,
              int64_t block_end, bool accumulate) {
  if (num_rows < kMinRows || x.stride % kTileK != 0) {
    return Avx512Table().matmul_i8(w, x, y, num_rows, block_begin, block_end, accumulate);
  }
  const Product p{w, x, y, accumulate};
  const int64_t whole = num_rows / (2 * kTileRows) * (2 * kTileRows), rest = num_rows - whole;
  if (whole > 0) MultiplyTwoHalves(p, 0, whole, block_begin, block_end);
  if (rest > kTileRows) MultiplyTwoHalves(p, whole, num_rows, block_begin, block_end);
  if (rest > 0 && rest <= kTileRows) MultiplyOneHalf(p, whole, rest, block_begin, block_end);
  _tile_release();  // a thread with live tiles costs the system 8 KiB at every switch
}

}  // namespace

const IsaTable& AmxTable() {
  static const IsaTable table = [] {
    IsaTable with_tiles = Avx512Table();
    with_tiles.matmul_i8 = MatmulI8;
    return with_tiles;
  }();
  return table;
}

}  // namespace linspec::cpu
