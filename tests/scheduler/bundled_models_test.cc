// The bundled models with every drafter say, to the bit, what the target says alone: greedy and sampled, drafting
// always and drafting what pays, alone and beside requests that come, go and are cancelled.
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "gtest/gtest.h"
#include "models/draft_model_drafter.h"
#include "models/medusa_drafter.h"
#include "models/ngram_drafter.h"
#include "models/recurrent_drafter.h"
#include "models/tokenizer.h"
#include "scheduler/engine.h"

namespace linspec {
namespace {

// Either way a group's end is crossed while tokens are generated. Under ThreadSanitizer, where every load of a weight
// is checked, most of the group is prompt, which is read in blocks, and only all drafters together meet the crowd.
#ifdef __SANITIZE_THREAD__
constexpr int kTokens = 12, kTurns = 2;
constexpr size_t kMinPromptTokens = 58;
constexpr uint64_t kCrowd = 5;
constexpr bool kCrowdEveryDrafter = false;
#else
constexpr int kTokens = 72, kTurns = 3;
constexpr size_t kMinPromptTokens = 0;
constexpr uint64_t kCrowd = 13;
constexpr bool kCrowdEveryDrafter = true;
#endif

const std::string kFolder = LINSPEC_SOURCE_DIR "/models/bundled/";

struct Said {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  FinishReason reason = FinishReason::kNone;
  int64_t accepted = 0, steps = 0;
  bool operator==(const Said& other) const {
    return tokens == other.tokens && logprobs == other.logprobs && reason == other.reason;
  }
};

class BundledModelsTest : public ::testing::Test {
 protected:
  // kind: "", "draft", "draft tree", "medusa", "medusa static", "recurrent", "recurrent tree", "ngram"
  // or "auto" (all of them).
  std::unique_ptr<Engine> MakeEngine(const std::string& kind, bool adaptive, int prefix_cache = 0) {
    const std::shared_ptr<CpuOps> ops = *CpuOps::Create({.num_threads = 2});
    auto target = LoadModel({.path = kFolder + "target", .state_dtype = state_dtype_, .ops = ops});
    EXPECT_TRUE(target.ok()) << target.status().message();
    const int64_t vocab = (*target)->config().vocab_size;
    std::vector<std::unique_ptr<Drafter>> drafters;
    if (kind.starts_with("draft") || kind == "auto") {
      const bool tree = kind == "draft tree";
      auto draft = LoadModel({.path = kFolder + "draft", .state_dtype = state_dtype_, .ops = ops});
      EXPECT_TRUE(draft.ok()) << draft.status().message();
      drafters.push_back(
          *DraftModelDrafter::Create(*std::move(draft), vocab, {.top_k = tree ? 3 : 1, .min_confidence = 0}));
    }
    if (kind.starts_with("medusa") || kind == "auto") {
      auto heads = MedusaHeads::Load(kFolder + "target", (*target)->config(), "auto", ops);
      EXPECT_TRUE(heads.ok()) << heads.status().message();
      const MedusaTree tree = kind == "medusa static" ? MedusaTree::kMcSim7b63 : MedusaTree::kDynamic;
      drafters.push_back(*MedusaDrafter::Create(MakeMedusaGuesser(*std::move(heads), target->get()), {.tree = tree}));
    }
    if (kind.starts_with("recurrent") || kind == "auto") {
      auto head = RecurrentHead::Load(kFolder + "target", (*target)->config(), "auto", ops);
      EXPECT_TRUE(head.ok()) << head.status().message();
      const bool tree = kind == "recurrent tree";
      drafters.push_back(
          *RecurrentDrafter::Create(*std::move(head), target->get(), {.top_k = tree ? 3 : 1, .min_confidence = 0}));
    }
    if (kind == "ngram" || kind == "auto") drafters.push_back(std::make_unique<NgramDrafter>());
    EngineOptions options;
    options.max_requests = 4;
    options.prefix_cache_entries = prefix_cache;
    options.calibrate = adaptive;
    options.max_draft_nodes = 8;
    auto engine = Engine::Create(*std::move(target), std::move(drafters), options, nullptr);
    EXPECT_TRUE(engine.ok()) << engine.status().message();
    return *std::move(engine);
  }

  Request MakeRequest(uint64_t id, const std::string& prompt, bool sampled, Said* said) const {
    Request request;
    request.id = id;
    request.prompt_tokens = *tokenizer_->Encode(prompt, {.add_special_tokens = false, .parse_special = true});
    const std::vector<int32_t> once = request.prompt_tokens;
    while (request.prompt_tokens.size() < kMinPromptTokens) {
      request.prompt_tokens.insert(request.prompt_tokens.end(), once.begin(), once.end());
    }
    request.sampling.temperature = sampled ? 0.8f : 0.0f;
    request.sampling.max_tokens = kTokens;
    if (sampled) {
      request.sampling.seed = 40 + id;
      request.sampling.top_p = 0.95f;
      request.sampling.frequency_penalty = 0.2f;
      request.sampling.logprobs = 0;
    }
    request.sink = [said](RequestOutput&& output) {
      for (const SampledToken& token : output.tokens) {
        said->tokens.push_back(token.token);
        said->logprobs.push_back(token.logprob);
      }
      said->reason = output.finish_reason;
      said->accepted = output.num_accepted_tokens;
      said->steps = output.num_verify_steps;
      return true;
    };
    return request;
  }

  std::map<uint64_t, Said> RunAll(Engine* engine, bool crowded) {
    std::map<uint64_t, Said> said;
    uint64_t id = 0;
    for (const std::string& prompt : kPrompts) {
      for (const bool sampled : {false, true}) {
        ++id;
        EXPECT_TRUE(engine->Submit(MakeRequest(id, prompt, sampled, &said[id])).ok());
      }
    }
    Said ignored;
    for (uint64_t other = 100; engine->Step();) {
      if (!crowded || other >= 100 + kCrowd) continue;
      EXPECT_TRUE(engine->Submit(MakeRequest(other, kPrompts[other % 2], other % 3 == 0, &ignored)).ok());
      if (other % 2 == 0) engine->Cancel(other - 1);
      ++other;
    }
    return said;
  }

  std::string state_dtype_ = "f32";
  const std::vector<std::string> kPrompts = {
      "It was late in the evening when the carriage",
      "<|endoftext|><|user|>I would like to book a table for two at an Italian restaurant.<|end|><|assistant|>"};
  const std::unique_ptr<Tokenizer> tokenizer_ = *Tokenizer::FromFile(kFolder + "target/tokenizer.json");
};

TEST_F(BundledModelsTest, EveryDrafterGivesTheTextOfPlainDecoding) {
  const std::map<uint64_t, Said> plain = RunAll(MakeEngine("", false).get(), false);
  ASSERT_EQ(plain.size(), 4u);
  for (const auto& [id, said] : plain) EXPECT_EQ(said.accepted, 0);
  for (const std::string kind :
       {"draft", "draft tree", "medusa", "medusa static", "recurrent", "recurrent tree", "ngram", "auto"}) {
    for (const bool adaptive : {false, true}) {
      const bool crowded = adaptive;
      if (crowded && !kCrowdEveryDrafter && kind != "auto") continue;
      SCOPED_TRACE(fmt::format("{}, adaptive {}", kind, adaptive));
      const std::map<uint64_t, Said> drafted = RunAll(MakeEngine(kind, adaptive).get(), crowded);
      EXPECT_TRUE(drafted == plain);
      int64_t accepted = 0;
      for (const auto& [id, said] : drafted) accepted += said.accepted;
      if (!adaptive) {
        EXPECT_GT(accepted, 0) << "the drafter is never right";
      }
    }
  }
}

TEST_F(BundledModelsTest, EveryDrafterGivesTheTextOfPlainDecodingWithBf16StatesToo) {
  const std::map<uint64_t, Said> with_f32_states = RunAll(MakeEngine("", false).get(), false);
  state_dtype_ = "bf16";
  const std::map<uint64_t, Said> plain = RunAll(MakeEngine("", false).get(), false);
  EXPECT_FALSE(plain == with_f32_states) << "the states are not in bf16";
  for (const std::string kind : {"draft tree", "recurrent", "auto"}) {
    SCOPED_TRACE(kind);
    const bool crowded = kind == "auto";
    EXPECT_TRUE(RunAll(MakeEngine(kind, /*adaptive=*/crowded, /*prefix_cache=*/4).get(), crowded) == plain);
  }
}

// A chat whose last prompt comes three times at once: what is taken up from the prefix cache has the bits of
// what is computed.
TEST_F(BundledModelsTest, ThePrefixCacheChangesNoBit) {
  const std::string turn =
      kPrompts[1] + " Of course. For what time, and where?<|end|><|user|>At seven, in San Jose.<|end|>";
  const std::vector<int32_t> words =
      *tokenizer_->Encode(turn + turn + turn, {.add_special_tokens = false, .parse_special = true});
  const auto run = [&](Engine* engine, const std::vector<std::vector<int32_t>>& prompts, int64_t* cached) {
    std::vector<Said> said(prompts.size());
    for (size_t i = 0; i < prompts.size(); ++i) {
      Request request = MakeRequest(i + 1, kPrompts[1], true, &said[i]);
      request.sampling.seed = 5;
      request.sampling.ignore_eos = true;
      request.prompt_tokens = prompts[i];
      request.sink = [sink = std::move(request.sink), cached](RequestOutput&& output) {
        *cached = output.num_cached_tokens;
        return sink(std::move(output));
      };
      EXPECT_TRUE(engine->Submit(std::move(request)).ok());
    }
    while (engine->Step()) {
    }
    return said;
  };
  const std::unique_ptr<Engine> cached_engine = MakeEngine("auto", false, 3), plain_engine = MakeEngine("", false);
  std::vector<int32_t> prompt = words;
  for (int turn_index = 0; turn_index < kTurns; ++turn_index) {
    const bool first = turn_index == 0, last = turn_index == kTurns - 1;
    const std::vector<std::vector<int32_t>> prompts(last ? 3 : 1, prompt);
    int64_t cached = 0, none = 0;
    const std::vector<Said> said = run(cached_engine.get(), prompts, &cached);
    EXPECT_TRUE(said == run(plain_engine.get(), prompts, &none)) << turn_index;
    EXPECT_EQ(none, 0);
    EXPECT_GE(cached, first ? 0 : last ? std::ssize(prompt) - 1 : std::ssize(words));
    prompt.insert(prompt.end(), said[0].tokens.begin(), said[0].tokens.end());
    prompt.insert(prompt.end(), words.begin(), words.end());
  }
}

TEST_F(BundledModelsTest, RejectionSamplingEndsAndIsGreedyAtTemperatureZero) {
  const std::map<uint64_t, Said> plain = RunAll(MakeEngine("", false).get(), false);
  const std::unique_ptr<Engine> engine = MakeEngine("draft", false);
  for (const AcceptanceMode mode : {AcceptanceMode::kRejection, AcceptanceMode::kTypical}) {
    Said greedy, sampled;
    Request first = MakeRequest(1, kPrompts[0], false, &greedy), second = MakeRequest(2, kPrompts[0], true, &sampled);
    first.acceptance = second.acceptance = mode;
    ASSERT_TRUE(engine->Submit(std::move(first)).ok());
    ASSERT_TRUE(engine->Submit(std::move(second)).ok());
    while (engine->Step()) {
    }
    EXPECT_EQ(greedy.tokens, plain.at(1).tokens);
    EXPECT_EQ(std::ssize(sampled.tokens), kTokens);
    EXPECT_GT(sampled.accepted, 0);
    for (const float logprob : sampled.logprobs) EXPECT_LE(logprob, 0.0f);
  }
}

}  // namespace
}  // namespace linspec
