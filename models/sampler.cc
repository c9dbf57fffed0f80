#include "models/sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/philox.h"

namespace linspec {
namespace {

constexpr float kLn2 = 0.69314718f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kGumbelMax = 22.9f;  // 32 random bits bound the noise: 33 ln 2 = 22.87

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

struct Maximum {
  float value = kMinusInfinity;
  int32_t token = -1;
  bool has_nan = false;
};

Maximum FindMaximum(std::span<const float> logits) {
  Maximum max;
  for (size_t v = 0; v < logits.size(); ++v) {
    if (logits[v] > max.value) {
      max.value = logits[v];
      max.token = static_cast<int32_t>(v);
    }
    max.has_nan |= logits[v] != logits[v];
  }
  return max;
}

// Subtracting the maximum first keeps the quotient finite for any temperature.
float Temper(float logit, float max, float temperature) { return (logit - max) / temperature; }

void OfferAllNoisy(std::span<const float> logits, float max, const SamplingParams& params, int64_t position,
                   Best* best) {
  const int32_t size = static_cast<int32_t>(logits.size());
  for (int32_t begin = 0; begin < size; begin += 4) {
    const int32_t end = std::min(begin + 4, size);
    const float highest = *std::max_element(logits.begin() + begin, logits.begin() + end);
    if (Temper(highest, max, params.temperature) + kGumbelMax < best->floor()) continue;
    const std::array<uint32_t, 4> bits = NoiseBits(params.seed, position, begin / 4);
    for (int32_t v = begin; v < end; ++v) {
      OfferNoisy({v, Temper(logits[v], max, params.temperature)}, bits[v - begin], best);
    }
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

// Everything before the temperature. Returns `logits` itself when there is nothing to change.
std::span<const float> Process(std::span<const float> logits, const SamplingContext& context,
                               std::vector<float>* scratch) {
  const SamplingParams& params = *context.params;
  if (!HasPenalties(params) && params.logit_bias.empty() && context.banned.empty()) return logits;
  scratch->assign(logits.begin(), logits.end());
  for (const auto& [token, bias] : params.logit_bias) (*scratch)[token] += bias;
  if (HasPenalties(params)) ApplyPenalties(params, *context.history, *scratch);
  for (const int32_t token : context.banned) (*scratch)[token] = kMinusInfinity;
  return *scratch;
}

bool Truncates(const SamplingParams& params) {
  return params.top_p < 1 || params.top_k > 0 || params.min_p > 0 || params.typical_p < 1;
}

double SumExp(const std::vector<Scored>& tempered) {
  double sum = 0;
  for (const Scored& item : tempered) sum += std::exp(item.score);
  return sum;
}

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

// A heap instead of a sort: usually a few tokens of a large vocabulary hold the mass.
void KeepTopP(float mass, std::vector<Scored>* kept) {
  const double target = mass * SumExp(*kept);
  const auto worse = [](const Scored& a, const Scored& b) { return Better(b, a); };
  std::make_heap(kept->begin(), kept->end(), worse);
  double sum = 0;
  auto end = kept->end();
  while (end != kept->begin() && sum < target) {
    std::pop_heap(kept->begin(), end, worse);
    sum += std::exp((--end)->score);
  }
  kept->erase(kept->begin(), end);
}

std::vector<Scored> Truncate(std::span<const float> logits, float max, const SamplingParams& params) {
  const float floor = params.min_p > 0 ? std::log(params.min_p) : kMinusInfinity;
  std::vector<Scored> kept;
  kept.reserve(logits.size());
  for (size_t v = 0; v < logits.size(); ++v) {
    const float score = Temper(logits[v], max, params.temperature);
    if (score >= floor && score > kMinusInfinity) kept.push_back({static_cast<int32_t>(v), score});
  }
  if (params.top_k > 0) KeepTopK(params.top_k, &kept);
  if (params.typical_p < 1) KeepTypical(params.typical_p, &kept);
  if (params.top_p < 1) KeepTopP(params.top_p, &kept);
  return kept;
}

int32_t Draw(std::span<const float> logits, const Maximum& max, const SamplingContext& context) {
  const SamplingParams& params = *context.params;
  if (params.temperature == 0) return max.token;
  Best best(1);
  if (Truncates(params)) {
    for (const Scored& item : Truncate(logits, max.value, params)) {
      OfferNoisy(item, NoiseBits(params.seed, context.position, item.token / 4)[item.token % 4], &best);
    }
  } else {
    OfferAllNoisy(logits, max.value, params, context.position, &best);
  }
  return best.items().front().token;
}

void FillLogprobs(std::span<const float> logits, float max, int num_top, SampledToken* token) {
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - max);
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
    OfferAllNoisy(logits, FindMaximum(logits).value, params, position, &best);
  }
  return best.items();
}

PenaltyHistory::PenaltyHistory(std::span<const int32_t> prompt) {
  for (const int32_t token : prompt) ++prompt_counts_[token];
}

void PenaltyHistory::Push(int32_t token) { ++output_counts_[token]; }

void PenaltyHistory::Pop(int32_t token) {
  const auto it = output_counts_.find(token);
  if (it != output_counts_.end() && --it->second == 0) output_counts_.erase(it);
}

int PenaltyHistory::OutputCount(int32_t token) const {
  const auto it = output_counts_.find(token);
  return it == output_counts_.end() ? 0 : it->second;
}

bool PenaltyHistory::Seen(int32_t token) const {
  return prompt_counts_.contains(token) || output_counts_.contains(token);
}

SampleResult SampleToken(std::span<const float> logits, const SamplingContext& context) {
  std::vector<float> scratch;
  const std::span<const float> processed = Process(logits, context, &scratch);
  const Maximum max = FindMaximum(processed);
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
  const Maximum max = FindMaximum(processed);
  if (max.has_nan || !std::isfinite(max.value)) return {};
  if (context.params->temperature == 0) return {{max.token, 1.0f}};
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
  FillLogprobs(processed, FindMaximum(processed).value, context.params->logprobs, &result.token);
  return result;
}

SampleResult ScoreToken(std::span<const float> logits, int32_t token, int num_top) {
  const Maximum max = FindMaximum(logits);
  SampleResult result;
  result.token.token = token;
  result.ok = !max.has_nan && std::isfinite(max.value);
  if (result.ok) FillLogprobs(logits, max.value, num_top, &result.token);
  return result;
}

}  // namespace linspec
