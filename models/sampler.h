// Choosing tokens exactly: position-keyed Gumbel-max, "sample then match".
//
//   token at position p = argmax_v  processed_logit[v] / T + G(seed, p, v),   T = 0: argmax, ties to the lowest id
//
// The noise depends on seed, position and token only (Philox), never on how many tokens a step produced. So for a given
// seed the text with speculation equals the text without, token for token, for any drafter and any tree; and it is
// distributed exactly as softmax(processed / T). Source: Daliri, Musco, Suresh, arXiv 2408.07978.
//
// Threads: pure functions and per-sequence objects; engine thread.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "models/sampling_params.h"

namespace linspec {

// Independent sources of noise at one position. Plain sampling and Gumbel coupling use the target's only.
enum class NoiseStream : uint8_t { kTarget, kDraft, kAcceptance, kResidual };

float GumbelNoise(uint64_t seed, int64_t position, int32_t token, NoiseStream stream = NoiseStream::kTarget);
double UniformNoise(uint64_t seed, int64_t position, int32_t index, NoiseStream stream);  // in (0, 1)

struct ScoredToken {
  int32_t token;
  float score;
};

// Unpenalised choice, for drafters: same noise and temperature as the target's, top_p and friends left out. Best first
// and possibly fewer than k: NaN and -Inf are never chosen. Scores: the logit at temperature 0, else the tempered logit
// less the highest, plus the noise.
std::vector<ScoredToken> CoupledTopK(std::span<const float> logits, const SamplingParams& params, int64_t position,
                                     int k);

struct TokenLogprob {
  int32_t token;
  float logprob;
};

struct TokenProbability {
  int32_t token;
  float probability;
};

struct SampledToken {
  int32_t token = 0;
  float logprob = 0.0f;                    // log softmax of the logits after bias, penalties and bans, before
                                           // temperature and truncation; filled when params.logprobs >= 0
  std::vector<TokenLogprob> top_logprobs;  // params.logprobs best, descending
};

// What penalties and banned sequences need to know of a sequence, kept along it.
class PenaltyHistory {
 public:
  explicit PenaltyHistory(std::span<const int32_t> prompt);
  void Push(int32_t token);  // of the output
  int OutputCount(int32_t token) const;
  bool OutputEndsWith(std::span<const int32_t> tokens) const;  // none: true
  const std::unordered_map<int32_t, int>& output_counts() const { return output_counts_; }
  const std::unordered_map<int32_t, int>& prompt_counts() const { return prompt_counts_; }

 private:
  std::unordered_map<int32_t, int> prompt_counts_, output_counts_;
  std::vector<int32_t> output_;
};

struct SamplingContext {
  const SamplingParams* params;
  const PenaltyHistory* history;
  std::span<const int32_t> banned;  // e.g. eos while output < min_tokens
  int64_t position;                 // absolute position of the token being chosen
};

// Order as Hugging Face / vLLM: logit_bias, repetition, frequency and presence penalties, bans (banned,
// banned_sequences, what allowed_token_ids leaves out), temperature, then
// min_p, top_k, typical_p, top_p on the tempered distribution, each renormalised over what the one before kept; then
// the Gumbel draw. Ties go to the lower id. At temperature 0 truncation cannot change the choice and is skipped.
// If every token is banned or masked, or a logit is NaN or +Inf: reported by ok = false (the request fails, the process
// lives). REQUIRES: ids in params, history and banned lie inside the vocabulary (SamplingParams::Validate, Submit).
struct SampleResult {
  bool ok = true;
  SampledToken token;
};
SampleResult SampleToken(std::span<const float> logits, const SamplingContext& context);

// The tokens that SampleToken can choose, with their probabilities, by ascending id: one with probability 1 at
// temperature 0. Empty where SampleToken is not ok.
std::vector<TokenProbability> TokenDistribution(std::span<const float> logits, const SamplingContext& context);
// An exact draw from a distribution with noise of that stream; weights need not sum to 1. REQUIRES: not empty.
int32_t DrawToken(std::span<const TokenProbability> distribution, uint64_t seed, int64_t position, NoiseStream stream);
// What SampleToken reports, for a token that was chosen in another way.
SampleResult TakeToken(std::span<const float> logits, const SamplingContext& context, int32_t token);

// The logprob a known token has in the model's own distribution, with the num_top best beside it (prompt logprobs).
SampleResult ScoreToken(std::span<const float> logits, int32_t token, int num_top);

}  // namespace linspec
