#include "scheduler/acceptance.h"

#include <algorithm>

#include "absl/functional/function_ref.h"

namespace linspec {
namespace {

using Choose = absl::FunctionRef<SampleResult(int node, const SamplingContext& context)>;

Walk WalkTree(const DraftTree& tree, Choose choose, const WalkInput& input) {
  const std::vector<int32_t> ends = EndTokens(input);
  Walk walk;
  int64_t num_output = input.num_output_tokens;
  for (int node = 0; node >= 0;) {
    const size_t num_banned = num_output < input.params->min_tokens ? ends.size() : 0;
    SampleResult sample = choose(node, {.params = input.params,
                                        .history = input.history,
                                        .banned = std::span(ends).first(num_banned),
                                        .position = input.position + static_cast<int64_t>(walk.path.size())});
    if (!sample.ok) {
      walk.ok = false;
      return walk;
    }
    walk.path.push_back(node);
    const int32_t token = sample.token.token;
    if (std::find(ends.begin(), ends.end(), token) != ends.end()) {
      walk.finish_reason = FinishReason::kStop;
      walk.stop_token = token;
      return walk;
    }
    input.history->Push(token);
    walk.tokens.push_back(std::move(sample.token));
    if (++num_output >= input.params->max_tokens) {
      walk.finish_reason = FinishReason::kLength;
      return walk;
    }
    node = tree.FindChild(node, token);
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
      tree,
      [&](int node, const SamplingContext& context) {
        return SampleToken(logits.subspan(node * vocab_size, vocab_size), context);
      },
      input);
}

Walk WalkTree(const DraftTree& tree, std::span<const int32_t> sampled, const WalkInput& input) {
  return WalkTree(
      tree,
      [&](int node, const SamplingContext&) {
        SampleResult result;
        result.ok = sampled[node] >= 0;
        result.token.token = sampled[node];
        return result;
      },
      input);
}

}  // namespace linspec
