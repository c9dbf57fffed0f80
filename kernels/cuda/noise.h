// The random bits of models/sampler.h on the device: position-keyed Philox, and the Gumbel noise made of them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace linspec::cuda {

// As kernels/philox.h.
__device__ inline uint4 Philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t a_high = __umulhi(0xD2511F53u, counter.x), a_low = 0xD2511F53u * counter.x;
    const uint32_t b_high = __umulhi(0xCD9E8D57u, counter.z), b_low = 0xCD9E8D57u * counter.z;
    counter = make_uint4(b_high ^ counter.y ^ key.x, b_low, a_high ^ counter.w ^ key.y, a_low);
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

// Of tokens 4 block to 4 block + 3 at `position`, in NoiseStream::kTarget.
__device__ inline uint4 NoiseBits(uint64_t seed, int64_t position, int block) {
  const auto p = static_cast<uint64_t>(position);
  return Philox(make_uint4(block, 0, static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32)),
                make_uint2(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)));
}

// E = -log(1 - u) keeps full precision where G is large, so rare tokens are not cut off. In double, as on the CPU.
__device__ inline float GumbelFromBits(uint32_t bits) {
  const double u = (bits + 0.5) * 0x1p-32;
  return static_cast<float>(-log(-log1p(-u)));
}

// The same in fp32, a few units in the last place off where G is large: for guesses.
__device__ inline float RoughGumbel(uint32_t bits) {
  const float u = (static_cast<float>(bits) + 0.5f) * 0x1p-32f;
  return -logf(-log1pf(-u));
}

// What a draft's noisy choice goes by: temperature times the target's score, which is in the same order and needs no
// division and not the largest logit.
__device__ inline float NoisyScore(float logit, float temperature, float noise) {
  return fmaf(temperature, noise, logit);
}

// One token's score in a choice.
struct ScoredToken {
  float score;
  int token;
};

// The order of every choice: higher score first, the lower id among equals.
__device__ inline bool Better(const ScoredToken& a, const ScoredToken& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}

}  // namespace linspec::cuda
