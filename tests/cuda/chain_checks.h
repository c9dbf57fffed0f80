// The draft model's chains on a device against one forward a level with the choice on the host: the same tokens, and
// the same states after a commit.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "models/cuda_chains.h"
#include "tests/cuda/model_checks.h"

namespace linspec {

// Requests with prompts of different lengths, in two pools of the same states, and tokens that the model has not seen
// yet.
struct ChainFixture {
  ChainFixture(Model* model, int count) : vocab(model->config().vocab_size), sampling(count) {
    std::mt19937 random(count);
    for (std::unique_ptr<StatePool>* pool : {&chained, &plain}) *pool = Must(model->CreatePool(count), "pool");
    for (int r = 0; r < count; ++r) {
      const int length = 1 + static_cast<int>(random() % 200), unseen = 1 + static_cast<int>(random() % 5);
      texts.push_back(Tokens(length + unseen, vocab, 31 * count + r));
      sampling[r].seed = r;
      sampling[r].temperature = r % 3 == 0 ? 0.0f : 0.4f + 0.1f * static_cast<float>(r % 8);
      contexts.push_back({.sequence_id = static_cast<uint64_t>(r),
                          .tokens = texts[r],
                          .num_prompt_tokens = 1,
                          .sampling = &sampling[r],
                          .hidden = {},
                          .max_nodes = 8,
                          .draw = r % 5 == 4 ? DraftDraw::kLikeliest : DraftDraw::kCoupled});
      DraftTree tree;
      for (int i = 0; i < unseen; ++i) tree.Add(texts[r][length + i], i - 1);
      for (StatePool* pool : {chained.get(), plain.get()}) {
        slots.push_back(pool->Acquire());
        const PrefillChunk chunks[] = {{slots.back().id(), std::span(texts[r]).first(length)}};
        Must(model->Prefill(chunks, pool), "prefill");
      }
      known.Add(slots.back().id(), tree);  // the same number in both pools
    }
    for (const DraftContext& context : contexts) pointers.push_back(&context);
  }
  const int64_t vocab;
  std::unique_ptr<StatePool> chained, plain;
  std::vector<StateSlot> slots;
  std::vector<std::vector<int32_t>> texts;
  std::vector<SamplingParams> sampling;
  std::vector<DraftContext> contexts;
  std::vector<const DraftContext*> pointers;
  VerifyBatch known;
};

// The guesses by one forward a level, chosen on the host.
inline DraftGuesses LevelByLevel(Model* model, const ChainFixture& f, int num_levels, int top_k) {
  DraftGuesses guesses{num_levels, top_k, {}};
  guesses.candidates.resize(f.contexts.size() * num_levels * top_k, {-1, 0});
  for (int level = 0; level < num_levels; ++level) {
    DraftGuesses above{level + 1, top_k, {}};
    above.candidates.resize(f.contexts.size() * above.num_levels * top_k);
    for (size_t r = 0; r < f.contexts.size(); ++r) {
      for (int l = 0; l < level; ++l) std::ranges::copy(guesses.Slots(r, l), above.Slots(r, l).begin());
    }
    const VerifyBatch batch = LookedAt(f.known, above);
    const VerifyResult result = Must(model->Verify(batch, *f.plain), "verify");
    for (size_t r = 0; r < f.contexts.size(); ++r) {
      const DraftContext& context = f.contexts[r];
      const auto logits = result.logits.subspan((batch.row_starts[r + 1] - 1) * f.vocab, f.vocab);
      std::ranges::copy(LikelyChoices(logits, *context.sampling, std::ssize(context.tokens) + level, top_k,
                                      context.draw == DraftDraw::kCoupled),
                        guesses.Slots(r, level).begin());
    }
  }
  return guesses;
}

// What is committed from a chain's rows is what is committed from a verified tree's, to the bit.
inline bool SameStates(Model* model, DraftChains* chains, const ChainFixture& f, const VerifyBatch& looked_at) {
  std::vector<std::vector<int32_t>> paths(f.contexts.size());
  VerifyBatch next;
  for (size_t r = 0; r < paths.size(); ++r) {
    const int nodes = looked_at.row_starts[r + 1] - looked_at.row_starts[r];
    for (int node = 0; node < nodes - static_cast<int>(r % 3) * nodes / 3; ++node) paths[r].push_back(node);
    next.Add(looked_at.slots[r], DraftTree::Root(static_cast<int32_t>(r % f.vocab)));
  }
  Must(chains->Commit(looked_at, paths, f.chained.get()), "commit");
  Must(model->Verify(looked_at, *f.plain).status(), "verify");
  Must(model->Commit(looked_at, paths, f.plain.get()), "commit");
  const auto logits = [&](const StatePool& pool) {
    const VerifyResult result = Must(model->Verify(next, pool), "verify");
    return std::vector<float>(result.logits.begin(), result.logits.end());
  };
  return logits(*f.chained) == logits(*f.plain);
}

inline void ChainsAsTheHost(const std::string& name, std::unique_ptr<Model> model) {
  constexpr int kLevels = 5, kTopK = 3;
  constexpr float kOddsTolerance = 0.03f;  // the host sums the exponentials of all tokens within 3 %
  const auto chains = MakeCudaChains(*model);
  for (const int count : {1, 3, 16, 48}) {
    const ChainFixture f(model.get(), count);
    const DraftGuesses expected = LevelByLevel(model.get(), f, kLevels, kTopK);
    int different = 0, others = 0;
    float worst_odds = 0;
    DraftGuesses guesses;
    for (int repeat = 0; repeat < 3; ++repeat) {  // launched, captured, replayed
      guesses = Must(chains->Guess(f.known, *f.chained, f.pointers, kLevels, kTopK), "chains");
      for (size_t i = 0; i < guesses.candidates.size(); ++i) {
        const DraftCandidate &mine = guesses.candidates[i], &theirs = expected.candidates[i];
        if (mine.token == theirs.token) {
          worst_odds = std::max(worst_odds, std::abs(mine.probability - theirs.probability));
        } else {
          ++(i % kTopK == 0 ? different : others);
        }
      }
    }
    const int choices = static_cast<int>(guesses.candidates.size()) / kTopK * 3;
    Report(fmt::format("{} chains of {} requests: the host's tokens", name, count),
           different == 0 && others <= choices / 50 && worst_odds < kOddsTolerance,
           fmt::format("{} of {} tokens differ, {} of those beside them, odds by {:.1e}", different, choices, others,
                       worst_odds));
    Report(fmt::format("{} chains of {} requests: committed as a tree", name, count),
           SameStates(model.get(), chains.get(), f, LookedAt(f.known, guesses)));
  }
}

}  // namespace linspec
