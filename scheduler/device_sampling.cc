#include "scheduler/device_sampling.h"

#include <limits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace linspec {
namespace {

bool HasPenalties(const SamplingParams& params) {
  return params.repetition_penalty != 1.0f || params.frequency_penalty != 0.0f || params.presence_penalty != 0.0f;
}

using Edits = std::unordered_map<int32_t, LogitEdit>;

LogitEdit& EditOf(int32_t token, Edits* edits) {
  return edits->try_emplace(token, LogitEdit{.token = token}).first->second;
}

void Penalize(int32_t token, int output_count, const SamplingParams& params, Edits* edits) {
  LogitEdit& edit = EditOf(token, edits);
  edit.repetition = params.repetition_penalty;
  if (output_count > 0) {
    edit.subtract = params.frequency_penalty * static_cast<float>(output_count) + params.presence_penalty;
  }
}

// Of the request as it stands: bias, and penalties of prompt and output.
Edits CommonEdits(const WalkInput& input) {
  const SamplingParams& params = *input.params;
  Edits edits;
  for (const auto& [token, bias] : params.logit_bias) EditOf(token, &edits).bias = bias;
  if (!HasPenalties(params)) return edits;
  for (const auto& [token, count] : input.history->prompt_counts()) Penalize(token, 0, params, &edits);
  for (const auto& [token, count] : input.history->output_counts()) Penalize(token, count, params, &edits);
  return edits;
}

// The tokens below the root on the way to `node`, each with how often.
std::unordered_map<int32_t, int> PathCounts(const DraftTree& tree, int node) {
  std::unordered_map<int32_t, int> counts;
  for (int i = node; i > 0; i = tree.parents[i]) ++counts[tree.tokens[i]];
  return counts;
}

}  // namespace

bool ChosenOnDevice(const SamplingParams& params, AcceptanceMode acceptance) {
  const bool coupled = acceptance == AcceptanceMode::kGumbel || params.temperature == 0;
  const bool restricted = !params.allowed_token_ids.empty() || !params.banned_sequences.empty();
  return coupled && params.logprobs < 0 && params.typical_p >= 1.0f && !restricted;
}

bool ChosenAlike(const WalkInput& input, int64_t more_tokens) {
  const auto ends_banned = [&](int64_t num_output) { return num_output < input.params->min_tokens; };
  return !HasPenalties(*input.params) &&
         ends_banned(input.num_output_tokens) == ends_banned(input.num_output_tokens + more_tokens);
}

void AppendRowSampling(const DraftTree& tree, const WalkInput& input, VerifyBatch* batch) {
  const SamplingParams& params = *input.params;
  if (!ChosenOnDevice(params, input.acceptance)) {
    batch->sampling.resize(batch->sampling.size() + tree.num_nodes());
    return;
  }
  const std::vector<int> depths = tree.Depths();
  const std::vector<int32_t> ends = EndTokens(input);
  const bool edited = HasPenalties(params) || !params.logit_bias.empty() ||
                      (!ends.empty() && input.num_output_tokens < params.min_tokens);
  const Edits common = edited ? CommonEdits(input) : Edits();
  for (int node = 0; node < tree.num_nodes(); ++node) {
    const int depth = depths[node];
    const bool ends_banned = !ends.empty() && input.num_output_tokens + depth < params.min_tokens;
    RowSampling row{.seed = params.seed,
                    .position = input.position + depth,
                    .temperature = params.temperature,
                    .top_p = params.top_p,
                    .min_p = params.min_p,
                    .top_k = params.top_k,
                    .edits_begin = static_cast<int32_t>(batch->edits.size()),
                    .edits_count = 0};
    if ((depth > 0 && HasPenalties(params)) || ends_banned) {
      Edits edits = common;
      if (HasPenalties(params)) {
        for (const auto& [token, count] : PathCounts(tree, node)) {
          Penalize(token, input.history->OutputCount(token) + count, params, &edits);
        }
      }
      if (ends_banned) {
        for (const int32_t token : ends) EditOf(token, &edits).subtract = std::numeric_limits<float>::infinity();
      }
      for (const auto& [token, edit] : edits) batch->edits.push_back(edit);
    } else {
      for (const auto& [token, edit] : common) batch->edits.push_back(edit);
    }
    row.edits_count = static_cast<int32_t>(batch->edits.size()) - row.edits_begin;
    batch->sampling.push_back(row);
  }
}

}  // namespace linspec
