// Passes over a row of logits that choosing a token needs, vectorised for the machine they run on (function clones,
// chosen by the loader). No result depends on the clone: sums have a fixed order and nothing is contracted.
//
// Threads: pure functions.
#pragma once

#include <cstdint>
#include <span>

namespace linspec {

struct LogitMaximum {
  float value;    // -inf if there is nothing above it
  int32_t index;  // the first that has it, -1 for none
  bool has_nan;
};
LogitMaximum FindLogitMaximum(std::span<const float> logits);

// scores[i] = (logits[i] - max) / temperature: subtracting first keeps it finite for any temperature.
void TemperLogits(std::span<const float> logits, float max, float temperature, float* scores);

// Sum of exp(score) over the scores >= floor; all scores <= 0, NaN and -inf add nothing. Relative error below 1e-13.
double SumExpAtLeast(std::span<const float> scores, float floor);
double ExpNonPositive(double x);  // the exponential that SumExpAtLeast adds up

// Sum of exp((logit - max) * scale) within 3 %, for estimates. max is the largest logit, scale > 0.
float RoughSumExp(std::span<const float> logits, float max, float scale);

// Number of scores >= floor.
int64_t CountAtLeast(std::span<const float> scores, float floor);

// One chunk of Gumbel-max over a row: tokens [begin, begin + kNoiseChunk) of the whole row's scores.
inline constexpr int kNoiseChunk = 32;
struct NoiseKey {
  uint64_t seed;
  int64_t position;
  uint32_t stream;
};
// bits[i] = the Philox word of token begin + i (kernels/philox.h: block token / 4, word token % 4); begin % 4 == 0.
void NoiseChunkBits(const NoiseKey& key, int32_t begin, uint32_t* bits);
// Whether some score + Gumbel noise of its bits may reach the floor: bounds the noise from above without a logarithm,
// so true may be wrong and false may not. scores [count], count <= kNoiseChunk.
bool NoisyScoreMayReach(const float* scores, const uint32_t* bits, int count, float floor);
// As above, before any bits are drawn, from the largest noise there is.
bool ScoreMayReach(const float* scores, int count, float floor);

}  // namespace linspec
