// AVX2 table: V is two registers. int8 dots go through vpmaddubsw on |w| and sign(w) x, which cannot saturate because
// both lie in [-127, 127].
#include <immintrin.h>

#include "kernels/cpu/isa_table.h"
#include "kernels/state_rounding.h"

namespace linspec::cpu {
namespace {

struct V {
  __m256 lo, hi;
};
struct I {
  __m256i lo, hi;
};
struct IntWeights {
  __m256i lo, hi;
};
using IntInput = __m256i;
constexpr int kFloatRows = 2, kFloatBlocks = 2;
constexpr int kIntRows = 2, kIntBlocks = 2;
constexpr int kWideIntRows = 1, kWideIntBlocks = 2;
constexpr int kDotTile = 4, kWindowTile = 4;
constexpr int kFoldRows = 4;

V Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
V Set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
V Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
V LoadPartial(const float* p, int64_t n) {
  float buffer[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return Load(buffer);
}
void Store(float* p, V v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
void StorePartial(float* p, V v, int64_t n) {
  float buffer[kLanes];
  Store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}
V Add(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
V Sub(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
V Mul(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
V Div(V a, V b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
V Fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
V Min(V a, V b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
V Max(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
V Neg(V a) { return {_mm256_xor_ps(a.lo, _mm256_set1_ps(-0.0f)), _mm256_xor_ps(a.hi, _mm256_set1_ps(-0.0f))}; }
V Abs(V a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.lo), _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.hi)}; }

float ReduceAdd(V v) {
  const __m256 eight = _mm256_add_ps(v.lo, v.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
void ReduceDots(const V (&a)[kDotTile], float* dots) {
  _mm_storeu_ps(dots, _mm_setr_ps(ReduceAdd(a[0]), ReduceAdd(a[1]), ReduceAdd(a[2]), ReduceAdd(a[3])));
}
float ReduceMax(V v) {
  float lanes[kLanes];
  Store(lanes, v);
  float largest = lanes[0];
  for (float lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

V ScaleByExponent(V y, V shifted) {
  const auto scale = [](__m256 a, __m256 n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
  };
  return {scale(y.lo, shifted.lo), scale(y.hi, shifted.hi)};
}

void StoreQuantized(V v, uint8_t* out) {
  v = Min(Max(v, Set1(-127.0f)), Set1(127.0f));
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi));  // 0-3 8-11 4-7 12-15
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
}

V Load(const uint16_t* p) {  // bf16: the upper halves of floats
  const auto widen = [](const uint16_t* q) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  };
  return {widen(p), widen(p + 8)};
}
V LoadPartial(const uint16_t* p, int64_t n) {
  uint16_t buffer[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return Load(buffer);
}
__m256 LowerOfPairs(__m256i words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
__m256 UpperOfPairs(__m256i words) {
  return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int32_t(0xffff0000))));
}
void LoadPairs(const uint16_t* p, V* even, V* odd) {
  const __m256i lo = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i hi = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + kLanes));
  *even = {LowerOfPairs(lo), LowerOfPairs(hi)};
  *odd = {UpperOfPairs(lo), UpperOfPairs(hi)};
}
void StorePairs(float* p, V even, V odd) {
  const auto store = [](float* at, __m256 e, __m256 o) {
    const __m256 a = _mm256_unpacklo_ps(e, o), b = _mm256_unpackhi_ps(e, o);  // 0-3 8-11 and 4-7 12-15
    _mm256_storeu_ps(at, _mm256_permute2f128_ps(a, b, 0x20));
    _mm256_storeu_ps(at + 8, _mm256_permute2f128_ps(a, b, 0x31));
  };
  store(p, even.lo, odd.lo);
  store(p + kLanes, even.hi, odd.hi);
}
void StoreUpperHalves(uint16_t* p, I bits, int64_t n) {
  const __m256i halves = _mm256_packus_epi32(_mm256_srli_epi32(bits.lo, 16), _mm256_srli_epi32(bits.hi, 16));
  const __m256i ordered = _mm256_permute4x64_epi64(halves, 0xD8);  // from 0-3 8-11 4-7 12-15
  if (n == kLanes) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), ordered);
  uint16_t buffer[kLanes];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer), ordered);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}
void StoreNearest(uint16_t* p, V v, int64_t n) {  // as FloatToBFloat16
  const auto round = [](__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  };
  StoreUpperHalves(p, {round(v.lo), round(v.hi)}, n);
}
void StoreStochastic(uint16_t* p, V v, uint32_t first_key, int64_t n) {  // as StochasticBFloat16, keys ascending
  const auto round = [](__m256 value, uint32_t first) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i x = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int32_t>(first)), lanes);
    x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 16)), _mm256_set1_epi32(int32_t(kRoundingMix1)));
    x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 15)), _mm256_set1_epi32(int32_t(kRoundingMix2)));
    const __m256i bits = _mm256_castps_si256(value), exponent = _mm256_set1_epi32(0x7f800000);
    const __m256i endless = _mm256_cmpeq_epi32(_mm256_and_si256(bits, exponent), exponent);  // infinities and NaN
    return _mm256_add_epi32(bits, _mm256_andnot_si256(endless, _mm256_srli_epi32(x, 16)));
  };
  StoreUpperHalves(p, {round(v.lo, first_key), round(v.hi, first_key + 8)}, n);
}

I InitAcc(const int32_t*) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
IntWeights LoadIntWeights(const int8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
IntInput BroadcastInput(const QuantizedRows& x, int64_t offset) {
  int32_t four;
  __builtin_memcpy(&four, x.values + offset, 4);
  return _mm256_set1_epi32(four);
}
I DotStep(I acc, IntInput x, IntWeights w) {
  const auto step = [x](__m256i sum, __m256i weights) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  };
  return {step(acc.lo, w.lo), step(acc.hi, w.hi)};
}
V ToFloat(I acc) { return {_mm256_cvtepi32_ps(acc.lo), _mm256_cvtepi32_ps(acc.hi)}; }

#include "kernels/cpu/simd.inl"

}  // namespace

const IsaTable& Avx2Table() { return kTable; }

}  // namespace linspec::cpu
