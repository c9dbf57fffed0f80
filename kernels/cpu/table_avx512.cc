// AVX-512 table (F, BW, VL, DQ, VNNI): V is one register, int8 dots are vpdpbusd on biased inputs.
#include <immintrin.h>

#include "kernels/cpu/isa_table.h"
#include "kernels/state_rounding.h"

namespace linspec::cpu {
namespace {

using V = __m512;
using I = __m512i;
using IntWeights = __m512i;
using IntInput = __m512i;
constexpr int kFloatRows = 4, kFloatBlocks = 4;
constexpr int kIntRows = 8, kIntBlocks = 2;
constexpr int kWideIntRows = 6, kWideIntBlocks = 4;
constexpr int kDotTile = 16, kWindowTile = 16;
constexpr int kFoldRows = 8;

V Zero() { return _mm512_setzero_ps(); }
V Set1(float x) { return _mm512_set1_ps(x); }
V Load(const float* p) { return _mm512_loadu_ps(p); }
V LoadPartial(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
void Store(float* p, V v) { _mm512_storeu_ps(p, v); }
void StorePartial(float* p, V v, int64_t n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v); }
V Add(V a, V b) { return _mm512_add_ps(a, b); }
V Sub(V a, V b) { return _mm512_sub_ps(a, b); }
V Mul(V a, V b) { return _mm512_mul_ps(a, b); }
V Div(V a, V b) { return _mm512_div_ps(a, b); }
V Fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
V Min(V a, V b) { return _mm512_min_ps(a, b); }
V Max(V a, V b) { return _mm512_max_ps(a, b); }
V Neg(V a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
V Abs(V a) { return _mm512_abs_ps(a); }

float ReduceAdd(V v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// dots[i] = ReduceAdd(a[i]): the same additions, for all sixteen at once. Written out, because a loop over `a` would
// keep it, and with it the accumulators of the caller's loop, in memory.
V AddHalves(V a, V b) { return Add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE)); }
V AddQuarters(V a, V b) { return Add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD)); }
V AddPairs(V a, V b) { return Add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE)); }
V AddSingles(V a, V b) { return Add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD)); }
void ReduceDots(const V (&a)[kDotTile], float* dots) {
  const V four0 = AddQuarters(AddHalves(a[0], a[1]), AddHalves(a[2], a[3]));
  const V four1 = AddQuarters(AddHalves(a[4], a[5]), AddHalves(a[6], a[7]));
  const V four2 = AddQuarters(AddHalves(a[8], a[9]), AddHalves(a[10], a[11]));
  const V four3 = AddQuarters(AddHalves(a[12], a[13]), AddHalves(a[14], a[15]));
  const V sums = AddSingles(AddPairs(four0, four1), AddPairs(four2, four3));
  // Lane 4 l + q holds dot 4 q + l.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  Store(dots, _mm512_permutexvar_ps(order, sums));
}
float ReduceMax(V v) { return _mm512_reduce_max_ps(v); }

V ScaleByExponent(V y, V shifted) {
  return _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(y), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}

void StoreQuantized(V v, uint8_t* out) {  // plus 128, which flips the sign bit
  v = Min(Max(v, Set1(-127.0f)), Set1(127.0f));
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
}

// bf16: the upper halves of floats.
V Widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
V Load(const uint16_t* p) { return Widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
V LoadPartial(const uint16_t* p, int64_t n) {
  return Widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
}
V LowerOfPairs(I words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
V UpperOfPairs(I words) { return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int32_t(0xffff0000)))); }
void LoadPairs(const uint16_t* p, V* even, V* odd) {
  const I words = _mm512_loadu_si512(p);
  *even = LowerOfPairs(words);
  *odd = UpperOfPairs(words);
}
void StorePairs(float* p, V even, V odd) {
  const I low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const I high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  Store(p, _mm512_permutex2var_ps(even, low, odd));
  Store(p + kLanes, _mm512_permutex2var_ps(even, high, odd));
}
void StoreUpperHalves(uint16_t* p, I bits, int64_t n) {
  _mm512_mask_cvtepi32_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), _mm512_srli_epi32(bits, 16));
}
void StoreNearest(uint16_t* p, V v, int64_t n) {  // as FloatToBFloat16
  const I bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  StoreUpperHalves(p, _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000)), n);
}
void StoreStochastic(uint16_t* p, V v, uint32_t first_key, int64_t n) {  // as StochasticBFloat16, keys ascending
  const I lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  I x = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(first_key)), lanes);
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(int32_t(kRoundingMix1)));
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), _mm512_set1_epi32(int32_t(kRoundingMix2)));
  const I bits = _mm512_castps_si512(v), exponent = _mm512_set1_epi32(0x7f800000);
  const __mmask16 finite = _mm512_cmpneq_epi32_mask(_mm512_and_si512(bits, exponent), exponent);
  StoreUpperHalves(p, _mm512_mask_add_epi32(bits, finite, bits, _mm512_srli_epi32(x, 16)), n);
}

// The inputs carry +128, so the sum starts at -128 times the row's weights.
I InitAcc(const int32_t* row_sums) {
  return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(_mm512_loadu_si512(row_sums), 7));
}
IntWeights LoadIntWeights(const int8_t* p) { return _mm512_loadu_si512(p); }
IntInput BroadcastInput(const QuantizedRows& x, int64_t offset) {
  int32_t four;
  __builtin_memcpy(&four, x.values + offset, 4);
  return _mm512_set1_epi32(four);
}
// As assembly because g++ 12 copies the accumulator around the intrinsic and then spills the tile: 2.5 times slower.
I DotStep(I acc, IntInput x, IntWeights w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
  return acc;
}
V ToFloat(I acc) { return _mm512_cvtepi32_ps(acc); }

#include "kernels/cpu/simd.inl"

}  // namespace

const IsaTable& Avx512Table() { return kTable; }

}  // namespace linspec::cpu
