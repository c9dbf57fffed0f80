// The window product of one tile of query rows on 8 warps: scores on the tensor cores, weights of a row by one warp,
// weighted values as fp32 FMAs in the order of the tokens, whoever has them.
//
// Rows of a tile are (node, query head) pairs of one kv head, node-major. Token t of the window (ring, then tree rows
// of the call) has its key and value in shared memory at row t. A row's ancestors stand by ascending position, and
// tokens of weight 0 change no bit: so a row's bits depend on its own path only.
#pragma once

#include "kernels/cuda/state_element.h"
#include "kernels/cuda/verify_item.h"

namespace linspec::cuda {

// One, two or four consecutive elements.
__device__ __forceinline__ void LoadChannels(const float* from, float (&to)[1]) { to[0] = *from; }
__device__ __forceinline__ void LoadChannels(const uint16_t* from, float (&to)[1]) {
  to[0] = __uint_as_float(static_cast<uint32_t>(*from) << 16);
}
__device__ __forceinline__ void LoadChannels(const float* from, float (&to)[2]) {
  const float2 x = *reinterpret_cast<const float2*>(from);
  to[0] = x.x, to[1] = x.y;
}
__device__ __forceinline__ void LoadChannels(const uint16_t* from, float (&to)[2]) {
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(from);
  to[0] = __uint_as_float(pair << 16), to[1] = __uint_as_float(pair & 0xFFFF0000u);
}
template <typename T>
__device__ __forceinline__ void LoadChannels(const T* from, float (&to)[4]) {
  const Vec4 x = LoadElements(from);
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

__device__ __forceinline__ void StoreChannels(float* to, const float (&x)[1]) { *to = x[0]; }
__device__ __forceinline__ void StoreChannels(float* to, const float (&x)[2]) {
  *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
}
__device__ __forceinline__ void StoreChannels(float* to, const float (&x)[4]) { Store4(to, {x[0], x[1], x[2], x[3]}); }

template <int kDim, int kRows, typename T>
struct WindowTile {
  // Keys and values lie as in the ring, for copies in one piece.
  static constexpr int kStride = kDim;
  // Two rows of queries are read at a time, 64 bytes each of fp32, every other 16 of 128 bytes beside bf16.
  static constexpr int kQueryStride = kDim + (kRows > 1 && sizeof(T) == sizeof(float) ? 16 : 4);
  static constexpr int kCapacity = 2 * kMaxNodes + 4;  // tokens; rows of scores start in different banks
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kTiles = (kRows + 7) / 8;                   // of 8 rows, the columns of an instruction
  static constexpr int kWarpRows = (kRows + kWarps - 1) / kWarps;  // of the rows that a warp weighs and finishes
  static constexpr int kChannels = kDim / 32;                      // of a lane of a warp that has whole rows
  static constexpr int kSumRows = kRows < 8 ? 1 : kRows / 4, kSumChannels = kRows == 1 ? kChannels : kChannels / 2;

  const LayerParams& layer;
  const Item& item;
  const RowInfo* rows;     // [rows of the item]
  const T *keys, *values;  // [tokens]
  const float* queries;    // [rows of the item]
  const uint64_t* masks;   // [nodes]
  const float* taps;       // [heads, conv_kernel]
  // [kRows][kCapacity]: scores, over the lower and the upper half of the channels; then weights of the values in y and,
  // where a row may cross a group's end, in z.
  float *local, *grouped;
  int group_shift;  // log2 of the group size

  __device__ __forceinline__ static int Warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ __forceinline__ static int Lane() { return static_cast<int>(threadIdx.x) % 32; }
  // Which rows a warp weighs. Few tokens leave the last warps without scores to compute: those take the first rows.
  __device__ __forceinline__ static int RowOf(int i) { return i * kWarps + kWarps - 1 - Warp(); }
  __device__ __forceinline__ static int Channel() { return Lane() * kChannels; }

  // A unit is 16 tokens and half of the channels: row i of a product is a token, its columns are the query rows.
  __device__ __forceinline__ void Score() const {
    const int units = (item.tokens() + 15) / 16 * 2;
#pragma unroll 1
    for (int unit = Warp(); unit < units; unit += kWarps) {
      if (unit / 2 * 16 + 15 >= item.history) ScoreUnit(unit / 2 * 16, unit % 2);  // the history has taps only
    }
  }

  struct QueryRow {
    uint64_t mask;  // ancestors
    int position, group;
    const float* taps;
  };
  __device__ __forceinline__ QueryRow Row(int index) const {
    const RowInfo& row = rows[index];
    const uint64_t mask = masks[row.node];
    const int position = item.phase + __popcll(mask) - 1;
    return {mask, position, position >> group_shift, taps + row.head * layer.conv_kernel};
  }

  // Scores become the weights of every token, for one row by one warp; past the end, up to a multiple of four, they are
  // 0. Without branches, which lanes would go through one after the other, and of many rows two tokens a lane together:
  // while the block beside this one reads values, each read of shared memory waits behind those.
  __device__ __forceinline__ void Weigh(int index, const QueryRow& row) const {
    const int end = (item.tokens() + 3) / 4 * 4;
    float *in_local = local + index * kCapacity, *in_grouped = grouped + index * kCapacity;
    if constexpr (kRows == 1) {
#pragma unroll 1
      for (int token = Lane(); token < end; token += 32) {
        Put(in_local, in_grouped, row, Look(row, token), token, end, in_local[token] + in_grouped[token]);
      }
    } else {
      Seen seen[2] = {Look(row, Lane()), Look(row, Lane() + 32)};
#pragma unroll 1
      for (int first = Lane(); first < end;) {
        float lower[2], upper[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) lower[i] = in_local[first + 32 * i], upper[i] = in_grouped[first + 32 * i];
#pragma unroll
        for (int i = 0; i < 2; ++i) Put(in_local, in_grouped, row, seen[i], first + 32 * i, end, lower[i] + upper[i]);
        first += 64;
        if (first - Lane() >= end) break;
        seen[0] = Look(row, first), seen[1] = Look(row, first + 32);
      }
    }
    __syncwarp();
  }

  // Where the sums of a thread are: kSumRows rows and kSumChannels channels. What is read of shared memory counts per
  // lane, also where lanes read the same: rows share values, channels share weights.
  struct Place {
    int row, channel;
  };
  __device__ __forceinline__ static Place SumPlace() {
    if constexpr (kRows == 1) return {RowOf(0), Channel()};
    return {Warp() / 2 * kSumRows, Warp() % 2 * (kDim / 2) + Lane() * kSumChannels};
  }

  // The thread's weighted values.
  __device__ __forceinline__ void Accumulate(const float* weights, float (&sum)[kSumRows][kSumChannels]) const {
    const Place place = SumPlace();
    const T* v = values + place.channel;
    const float* w = weights + place.row * kCapacity;
    const int tokens = item.tokens();
    int token = 0;
#pragma unroll 2
    for (; token + 4 <= tokens; token += 4) {
      float value[4][kSumChannels];
#pragma unroll
      for (int i = 0; i < 4; ++i) LoadChannels(v + (token + i) * kStride, value[i]);
      AddTokens(w + token, value, sum);
    }
    if (token == tokens) return;
    float value[4][kSumChannels];
#pragma unroll
    for (int i = 0; i < 4; ++i) LoadChannels(v + min(token + i, tokens - 1) * kStride, value[i]);
    AddTokens(w + token, value, sum);
  }

 private:
  __device__ __forceinline__ int Position(int node) const { return item.phase + __popcll(masks[node]) - 1; }

  // A token, any up to kCapacity, as a row sees it.
  struct Seen {
    bool counts;  // its score does
    int group;
    float tap;
  };
  __device__ __forceinline__ Seen Look(const QueryRow& row, int token) const {
    const int node = token - item.ring_tokens(), at = min(max(node, 0), kMaxNodes - 1), of_node = Position(at);
    const int key = node < 0 ? token - item.history : of_node, lag = row.position - key;
    const auto half = static_cast<uint32_t>(at < 32 ? row.mask : row.mask >> 32);
    const bool seen = (token < item.tokens()) & ((node < 0) | ((half >> (at % 32) & 1) != 0));
    Seen result = {static_cast<bool>(seen & (token >= item.history)), key >> group_shift, 0.0f};
    if (seen & (lag < layer.conv_kernel)) result.tap = row.taps[lag];
    return result;
  }
  // Weights of a token before `end`.
  __device__ __forceinline__ void Put(float* in_local, float* in_grouped, const QueryRow& row, const Seen& seen,
                                      int token, int end, float score) const {
    const bool crosses = item.may_cross(layer.group_size);
    if (!seen.counts) score = 0.0f;
    const bool past = crosses & (seen.group != row.group);
    const float positive = (layer.local != 0) & !past ? fmaxf(score, 0.0f) : 0.0f;
    if (token < end) in_local[token] = fmaf(positive, positive, seen.tap);
    if (crosses && token < end) in_grouped[token] = past ? Decayed(score, row.group - 1 - seen.group) : 0.0f;
  }

  // Four tokens. weights: of the first row.
  __device__ __forceinline__ static void AddTokens(const float* weights, const float (&value)[4][kSumChannels],
                                                   float (&sum)[kSumRows][kSumChannels]) {
#pragma unroll
    for (int i = 0; i < kSumRows; ++i) {
      const Vec4 x = Load4(weights + i * kCapacity);
      Add(x.x, value[0], sum[i]);
      Add(x.y, value[1], sum[i]);
      Add(x.z, value[2], sum[i]);
      Add(x.w, value[3], sum[i]);
    }
  }
  template <int kCount>
  __device__ __forceinline__ static void Add(float weight, const float (&value)[kCount], float (&sum)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = fmaf(weight, value[i], sum[i]);
  }

  // The weight in z of a token of a group that the row's position has left behind, `passed` groups ago.
  __device__ __forceinline__ float Decayed(float score, int passed) const {
    if (layer.global == Global::kNone) return 0.0f;
    if (layer.decay == nullptr) return score;
#pragma unroll 1
    for (; passed > 0; --passed) score *= layer.decay[item.kv_head];
    return score;
  }

  __device__ __forceinline__ void ScoreUnit(int first, int half) const {
    const int g = Lane() / 4, c = Lane() % 4, last = item.tokens() - 1;
    const T* k0 = keys + min(first + g, last) * kStride;
    const T* k1 = keys + min(first + g + 8, last) * kStride;
    PreciseSums sum[kTiles];
    constexpr int kOwn = 16 / sizeof(T), kStep = 4 * kOwn;  // channels of a lane and of its row at a time
    constexpr bool kPairs = kDim / 2 >= 2 * kStep;
    const bool odd = kPairs && g % 2 != 0;  // rows begin in the same bank: odd ones are read in another order
#pragma unroll
    for (int i = 0; i < kDim / 2; i += kPairs ? 2 * kStep : kStep) {
      const int d = half * (kDim / 2) + i + kOwn * c;
      const uint4 a = Load16(k0 + d + (odd ? kStep : 0)), b = Load16(k1 + d + (odd ? kStep : 0));
      if constexpr (kPairs) {
        const uint4 e = Load16(k0 + d + (odd ? 0 : kStep)), f = Load16(k1 + d + (odd ? 0 : kStep));
        AddScores(Either(odd, e, a), Either(odd, f, b), d, sum);
        AddScores(Either(odd, a, e), Either(odd, b, f), d + kStep, sum);
      } else {
        AddScores(a, b, d, sum);
      }
    }
    float* to = half == 0 ? local : grouped;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      const int row = i / 4 * 8 + 2 * c + i % 2, token = first + g + i / 2 % 2 * 8;
      if (row < kRows && token <= last) to[row * kCapacity + token] = sum[i / 4][i % 4];
    }
  }

  __device__ __forceinline__ static uint4 Load16(const T* from) { return *reinterpret_cast<const uint4*>(from); }
  __device__ __forceinline__ static uint4 Either(bool first, const uint4& a, const uint4& b) {
    return {first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w};
  }

  // 16 bytes of two tokens from channel d of the lane on: two steps of the tensor cores, or four of bf16.
  __device__ __forceinline__ void AddScores(const uint4& a, const uint4& b, int d, PreciseSums (&sum)[kTiles]) const {
    if constexpr (sizeof(T) == 4) {
      const auto value = [](uint32_t bits) { return __uint_as_float(bits); };
      AddSteps(Split<4>({value(a.x), value(b.x), value(a.y), value(b.y)}),
               Split<4>({value(a.z), value(b.z), value(a.w), value(b.w)}), d, sum);
    } else {
      AddSteps(OfColumnPairs(a.x, b.x), OfColumnPairs(a.y, b.y), d, sum);
      AddSteps(OfColumnPairs(a.z, b.z), OfColumnPairs(a.w, b.w), d + 4, sum);
    }
  }
  // Channels d to d + 3 of the lane.
  template <typename Operand>
  __device__ __forceinline__ void AddSteps(const Operand& even, const Operand& odd, int d,
                                           PreciseSums (&sum)[kTiles]) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const Vec4 x = Query(tile, d);
      sum[tile].Add(even, Split<2>({x.x, x.y}));
      sum[tile].Add(odd, Split<2>({x.z, x.w}));
    }
  }
  __device__ __forceinline__ Vec4 Query(int tile, int d) const {
    return Load4(queries + min(8 * tile + Lane() / 4, kRows - 1) * kQueryStride + d);
  }
};

}  // namespace linspec::cuda
