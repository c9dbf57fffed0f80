#include "models/sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/logit_scan.h"
#include "kernels/philox.h"

namespace linspec {
namespace {

constexpr float kLn2 = 0.69314718f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

using Scored = ScoredToken;

// The order of every choice in this file: higher score first, the lower id among equals.
bool Better(const Scored& a, const Scored& b) { return a.score > b.score || (a.score == b.score && a.token < b.token); }

// The k best of what is offered, best first. NaN is never better than anything, so it is dropped.
class Best {
 public:
  explicit Best(size_t k) : k_(k) { items_.reserve(k + 1); }
  float floor() const { return items_.size() < k_ ? kMinusInfinity : items_.back().score; }
  void Offer(const Scored& item) {
    if (!(item.score > kMinusInfinity) || (items_.size() == k_ && !Better(item, items_.back()))) return;
    items_.insert(std::upper_bound(items_.begin(), items_.end(), item, Better), item);
    if (items_.size() > k_) items_.pop_back();
  }
  const std::vector<Scored>& items() const { return items_; }

 private:
  size_t k_;
  std::vector<Scored> items_;
};

std::array<uint32_t, 4> NoiseBits(uint64_t seed, int64_t position, int32_t block,
                                  NoiseStream stream = NoiseStream::kTarget) {
  const uint64_t p = static_cast<uint64_t>(position);
  return Philox4x32({static_cast<uint32_t>(block), static_cast<uint32_t>(stream), static_cast<uint32_t>(p),
                     static_cast<uint32_t>(p >> 32)},
                    {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
}

// Small-side uniform: E = -log(1 - u) keeps full precision where G is large, so rare tokens are not cut off.
double UniformFromBits(uint32_t bits) { return (bits + 0.5) * 0x1p-32; }

float GumbelFromBits(uint32_t bits) {
  const double u = UniformFromBits(bits);
  return static_cast<float>(-std::log(-std::log1p(-u)));
}

// E >= u >= 2^-(leading zeros + 1) bounds G without a logarithm. Rounding is monotone, so comparing the rounded sum of
// logit and bound with the floor skips only elements whose exact sum is below it.
float GumbelBound(uint32_t bits) { return static_cast<float>(std::countl_zero(bits) + 1) * kLn2 + 1e-4f; }

void OfferNoisy(const Scored& tempered, uint32_t bits, Best* best) {
  if (tempered.score + GumbelBound(bits) < best->floor()) return;
  best->Offer({tempered.token, tempered.score + GumbelFromBits(bits)});
}

std::vector<float> Temper(std::span<const float> logits, float max, float temperature) {
  std::vector<float> scores(logits.size());
  TemperLogits(logits, max, temperature, scores.data());
  return scores;
}

// Most chunks hold nothing that could still win: they are passed over by bounds that cost no logarithm.
void OfferAllNoisy(std::span<const float> scores, const SamplingParams& params, int64_t position, Best* best) {
  const NoiseKey key{params.seed, position, static_cast<uint32_t>(NoiseStream::kTarget)};
  std::array<uint32_t, kNoiseChunk> bits;
  const auto size = static_cast<int32_t>(scores.size());
  for (int32_t begin = 0; begin < size; begin += kNoiseChunk) {
    const int32_t count = std::min(kNoiseChunk, size - begin);
    const float* chunk = scores.data() + begin;
    if (!ScoreMayReach(chunk, count, best->floor())) continue;
    NoiseChunkBits(key, begin, bits.data());
    if (!NoisyScoreMayReach(chunk, bits.data(), count, best->floor())) continue;
    for (int32_t i = 0; i < count; ++i) OfferNoisy({begin + i, chunk[i]}, bits[i], best);
  }
}

bool HasPenalties(const SamplingParams& params) {
  return params.repetition_penalty != 1.0f || params.frequency_penalty != 0.0f || params.presence_penalty != 0.0f;
}

void ApplyPenalties(const SamplingParams& params, const PenaltyHistory& history, std::span<float> logits) {
  const auto repeat = [&](int32_t token) {
    float& logit = logits[token];
    logit = logit < 0 ? logit * params.repetition_penalty : logit / params.repetition_penalty;
  };
  for (const auto& [token, count] : history.prompt_counts()) repeat(token);
  for (const auto& [token, count] : history.output_counts()) {
    if (!history.prompt_counts().contains(token)) repeat(token);
    logits[token] -= params.frequency_penalty * static_cast<float>(count) + params.presence_penalty;
  }
}

void Ban(const SamplingContext& context, std::vector<float>* logits) {
  const SamplingParams& params = *context.params;
  for (const int32_t token : context.banned) (*logits)[token] = kMinusInfinity;
  for (const std::vector<int32_t>& sequence : params.banned_sequences) {
    const auto beginning = std::span(sequence).first(sequence.size() - 1);
    if (beginning.empty() || context.history->OutputEndsWith(beginning)) (*logits)[sequence.back()] = kMinusInfinity;
  }
  if (params.allowed_token_ids.empty()) return;
  std::vector<float> allowed(logits->size(), kMinusInfinity);
  for (const int32_t token : params.allowed_token_ids) allowed[token] = (*logits)[token];
  *logits = std::move(allowed);
}

// Everything before the temperature. Returns `logits` itself when there is nothing to change.
std::span<const float> Process(std::span<const float> logits, const SamplingContext& context,
                               std::vector<float>* scratch) {
  const SamplingParams& params = *context.params;
  const bool bans = !context.banned.empty() || !params.banned_sequences.empty() || !params.allowed_token_ids.empty();
  if (!HasPenalties(params) && params.logit_bias.empty() && !bans) return logits;
  scratch->assign(logits.begin(), logits.end());
  for (const auto& [token, bias] : params.logit_bias) (*scratch)[token] += bias;
  if (HasPenalties(params)) ApplyPenalties(params, *context.history, *scratch);
  if (bans) Ban(context, scratch);
  return *scratch;
}

bool Truncates(const SamplingParams& params) {
  return params.top_p < 1 || params.top_k > 0 || params.min_p > 0 || params.typical_p < 1;
}

double SumExp(const std::vector<Scored>& kept) {
  double sum = 0;
  for (const Scored& item : kept) sum += ExpNonPositive(item.score);
  return sum;
}

// The scores >= floor, and so all that are better than any of them.
std::vector<Scored> AtLeast(std::span<const float> scores, float floor) {
  std::vector<Scored> kept;
  for (size_t v = 0; v < scores.size(); ++v) {
    if (scores[v] >= floor && scores[v] > kMinusInfinity) kept.push_back({static_cast<int32_t>(v), scores[v]});
  }
  return kept;
}

// Best scores are 0; floors to try in turn when few good ones are wanted of many.
constexpr std::array kFloors = {-3.0f, -6.0f, -10.0f, -16.0f, kMinusInfinity};

void KeepTopK(int32_t k, std::vector<Scored>* kept) {
  if (static_cast<int64_t>(kept->size()) <= k) return;
  std::nth_element(kept->begin(), kept->begin() + k, kept->end(), Better);
  kept->resize(k);
}

// Locally typical sampling (Meister et al., arXiv 2202.00666): the tokens whose surprise is closest to the entropy.
void KeepTypical(float mass, std::vector<Scored>* kept) {
  const double log_z = std::log(SumExp(*kept));
  double entropy = 0;
  for (const Scored& item : *kept) entropy -= std::exp(item.score - log_z) * (item.score - log_z);
  const auto closer = [&](const Scored& a, const Scored& b) {
    const double da = std::abs(log_z - a.score - entropy), db = std::abs(log_z - b.score - entropy);
    return da < db || (da == db && a.token < b.token);
  };
  std::sort(kept->begin(), kept->end(), closer);
  double sum = 0;
  size_t count = 0;
  while (count < kept->size() && sum < mass) sum += std::exp((*kept)[count++].score - log_z);
  kept->resize(count);
}

// A heap instead of a sort: usually a few tokens of a large vocabulary hold the mass. target: mass times the sum of
// all.
void KeepTopP(double target, std::vector<Scored>* kept) {
  const auto worse = [](const Scored& a, const Scored& b) { return Better(b, a); };
  std::make_heap(kept->begin(), kept->end(), worse);
  double sum = 0;
  auto end = kept->end();
  while (end != kept->begin() && sum < target) {
    std::pop_heap(kept->begin(), end, worse);
    sum += ExpNonPositive((--end)->score);
  }
  kept->erase(kept->begin(), end);
}

// What the k best or, with k = 0, the best that hold the target's mass are among, of the scores >= floor.
std::vector<Scored> Candidates(std::span<const float> scores, float floor, int32_t k, double target) {
  for (const float likely : kFloors) {
    const float at_least = std::max(likely, floor);
    const bool enough =
        k > 0 ? CountAtLeast(scores, at_least) >= k : SumExpAtLeast(scores, at_least) >= target * (1 + 1e-9);
    if (enough || at_least == floor) return AtLeast(scores, at_least);
  }
  return AtLeast(scores, floor);
}

std::vector<Scored> Truncate(std::span<const float> logits, float max, const SamplingParams& params) {
  const float floor = params.min_p > 0 ? std::log(params.min_p) : kMinusInfinity;
  const std::vector<float> scores = Temper(logits, max, params.temperature);
  const bool top_p_alone = params.top_p < 1 && params.top_k <= 0 && params.typical_p >= 1;
  const double target = top_p_alone ? params.top_p * SumExpAtLeast(scores, floor) : 0;
  std::vector<Scored> kept =
      top_p_alone || params.top_k > 0 ? Candidates(scores, floor, params.top_k, target) : AtLeast(scores, floor);
  if (params.top_k > 0) KeepTopK(params.top_k, &kept);
  if (params.typical_p < 1) KeepTypical(params.typical_p, &kept);
  if (params.top_p < 1) KeepTopP(top_p_alone ? target : params.top_p * SumExp(kept), &kept);
  return kept;
}

int32_t Draw(std::span<const float> logits, const LogitMaximum& max, const SamplingContext& context) {
  const SamplingParams& params = *context.params;
  if (params.temperature == 0) return max.index;
  Best best(1);
  if (Truncates(params)) {
    for (const Scored& item : Truncate(logits, max.value, params)) {
      OfferNoisy(item, NoiseBits(params.seed, context.position, item.token / 4)[item.token % 4], &best);
    }
  } else {
    OfferAllNoisy(Temper(logits, max.value, params.temperature), params, context.position, &best);
  }
  return best.items().front().token;
}

void FillLogprobs(std::span<const float> logits, float max, int num_top, SampledToken* token) {
  const double sum = SumExpAtLeast(Temper(logits, max, 1), kMinusInfinity);
  const float log_z = max + static_cast<float>(std::log(sum));
  token->logprob = logits[token->token] - log_z;
  if (num_top <= 0) return;
  Best best(num_top);
  for (size_t v = 0; v < logits.size(); ++v) {
    if (logits[v] >= best.floor()) best.Offer({static_cast<int32_t>(v), logits[v]});
  }
  for (const Scored& item : best.items()) token->top_logprobs.push_back({item.token, item.score - log_z});
}

}  // namespace

float GumbelNoise(uint64_t seed, int64_t position, int32_t token, NoiseStream stream) {
  return GumbelFromBits(NoiseBits(seed, position, token / 4, stream)[token % 4]);
}

double UniformNoise(uint64_t seed, int64_t position, int32_t index, NoiseStream stream) {
  return UniformFromBits(NoiseBits(seed, position, index / 4, stream)[index % 4]);
}

std::vector<ScoredToken> CoupledTopK(std::span<const float> logits, const SamplingParams& params, int64_t position,
                                     int k) {
  Best best(k);
  if (params.temperature == 0) {
    for (size_t v = 0; v < logits.size(); ++v) {
      if (logits[v] >= best.floor()) best.Offer({static_cast<int32_t>(v), logits[v]});
    }
  } else {
    OfferAllNoisy(Temper(logits, FindLogitMaximum(logits).value, params.temperature), params, position, &best);
  }
  return best.items();
}

PenaltyHistory::PenaltyHistory(std::span<const int32_t> prompt) {
  for (const int32_t token : prompt) ++prompt_counts_[token];
}

void PenaltyHistory::Push(int32_t token) {
  ++output_counts_[token];
  output_.push_back(token);
}

int PenaltyHistory::OutputCount(int32_t token) const {
  const auto it = output_counts_.find(token);
  return it == output_counts_.end() ? 0 : it->second;
}

bool PenaltyHistory::OutputEndsWith(std::span<const int32_t> tokens) const {
  return tokens.size() <= output_.size() && std::equal(tokens.rbegin(), tokens.rend(), output_.rbegin());
}

SampleResult SampleToken(std::span<const float> logits, const SamplingContext& context) {
  std::vector<float> scratch;
  const std::span<const float> processed = Process(logits, context, &scratch);
  const LogitMaximum max = FindLogitMaximum(processed);
  SampleResult result;
  if (max.has_nan || !std::isfinite(max.value)) {
    result.ok = false;
    return result;
  }
  result.token.token = Draw(processed, max, context);
  const int num_top = context.params->logprobs;
  if (num_top >= 0) FillLogprobs(processed, max.value, num_top, &result.token);
  return result;
}

std::vector<TokenProbability> TokenDistribution(std::span<const float> logits, const SamplingContext& context) {
  std::vector<float> scratch;
  const std::span<const float> processed = Process(logits, context, &scratch);
  const LogitMaximum max = FindLogitMaximum(processed);
  if (max.has_nan || !std::isfinite(max.value)) return {};
  if (context.params->temperature == 0) return {{max.index, 1.0f}};
  std::vector<Scored> kept = Truncate(processed, max.value, *context.params);
  std::sort(kept.begin(), kept.end(), [](const Scored& a, const Scored& b) { return a.token < b.token; });
  const double sum = SumExp(kept);
  std::vector<TokenProbability> distribution;
  distribution.reserve(kept.size());
  for (const Scored& item : kept) {
    distribution.push_back({item.token, static_cast<float>(std::exp(double{item.score}) / sum)});
  }
  return distribution;
}

int32_t DrawToken(std::span<const TokenProbability> distribution, uint64_t seed, int64_t position, NoiseStream stream) {
  Best best(1);
  for (const TokenProbability& item : distribution) {
    if (!(item.probability > 0)) continue;
    best.Offer({item.token, std::log(item.probability) + GumbelNoise(seed, position, item.token, stream)});
  }
  return best.items().empty() ? distribution.front().token : best.items().front().token;
}

SampleResult TakeToken(std::span<const float> logits, const SamplingContext& context, int32_t token) {
  SampleResult result;
  result.token.token = token;
  if (context.params->logprobs < 0) return result;
  std::vector<float> scratch;
  const std::span<const float> processed = Process(logits, context, &scratch);
  FillLogprobs(processed, FindLogitMaximum(processed).value, context.params->logprobs, &result.token);
  return result;
}

SampleResult ScoreToken(std::span<const float> logits, int32_t token, int num_top) {
  const LogitMaximum max = FindLogitMaximum(logits);
  SampleResult result;
  result.token.token = token;
  result.ok = !max.has_nan && std::isfinite(max.value);
  if (result.ok) FillLogprobs(logits, max.value, num_top, &result.token);
  return result;
}

}  // namespace linspec
