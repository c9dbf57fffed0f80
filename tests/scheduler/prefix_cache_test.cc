#include "scheduler/prefix_cache.h"

#include <numeric>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/scheduler/test_engine.h"

namespace linspec {
namespace {

using Tokens = std::vector<int32_t>;
using Place = PrefixCache::Place;

Tokens Upward(int first, int count) {
  Tokens tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  for (int32_t& token : tokens) token %= 32;
  return tokens;
}

Tokens Concat(Tokens a, const Tokens& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// The cache over real slots whose first value says what they hold.
class PrefixCacheTest : public testing::Test {
 protected:
  static constexpr int kCapacity = 4;

  PrefixCacheTest() : pool_(*StatePool::Create(FakeModel().config(), 2 + kCapacity)), cache_(pool_.get(), kCapacity) {
    work_ = pool_->Acquire();
  }

  StateSlot Holding(const Tokens& tokens) {
    StateSlot slot = pool_->Acquire();
    Set(slot.id(), tokens);
    return slot;
  }
  void Set(int32_t slot, const Tokens& tokens) {
    *static_cast<float*>(pool_->layer(slot, 0).s) =
        static_cast<float>(std::accumulate(tokens.begin(), tokens.end(), 0));
    pool_->set_length(slot, std::ssize(tokens));
  }
  // How many tokens of the prompt were there; holds that the state is theirs.
  int64_t Restore(const Tokens& prompt, std::string_view tenant = "", int64_t committed = 0) {
    const int64_t length = cache_.Restore(tenant, prompt, committed, work_.id());
    if (length > 0) {
      EXPECT_EQ(pool_->length(work_.id()), length);
      EXPECT_EQ(*static_cast<float*>(pool_->layer(work_.id(), 0).s),
                std::accumulate(prompt.begin(), prompt.begin() + length, 0));
    }
    return length;
  }

  std::unique_ptr<StatePool> pool_;
  PrefixCache cache_;
  StateSlot work_;
};

TEST_F(PrefixCacheTest, SharedIsAMultipleOfTheGrainOrThePromptLessItsLastToken) {
  const Tokens prompt = Upward(0, 200);
  EXPECT_EQ(PrefixCache::Shared(prompt, prompt), 199);
  EXPECT_EQ(PrefixCache::Shared(prompt, Upward(0, 199)), 199);
  EXPECT_EQ(PrefixCache::Shared(prompt, Upward(0, 198)), 192);
  EXPECT_EQ(PrefixCache::Shared(prompt, Concat(Upward(0, 130), Upward(7, 100))), 128);
  EXPECT_EQ(PrefixCache::Shared(prompt, Upward(1, 200)), 0);
  EXPECT_EQ(PrefixCache::Shared(Upward(0, 64), Upward(0, 64)), 0);  // 63 tokens are not worth a slot
  EXPECT_EQ(PrefixCache::Shared(Upward(0, 65), Upward(0, 65)), 64);
  EXPECT_EQ(PrefixCache::Shared({}, prompt), 0);
}

TEST_F(PrefixCacheTest, RestoresTheLongestStateThatThePromptStartsWith) {
  cache_.Keep("", Upward(0, 64), Holding(Upward(0, 64)));
  Set(work_.id(), Upward(0, 128));
  cache_.Snapshot("", Upward(0, 128), work_.id(), Place::kParting);
  cache_.Keep("", Upward(3, 150), Holding(Upward(3, 150)));
  EXPECT_EQ(Restore(Upward(0, 200)), 128);
  EXPECT_EQ(Restore(Upward(0, 129)), 128);
  EXPECT_EQ(Restore(Upward(0, 128)), 64);  // the last token's logits are wanted
  EXPECT_EQ(Restore(Upward(0, 64)), 0);
  EXPECT_EQ(Restore(Upward(3, 151)), 150);
  EXPECT_EQ(Restore(Upward(5, 200)), 0);
  EXPECT_EQ(Restore(Upward(0, 200), "", 128), 0);  // no more than there is already
  EXPECT_EQ(cache_.LongestShared("", Upward(0, 150)), 128);
}

TEST_F(PrefixCacheTest, TenantsDoNotShare) {
  cache_.Keep("a", Upward(0, 100), Holding(Upward(0, 100)));
  EXPECT_EQ(Restore(Upward(0, 200), "b"), 0);
  EXPECT_EQ(Restore(Upward(0, 200), ""), 0);
  EXPECT_EQ(cache_.LongestShared("b", Upward(0, 200)), 0);
  EXPECT_EQ(Restore(Upward(0, 200), "a"), 100);
}

TEST_F(PrefixCacheTest, AConversationHoldsTwoEntriesOnceThereIsNoRoom) {
  const auto snapshot = [&](const Tokens& tokens, Place place) {
    Set(work_.id(), tokens);
    cache_.Snapshot("", tokens, work_.id(), place);
  };
  snapshot(Upward(0, 64), Place::kParting);
  cache_.Keep("", Upward(5, 64), Holding(Upward(5, 64)));
  for (const int length : {100, 200, 300}) {  // turns
    snapshot(Upward(0, length), Place::kPromptEnd);
    cache_.Keep("", Upward(0, length + 50), Holding(Upward(0, length + 50)));
    EXPECT_EQ(Restore(Upward(0, length + 100)), length + 50);
    EXPECT_EQ(Restore(Concat(Upward(0, length + 20), Upward(3, 80))), length);  // the answer came back as other tokens
  }
  EXPECT_EQ(Restore(Upward(0, 290)), 64);  // not 200 or 250
  EXPECT_EQ(Restore(Upward(5, 70)), 64);
  EXPECT_EQ(cache_.size(), kCapacity);
}

TEST_F(PrefixCacheTest, WhatWasContinuedServesAsLongAsThereIsRoom) {
  cache_.Keep("", Upward(0, 100), Holding(Upward(0, 100)));
  cache_.Keep("", Upward(0, 150), Holding(Upward(0, 150)));
  EXPECT_EQ(Restore(Concat(Upward(0, 120), Upward(3, 80))), 100);
}

TEST_F(PrefixCacheTest, WhatIsKnownTakesNoSecondSlot) {
  cache_.Keep("", Upward(0, 100), Holding(Upward(0, 100)));
  cache_.Keep("", Upward(0, 100), Holding(Upward(0, 100)));
  Set(work_.id(), Upward(0, 100));
  cache_.Snapshot("", Upward(0, 100), work_.id(), Place::kParting);
  EXPECT_EQ(cache_.size(), 1);
  EXPECT_EQ(pool_->num_free(), pool_->capacity() - 2);  // work_ and the entry
}

TEST_F(PrefixCacheTest, TheLeastRecentlyUsedGoesAndWhatWasNeverAskedForGoesFirst) {
  for (const int first : {1, 2, 3, 4}) cache_.Keep("", Upward(first, 64), Holding(Upward(first, 64)));
  EXPECT_EQ(Restore(Upward(1, 100)), 64);
  EXPECT_EQ(Restore(Upward(3, 100)), 64);
  for (const int first : {5, 6, 7, 8, 9}) cache_.Keep("", Upward(first, 64), Holding(Upward(first, 64)));
  EXPECT_EQ(cache_.size(), kCapacity);
  EXPECT_EQ(pool_->num_free(), pool_->capacity() - 1 - kCapacity);
  EXPECT_EQ(Restore(Upward(2, 100)), 0);
  EXPECT_EQ(Restore(Upward(1, 100)), 64);
  EXPECT_EQ(Restore(Upward(3, 100)), 64);
  EXPECT_EQ(Restore(Upward(9, 100)), 64);
  // All three may stay, but the fourth place is for what is new: asked for as well, it sends the oldest back among
  // them.
  EXPECT_EQ(Restore(Upward(8, 100)), 64);
  cache_.Keep("", Upward(10, 64), Holding(Upward(10, 64)));
  EXPECT_EQ(Restore(Upward(1, 100)), 0);
}

TEST_F(PrefixCacheTest, WithoutCapacityItKeepsNothing) {
  PrefixCache none(pool_.get(), 0);
  none.Keep("", Upward(0, 100), Holding(Upward(0, 100)));
  none.Snapshot("", Upward(0, 100), work_.id(), Place::kParting);
  EXPECT_EQ(none.size(), 0);
  EXPECT_EQ(none.Restore("", Upward(0, 200), 0, work_.id()), 0);
  EXPECT_EQ(pool_->num_free(), pool_->capacity() - 1);
}

// The engine with the cache: what a request receives is what it receives without.
class PrefixReuseTest : public testing::Test {
 protected:
  static EngineOptions Options(int entries) {
    EngineOptions options = TestEngine::StaticOptions();
    options.prefix_cache_entries = entries;
    options.max_step_tokens = 48;
    return options;
  }
  static Tokens Plain(const Tokens& prompt, int max_tokens) {
    TestEngine engine;
    EXPECT_TRUE(engine.Submit(TestEngine::MakeRequest(1, prompt, max_tokens)).ok());
    engine.RunAll();
    return engine.results[1].tokens;
  }
  // Submits, runs to the end, and compares with plain decoding.
  int64_t CachedTokens(TestEngine* engine, const Tokens& prompt, int max_tokens = 8) {
    const uint64_t id = ++next_id_;
    EXPECT_TRUE(engine->Submit(TestEngine::MakeRequest(id, prompt, max_tokens)).ok());
    engine->RunAll();
    EXPECT_EQ(engine->results[id].tokens, Plain(prompt, max_tokens));
    return engine->results[id].last.num_cached_tokens;
  }
  int64_t CachedTokensOf(TestEngine* engine, const Tokens& prompt, const std::string& tenant, const std::string& salt) {
    const uint64_t id = ++next_id_;
    Request request = TestEngine::MakeRequest(id, prompt, 4);
    request.tenant = tenant;
    request.cache_salt = salt;
    EXPECT_TRUE(engine->Submit(std::move(request)).ok());
    engine->RunAll();
    return engine->results[id].last.num_cached_tokens;
  }
  static int64_t Prefilled(const TestEngine& engine) {
    int64_t tokens = 0;
    for (const StepStats& step : engine.steps) tokens += step.num_prefill_tokens;
    return tokens;
  }
  uint64_t next_id_ = 0;
};

TEST_F(PrefixReuseTest, TheNextTurnOfAChatStartsWhereTheLastEnded) {
  TestEngine engine(Options(4));
  const Tokens first = Upward(0, 100);
  EXPECT_EQ(CachedTokens(&engine, first), 0);
  const Tokens second = Concat(Concat(first, engine.results[1].tokens), Upward(9, 50));
  EXPECT_GE(CachedTokens(&engine, second), 100);
  EXPECT_EQ(engine->stats().prefix_cache_entries, 2);  // their ends; such short prompts get no entry
  int64_t queries = 0, hits = 0;
  for (const StepStats& step : engine.steps) {
    queries += step.num_prefix_queries;
    hits += step.num_prefix_hits;
  }
  EXPECT_EQ(queries, std::ssize(first) + std::ssize(second) - 2);
  EXPECT_EQ(hits, engine.results[2].last.num_cached_tokens);
}

TEST_F(PrefixReuseTest, WhatWasDecodedIsNotKeptWherePrefillRoundsDifferently) {
  TestEngine engine(Options(4));
  engine.model().same_bits = false;
  const Tokens first = Upward(0, 200);
  EXPECT_EQ(CachedTokens(&engine, first), 0);
  EXPECT_EQ(engine->stats().prefix_cache_entries, 1);
  EXPECT_EQ(CachedTokens(&engine, Concat(Concat(first, engine.results[1].tokens), Upward(9, 50))), 199);
}

TEST_F(PrefixReuseTest, ASharedBeginningIsKeptWhenSeenTwice) {
  TestEngine engine(Options(4));
  const Tokens system = Upward(0, 150);
  EXPECT_EQ(CachedTokens(&engine, Concat(system, Upward(3, 40))), 0);
  EXPECT_EQ(CachedTokens(&engine, Concat(system, Upward(8, 40))), 0);  // sees where the two part
  EXPECT_EQ(CachedTokens(&engine, Concat(system, Upward(21, 40))), 128);
  EXPECT_EQ(CachedTokens(&engine, Concat(system, Upward(25, 1))), 128);
  EXPECT_EQ(CachedTokens(&engine, Upward(4, 150)), 0);
}

TEST_F(PrefixReuseTest, StatesAreSharedWithinATenantAndASaltOnly) {
  TestEngine engine(Options(8));
  const Tokens prompt = Upward(0, 300);
  for (const auto& [tenant, salt] : {std::pair("", ""), {"a", ""}, {"a", "1"}, {"a", "2"}, {"b", "1"}}) {
    EXPECT_EQ(CachedTokensOf(&engine, prompt, tenant, salt), 0) << tenant << salt;
    EXPECT_EQ(CachedTokensOf(&engine, prompt, tenant, salt), 299) << tenant << salt;
  }
}

TEST_F(PrefixReuseTest, CopiesOfOnePromptAreComputedOnce) {
  TestEngine engine(Options(2));
  const Tokens prompt = Upward(0, 500);
  for (uint64_t id = 1; id <= 5; ++id) {
    ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(id, prompt, 6)).ok());
  }
  ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(6, Concat(Upward(0, 200), Upward(9, 90)), 6)).ok());
  engine.RunAll();
  for (uint64_t id = 1; id <= 5; ++id) {
    EXPECT_EQ(engine.results[id].tokens, Plain(prompt, 6));
    EXPECT_EQ(engine.results[id].last.num_cached_tokens, id == 1 ? 0 : 499);
  }
  EXPECT_EQ(engine.results[6].tokens, Plain(Concat(Upward(0, 200), Upward(9, 90)), 6));
  EXPECT_EQ(engine.results[6].last.num_cached_tokens, 192);
  EXPECT_EQ(Prefilled(engine), 499 + 289 - 192);
}

TEST_F(PrefixReuseTest, WhoWaitsForARequestThatEndsGoesOn) {
  for (const int steps : {0, 1, 3, 9, 10, 11}) {
    TestEngine engine(Options(2));
    const Tokens prompt = Upward(0, 400);
    for (uint64_t id = 1; id <= 3; ++id) {
      ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(id, prompt, 6)).ok());
    }
    for (int i = 0; i < steps; ++i) engine->Step();
    engine->Cancel(1);
    engine.RunAll();
    EXPECT_EQ(engine.results[1].last.finish_reason, FinishReason::kCancelled);
    for (uint64_t id = 2; id <= 3; ++id) EXPECT_EQ(engine.results[id].tokens, Plain(prompt, 6)) << steps;
    EXPECT_GT(engine.results[3].last.num_cached_tokens, 0);
  }
}

TEST_F(PrefixReuseTest, WaitingRequestsCanBeCancelledAndFail) {
  TestEngine engine(Options(2));
  const Tokens prompt = Upward(0, 400);
  for (uint64_t id = 1; id <= 3; ++id) ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(id, prompt, 6)).ok());
  engine->Step();
  engine->Cancel(2);
  engine.RunAll();
  EXPECT_EQ(engine.results[2].last.finish_reason, FinishReason::kCancelled);
  EXPECT_EQ(engine.results[3].tokens, Plain(prompt, 6));
}

TEST_F(PrefixReuseTest, ScoredPromptsAreComputedWhole) {
  TestEngine engine(Options(4));
  const Tokens prompt = Upward(0, 150);
  EXPECT_EQ(CachedTokens(&engine, prompt), 0);
  Request scored = TestEngine::MakeRequest(++next_id_, prompt, 4);
  scored.prompt_logprobs = true;
  ASSERT_TRUE(engine.Submit(scored).ok());
  engine.RunAll();
  EXPECT_EQ(engine.results[next_id_].last.num_cached_tokens, 0);
  EXPECT_EQ(engine.results[next_id_].tokens, Concat(prompt, Plain(prompt, 4)));
}

TEST_F(PrefixReuseTest, AFullHouseStillFitsEveryRequest) {
  EngineOptions options = Options(3);
  options.max_requests = 4;
  TestEngine engine(options);
  for (uint64_t id = 1; id <= 40; ++id) {
    const Tokens prompt = Concat(Upward(static_cast<int>(id % 5), 70), Upward(static_cast<int>(id), 30));
    ASSERT_TRUE(engine.Submit(TestEngine::MakeRequest(id, prompt, 5)).ok());
  }
  int most = 0;
  while (engine->Step()) {
    const EngineStats stats = engine->stats();
    most = std::max(most, static_cast<int>(stats.slots_total - stats.slots_free));
    EXPECT_GE(stats.slots_free, 0);
    EXPECT_LE(stats.prefix_cache_entries, 3);
  }
  EXPECT_EQ(most, 4);
  EXPECT_EQ(engine->stats().slots_total, 4);
  EXPECT_EQ(engine->stats().slots_free, 4);
  for (uint64_t id = 1; id <= 40; ++id) {
    EXPECT_EQ(engine.results[id].tokens,
              Plain(Concat(Upward(static_cast<int>(id % 5), 70), Upward(static_cast<int>(id), 30)), 5));
  }
}

}  // namespace
}  // namespace linspec
