// How the sum of a fold becomes the 16 bits of a stored S: to one of the two neighbours, at random, so that the error
// is zero on average.
//
// Rounded to nearest, a sum that grew past 256 times what a group adds would stop growing, and one that decays by less
// than 1/512 a fold would stop decaying. The randomness is a hash of layer, group and element: the same whoever folds
// (verify's scratch copy, commit, prefill), whatever stands beside it, on every machine.
#pragma once

#include <bit>
#include <cstdint>

namespace linspec {

inline constexpr uint32_t kRoundingMix1 = 0x7feb352d, kRoundingMix2 = 0x846ca68b;

constexpr uint32_t MixRoundingBits(uint32_t x) {
  x = (x ^ (x >> 16)) * kRoundingMix1;
  x = (x ^ (x >> 15)) * kRoundingMix2;
  return x ^ (x >> 16);
}

// Key of element 0 of a layer's S [Hkv, d, d] in the fold that completes `group`; that of element e is e more.
constexpr uint32_t RoundingKey(int layer, int64_t group) {
  return MixRoundingBits(static_cast<uint32_t>(group) ^ MixRoundingBits(static_cast<uint32_t>(layer) + 1));
}

// value as bf16, its lower half rounded up with the probability that it stands for. Infinities and NaN stay.
constexpr uint16_t StochasticBFloat16(float value, uint32_t key) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const bool finite = (bits & 0x7f800000) != 0x7f800000;
  return static_cast<uint16_t>((bits + (finite ? MixRoundingBits(key) >> 16 : 0)) >> 16);
}

}  // namespace linspec
