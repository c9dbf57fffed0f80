#include "scheduler/acceptance.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/functional/function_ref.h"

namespace linspec {
namespace {

constexpr double kTypicalThreshold = 0.09, kTypicalAlpha = 0.3;  // as Medusa

using Distribution = std::vector<TokenProbability>;  // by ascending id

struct Choice {
  SampleResult sample;
  int child = -1;  // the node that carries it
};

float ProbabilityOf(const Distribution& distribution, int32_t token) {
  const auto before = [](const TokenProbability& item, int32_t id) { return item.token < id; };
  const auto it = std::lower_bound(distribution.begin(), distribution.end(), token, before);
  return it != distribution.end() && it->token == token ? it->probability : 0;
}

// What a rejected draw from q leaves of p: max(p - q, 0), scaled to sum to 1. An empty q: the token was certain.
Distribution Residual(const Distribution& p, const Distribution& q, int32_t token) {
  Distribution rest;
  double sum = 0;
  for (const TokenProbability& item : p) {
    const float taken = q.empty() ? (item.token == token ? item.probability : 0) : ProbabilityOf(q, item.token);
    if (!(item.probability > taken)) continue;
    rest.push_back({item.token, item.probability - taken});
    sum += rest.back().probability;
  }
  if (rest.empty()) return p;  // p equals q but for rounding
  for (TokenProbability& item : rest) item.probability = static_cast<float>(item.probability / sum);
  return rest;
}

Choice ChooseBySampling(const DraftTree& tree, int node, std::span<const float> logits,
                        const SamplingContext& context) {
  Choice choice{.sample = SampleToken(logits, context)};
  if (choice.sample.ok) choice.child = tree.FindChild(node, choice.sample.token.token);
  return choice;
}

Choice ChooseByRejection(const DraftTree& tree, int node, std::span<const float> logits,
                         const SamplingContext& context) {
  const SamplingParams& params = *context.params;
  Distribution p = TokenDistribution(logits, context);
  if (p.empty()) return {.sample = {.ok = false, .token = {}}};
  int tried = 0;
  for (int child = node + 1; child < tree.num_nodes(); ++child) {
    if (tree.parents[child] != node) continue;
    const int32_t token = tree.tokens[child];
    const Distribution certain, &q = tree.distributions.empty() ? certain : tree.distributions[child];
    const float drawn = q.empty() ? 1.0f : ProbabilityOf(q, token);
    const double u = UniformNoise(params.seed, context.position, tried++, NoiseStream::kAcceptance);
    if (u * drawn < ProbabilityOf(p, token)) return {.sample = TakeToken(logits, context, token), .child = child};
    p = Residual(p, q, token);
  }
  const NoiseStream stream = tried > 0 ? NoiseStream::kResidual : NoiseStream::kTarget;
  return {.sample = TakeToken(logits, context, DrawToken(p, params.seed, context.position, stream))};
}

Choice ChooseTypical(const DraftTree& tree, int node, std::span<const float> logits, const SamplingContext& context) {
  const Distribution p = TokenDistribution(logits, context);
  double entropy = 0;
  for (const TokenProbability& item : p) {
    if (item.probability > 0) entropy -= item.probability * std::log(double{item.probability});
  }
  float least = static_cast<float>(std::min(kTypicalThreshold, kTypicalAlpha * std::exp(-entropy)));
  int best = -1;
  for (int child = node + 1; child < tree.num_nodes(); ++child) {
    if (tree.parents[child] != node || ProbabilityOf(p, tree.tokens[child]) <= least) continue;
    least = ProbabilityOf(p, tree.tokens[child]);
    best = child;
  }
  if (best < 0) return ChooseBySampling(tree, node, logits, context);
  return {.sample = TakeToken(logits, context, tree.tokens[best]), .child = best};
}

Choice ChooseBy(AcceptanceMode mode, const DraftTree& tree, int node, std::span<const float> logits,
                const SamplingContext& context) {
  const bool greedy = context.params->temperature == 0;  // then all of them take the likeliest token
  if (!greedy && mode == AcceptanceMode::kRejection) return ChooseByRejection(tree, node, logits, context);
  if (!greedy && mode == AcceptanceMode::kTypical) return ChooseTypical(tree, node, logits, context);
  return ChooseBySampling(tree, node, logits, context);
}

using Choose = absl::FunctionRef<Choice(int node, const SamplingContext& context)>;

Walk WalkTree(Choose choose, const WalkInput& input) {
  const std::vector<int32_t> ends = EndTokens(input);
  Walk walk;
  int64_t num_output = input.num_output_tokens;
  for (int node = 0; node >= 0;) {
    const size_t num_banned = num_output < input.params->min_tokens ? ends.size() : 0;
    Choice choice = choose(node, {.params = input.params,
                                  .history = input.history,
                                  .banned = std::span(ends).first(num_banned),
                                  .position = input.position + static_cast<int64_t>(walk.path.size())});
    if (!choice.sample.ok) {
      walk.ok = false;
      return walk;
    }
    walk.path.push_back(node);
    const int32_t token = choice.sample.token.token;
    if (std::find(ends.begin(), ends.end(), token) != ends.end()) {
      walk.finish_reason = FinishReason::kStop;
      walk.stop_token = token;
      return walk;
    }
    input.history->Push(token);
    walk.tokens.push_back(std::move(choice.sample.token));
    if (++num_output >= input.params->max_tokens) {
      walk.finish_reason = FinishReason::kLength;
      return walk;
    }
    node = choice.child;
  }
  return walk;
}

}  // namespace

std::vector<int32_t> EndTokens(const WalkInput& input) {
  std::vector<int32_t> ends = input.params->stop_token_ids;
  if (!input.params->ignore_eos) ends.insert(ends.end(), input.eos_token_ids.begin(), input.eos_token_ids.end());
  return ends;
}

Walk WalkTree(const DraftTree& tree, std::span<const float> logits, int64_t vocab_size, const WalkInput& input) {
  return WalkTree(
      [&](int node, const SamplingContext& context) {
        return ChooseBy(input.acceptance, tree, node, logits.subspan(node * vocab_size, vocab_size), context);
      },
      input);
}

Walk WalkTree(const DraftTree& tree, std::span<const int32_t> sampled, const WalkInput& input) {
  return WalkTree(
      [&](int node, const SamplingContext&) {
        Choice choice;
        choice.sample.ok = sampled[node] >= 0;
        choice.sample.token.token = sampled[node];
        choice.child = tree.FindChild(node, sampled[node]);
        return choice;
      },
      input);
}

}  // namespace linspec
