// Verify, Extend, Commit and Prefill are one function of a sequence, bit for bit, whatever surrounds it.
#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "models/model.h"
#include "tests/models/model_test_util.h"

namespace linspec {
namespace {

constexpr int kGroup = 8;  // of the tiny configurations

struct Case {
  std::string name;
  ModelConfig config;
  std::string isa;
  std::string dtype;
  std::string state_dtype = "f32";
};

std::vector<Case> Cases() {
  std::vector<std::string> isas = {"scalar"};
  for (const Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    if (CpuOps::Create({.isa = isa, .num_threads = 1}).ok()) isas.push_back(IsaName(isa));
  }
  ModelConfig local = TinyConfig();
  local.linear_attention = {.group_size = 8, .conv_kernel = 0, .local = true, .global = GlobalBranch::kNone};
  const std::map<std::string, ModelConfig> configs = {
      {"full", TinyConfig()}, {"paper", PaperConfig()}, {"local", local}};
  std::vector<Case> cases;
  for (const std::string& isa : isas) {
    for (const auto& [name, config] : configs) cases.push_back({name + "_" + isa + "_f32", config, isa, "f32"});
    for (const char* dtype : {"bf16", "int8"}) {
      cases.push_back({fmt::format("full_{}_{}", isa, dtype), TinyConfig(), isa, dtype});
    }
  }
  const std::vector<Case> with_f32_states = cases;
  for (Case with_bf16_states : with_f32_states) {
    with_bf16_states.name += "_bf16_state";
    with_bf16_states.state_dtype = "bf16";
    cases.push_back(with_bf16_states);
  }
  return cases;
}

class LinearTransformerTest : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    const bool threads = GetParam().dtype != "f32";  // some cases on one thread, some on two: the bits may not care
    auto model = BuildRandomModel(config(), 7,
                                  {.weight_dtype = GetParam().dtype,
                                   .state_dtype = GetParam().state_dtype,
                                   .num_threads = threads ? 2 : 1,
                                   .isa = GetParam().isa});
    ASSERT_TRUE(model.ok()) << std::string(model.status().ToString());
    model_ = *std::move(model);
    pool_ = *model_->CreatePool(6);
  }

  const ModelConfig& config() const { return GetParam().config; }
  std::vector<int32_t> Tokens(int count, uint32_t seed) const { return RandomTokens(count, config().vocab_size, seed); }
  std::vector<std::byte> State(const StateSlot& slot) const { return StateOf(*pool_, slot.id()); }
  bool SameState(const StateSlot& a, const StateSlot& b) const {
    return pool_->length(a.id()) == pool_->length(b.id()) && State(a) == State(b);
  }
  absl::Status Prefill(const StateSlot& slot, std::span<const int32_t> tokens) {
    const std::vector<PrefillChunk> chunks = {{.slot = slot.id(), .tokens = tokens}};
    return model_->Prefill(chunks, pool_.get());
  }
  // Tokens from the root of tree to node.
  static std::vector<int32_t> PathTokens(const DraftTree& tree, int node) {
    std::vector<int32_t> tokens;
    for (; node >= 0; node = tree.parents[node]) tokens.push_back(tree.tokens[node]);
    std::reverse(tokens.begin(), tokens.end());
    return tokens;
  }
  // Row of logits of `node`, checked against decoding its path token by token from a copy of slot.
  void ExpectSequentialBits(const DraftTree& tree, std::span<const float> logits, const StateSlot& slot) {
    const StateSlot scratch = pool_->Acquire();
    const size_t vocab = config().vocab_size;
    for (int node = 0; node < tree.num_nodes(); ++node) {
      if (std::find(tree.parents.begin(), tree.parents.end(), node) != tree.parents.end()) continue;  // leaves only
      pool_->CopySlot(slot.id(), scratch.id());
      const auto expected = Sequential(*model_, *pool_, scratch.id(), PathTokens(tree, node));
      int at = node;
      for (size_t i = expected.size(); i-- > 0; at = tree.parents[at]) {
        ASSERT_TRUE(SameBits(logits.data() + at * vocab, expected[i].data(), vocab))
            << "node " << at << " at length " << pool_->length(slot.id());
      }
    }
  }

  std::unique_ptr<Model> model_;
  std::unique_ptr<StatePool> pool_;
};

TEST_P(LinearTransformerTest, PrefillInAnyChunkingEqualsTokenByToken) {
  const std::vector<int32_t> tokens = Tokens(3 * kGroup + 5, 1);
  const StateSlot sequential = pool_->Acquire();
  Sequential(*model_, *pool_, sequential.id(), tokens);
  for (size_t chunk = 1; chunk <= tokens.size(); ++chunk) {
    const StateSlot slot = pool_->Acquire();
    for (size_t done = 0; done < tokens.size(); done += chunk) {
      ASSERT_OK(Prefill(slot, std::span(tokens).subspan(done, std::min(chunk, tokens.size() - done))));
    }
    ASSERT_TRUE(SameState(slot, sequential)) << "chunks of " << chunk;
  }
}

TEST_P(LinearTransformerTest, PrefillOfManyRequestsAndBlocksEqualsOneByOne) {
  const std::vector<int32_t> tokens = Tokens(1300, 2);
  const std::span<const int32_t> all(tokens);
  const StateSlot a = pool_->Acquire(), b = pool_->Acquire(), a1 = pool_->Acquire(), b1 = pool_->Acquire();
  const std::vector<PrefillChunk> chunks = {{a.id(), all.first(700)}, {b.id(), all.subspan(700)}};
  ASSERT_OK(model_->Prefill(chunks, pool_.get()));
  ASSERT_OK(Prefill(a1, all.first(300)));
  ASSERT_OK(Prefill(a1, all.subspan(300, 400)));
  ASSERT_OK(Prefill(b1, all.subspan(700)));
  EXPECT_TRUE(SameState(a, a1));
  EXPECT_TRUE(SameState(b, b1));
}

TEST_P(LinearTransformerTest, TreeEqualsSequentialAtEveryPhase) {
  const std::vector<int32_t> prompt = Tokens(2 * kGroup + 2, 3);
  const StateSlot slot = pool_->Acquire();
  for (int length = 0; length <= static_cast<int>(prompt.size()); ++length) {
    const DraftTree tree = RandomTree(1 + length * 7 % 23, config().vocab_size, length);
    const std::vector<std::byte> before = State(slot);
    VerifyBatch batch;
    batch.Add(slot.id(), tree);
    const auto result = model_->Verify(batch, *pool_);
    ASSERT_TRUE(result.ok());
    EXPECT_EQ(State(slot), before) << "verify wrote the state";
    const std::vector<float> logits(result->logits.begin(), result->logits.end());
    ExpectSequentialBits(tree, logits, slot);
    if (length < static_cast<int>(prompt.size())) ASSERT_OK(Prefill(slot, std::span(prompt).subspan(length, 1)));
  }
}

TEST_P(LinearTransformerTest, LongestTreesCrossSeveralGroups) {
  const StateSlot slot = pool_->Acquire();
  ASSERT_OK(Prefill(slot, Tokens(5, 4)));
  DraftTree chain = DraftTree::Root(1);
  while (chain.num_nodes() < kMaxTreeNodes) chain.Add(chain.num_nodes(), chain.num_nodes() - 1);
  for (const DraftTree& tree : {chain, RandomTree(kMaxTreeNodes, config().vocab_size, 9)}) {
    VerifyBatch batch;
    batch.Add(slot.id(), tree);
    const auto result = model_->Verify(batch, *pool_);
    ASSERT_TRUE(result.ok());
    const std::vector<float> logits(result->logits.begin(), result->logits.end());
    ExpectSequentialBits(tree, logits, slot);
  }
}

TEST_P(LinearTransformerTest, CommitEqualsFeedingThePath) {
  const StateSlot slot = pool_->Acquire(), expected = pool_->Acquire(), start = pool_->Acquire();
  for (int length = 0; length <= 2 * kGroup; ++length) {
    pool_->CopySlot(start.id(), slot.id());
    pool_->CopySlot(start.id(), expected.id());
    const DraftTree tree = RandomTree(20, config().vocab_size, 100 + length);
    std::vector<int32_t> path;
    for (int node = static_cast<int>(length * 5 % 20); node >= 0; node = tree.parents[node]) path.push_back(node);
    std::reverse(path.begin(), path.end());
    VerifyBatch batch;
    batch.Add(slot.id(), tree);
    ASSERT_TRUE(model_->Verify(batch, *pool_).ok());
    ASSERT_OK(Prefill(start, Tokens(1, length)));  // between verify and commit, of another slot
    ASSERT_OK(model_->Commit(batch, std::vector<std::vector<int32_t>>{path}, pool_.get()));
    Sequential(*model_, *pool_, expected.id(), PathTokens(tree, path.back()));
    ASSERT_TRUE(SameState(slot, expected)) << "at length " << length;
  }
}

TEST_P(LinearTransformerTest, BatchNeighboursDoNotChangeBits) {
  const size_t vocab = config().vocab_size;
  std::vector<StateSlot> slots;
  std::vector<DraftTree> trees;
  for (int r = 0; r < 4; ++r) {
    slots.push_back(pool_->Acquire());
    ASSERT_OK(Prefill(slots[r], Tokens(3 + 6 * r, 20 + r)));
    trees.push_back(RandomTree(1 + 5 * r, config().vocab_size, 30 + r));
  }
  std::vector<std::vector<float>> alone;
  for (int r = 0; r < 4; ++r) {
    VerifyBatch batch;
    batch.Add(slots[r].id(), trees[r]);
    const auto result = model_->Verify(batch, *pool_);
    ASSERT_TRUE(result.ok());
    alone.emplace_back(result->logits.begin(), result->logits.end());
  }
  std::vector<int> order = {0, 1, 2, 3};
  do {
    VerifyBatch batch;
    for (const int r : order) batch.Add(slots[r].id(), trees[r]);
    const auto result = model_->Verify(batch, *pool_);
    ASSERT_TRUE(result.ok());
    for (int i = 0; i < 4; ++i) {
      const std::vector<float>& expected = alone[order[i]];
      ASSERT_TRUE(SameBits(result->logits.data() + batch.row_starts[i] * vocab, expected.data(), expected.size()));
    }
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST_P(LinearTransformerTest, ExtendEqualsVerifyOfTheGrownTrees) {
  const size_t vocab = config().vocab_size;
  const StateSlot a = pool_->Acquire(), b = pool_->Acquire();
  ASSERT_OK(Prefill(a, Tokens(5, 40)));
  ASSERT_OK(Prefill(b, Tokens(17, 41)));
  const DraftTree tree_a = RandomTree(24, config().vocab_size, 42), tree_b = RandomTree(18, config().vocab_size, 43);
  VerifyBatch whole;
  whole.Add(a.id(), tree_a);
  whole.Add(b.id(), tree_b);
  const auto verified = model_->Verify(whole, *pool_);
  ASSERT_TRUE(verified.ok());
  const std::vector<float> expected(verified->logits.begin(), verified->logits.end());

  const auto first = [](const DraftTree& tree, int nodes) {
    return DraftTree{{tree.tokens.begin(), tree.tokens.begin() + nodes},
                     {tree.parents.begin(), tree.parents.begin() + nodes}};
  };
  VerifyBatch before;
  for (const auto& [nodes_a, nodes_b] : std::vector<std::pair<int, int>>{{3, 1}, {3, 7}, {10, 7}, {10, 7}, {24, 18}}) {
    VerifyBatch batch;
    batch.Add(a.id(), first(tree_a, nodes_a));
    batch.Add(b.id(), first(tree_b, nodes_b));
    const auto result = before.slots.empty() ? model_->Verify(batch, *pool_) : model_->Extend(batch, *pool_);
    ASSERT_TRUE(result.ok()) << std::string(result.status().ToString());
    size_t row = 0;
    for (int r = 0; r < 2; ++r) {
      const int old_nodes = before.slots.empty() ? 0 : before.row_starts[r + 1] - before.row_starts[r];
      for (int node = old_nodes; node < batch.row_starts[r + 1] - batch.row_starts[r]; ++node, ++row) {
        ASSERT_TRUE(SameBits(result->logits.data() + row * vocab,
                             expected.data() + (whole.row_starts[r] + node) * vocab, vocab))
            << "request " << r << " node " << node;
      }
    }
    EXPECT_EQ(result->logits.size(), row * vocab);
    before = batch;
  }
  // What Extend kept can be committed.
  const StateSlot expected_a = pool_->Acquire();
  pool_->CopySlot(a.id(), expected_a.id());
  ASSERT_OK(model_->Commit(whole, std::vector<std::vector<int32_t>>{{0}, {}}, pool_.get()));
  Sequential(*model_, *pool_, expected_a.id(), {tree_a.tokens[0]});
  EXPECT_TRUE(SameState(a, expected_a));
}

TEST_P(LinearTransformerTest, NothingSurvivesInAReusedSlot) {
  StateSlot slot = pool_->Acquire();
  const int32_t id = slot.id();
  const auto first = Sequential(*model_, *pool_, id, Tokens(20, 50));
  slot.Release();
  slot = pool_->Acquire();
  ASSERT_EQ(slot.id(), id);
  EXPECT_EQ(Sequential(*model_, *pool_, id, Tokens(20, 50)), first);
}

INSTANTIATE_TEST_SUITE_P(Models, LinearTransformerTest, ::testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

class CommitErrorTest : public ::testing::Test {
 protected:
  CommitErrorTest() : model_(*BuildRandomModel(TinyConfig(), 1, {.weight_dtype = "f32", .num_threads = 1})) {
    pool_ = *StatePool::Create(TinyConfig(), 2);
    slot_ = pool_->Acquire();
    DraftTree tree = DraftTree::Root(1);  // 0 - 1 - 2, 0 - 3
    tree.Add(2, 0);
    tree.Add(3, 1);
    tree.Add(4, 0);
    batch_.Add(slot_.id(), tree);
  }
  absl::Status Commit(const std::vector<std::vector<int32_t>>& paths) {
    EXPECT_TRUE(model_->Verify(batch_, *pool_).ok());
    return model_->Commit(batch_, paths, pool_.get());
  }
  std::unique_ptr<Model> model_;
  std::unique_ptr<StatePool> pool_;
  StateSlot slot_;
  VerifyBatch batch_;
};

TEST_F(CommitErrorTest, OnlyPathsFromTheRoot) {
  const std::vector<std::byte> before = StateOf(*pool_, slot_.id());
  for (const std::vector<int32_t>& path :
       std::vector<std::vector<int32_t>>{{1}, {0, 2}, {0, 1, 3}, {0, 0}, {0, 4}, {-1}}) {
    ExpectError(Commit({path}), absl::StatusCode::kInternal, "not a path from its root");
  }
  ExpectError(Commit({}), absl::StatusCode::kInternal, "0 paths for 1 requests");
  EXPECT_EQ(StateOf(*pool_, slot_.id()), before);
  EXPECT_EQ(pool_->length(slot_.id()), 0);
  EXPECT_TRUE(Commit({{}}).ok());
  EXPECT_EQ(pool_->length(slot_.id()), 0);
  EXPECT_TRUE(Commit({{0, 1, 2}}).ok());
  EXPECT_EQ(pool_->length(slot_.id()), 3);
}

TEST_F(CommitErrorTest, OnlyTheBatchVerifiedLastAndOnce) {
  const std::vector<std::vector<int32_t>> root = {{0}};
  ExpectError(model_->Commit(batch_, root, pool_.get()), absl::StatusCode::kInternal, "not the batch last verified");
  ASSERT_OK(Commit(root));
  ExpectError(model_->Commit(batch_, root, pool_.get()), absl::StatusCode::kInternal, "committed already");
  VerifyBatch other;
  other.Add(slot_.id(), DraftTree::Root(9));
  ASSERT_TRUE(model_->Verify(other, *pool_).ok());
  ExpectError(model_->Commit(batch_, root, pool_.get()), absl::StatusCode::kInternal, "not the batch last verified");
  pool_->set_length(slot_.id(), 5);
  ExpectError(model_->Commit(other, root, pool_.get()), absl::StatusCode::kInternal, "changed since");
}

TEST_F(CommitErrorTest, UnembedIsTheHeadOfVerifyAndLeavesTheBatchAlone) {
  const auto verified = model_->Verify(batch_, *pool_);
  ASSERT_TRUE(verified.ok());
  const std::vector<float> logits(verified->logits.begin(), verified->logits.end());
  const std::vector<float> hidden(verified->hidden.begin(), verified->hidden.end());
  const size_t dim = TinyConfig().hidden_size, vocab = TinyConfig().vocab_size;
  for (size_t row = 0; row < 4; ++row) {
    const auto alone = model_->Unembed(std::span(hidden).subspan(row * dim, dim));
    ASSERT_TRUE(alone.ok());
    ASSERT_EQ(alone->size(), vocab);
    EXPECT_TRUE(SameBits(alone->data(), logits.data() + row * vocab, vocab));
  }
  const auto all = model_->Unembed(hidden);
  ASSERT_TRUE(all.ok());
  EXPECT_TRUE(SameBits({all->begin(), all->end()}, logits));
  ExpectError(model_->Unembed(std::span(hidden).first(dim + 1)).status(), absl::StatusCode::kInternal, "33 values");
  const std::vector<std::vector<int32_t>> path = {{0, 1}};
  ASSERT_OK(model_->Commit(batch_, path, pool_.get()));
  EXPECT_EQ(pool_->length(slot_.id()), 2);
}

TEST_F(CommitErrorTest, BatchesAreChecked) {
  const auto refused = [&](const VerifyBatch& batch, absl::StatusCode code, const char* part) {
    ExpectError(model_->Verify(batch, *pool_).status(), code, part);
  };
  refused({}, absl::StatusCode::kInternal, "do not fit together");
  VerifyBatch batch;
  batch.Add(slot_.id(), DraftTree::Root(96));
  refused(batch, absl::StatusCode::kInvalidArgument, "token 96 is outside the vocabulary of 96");
  batch = {};
  batch.Add(3, DraftTree::Root(1));
  refused(batch, absl::StatusCode::kInternal, "slot 3");
  batch = {};
  batch.Add(slot_.id(), DraftTree{{1, 2}, {-1, 1}});
  refused(batch, absl::StatusCode::kInternal, "node 1 of request 0 has parent 1");
  ExpectError(model_->Extend(batch_, *pool_).status(), absl::StatusCode::kInternal, "does not grow");
  const std::vector<int32_t> tokens = {1};
  const std::vector<PrefillChunk> twice = {{slot_.id(), tokens}, {slot_.id(), tokens}};
  ExpectError(model_->Prefill(twice, pool_.get()), absl::StatusCode::kInternal, "twice");
}

TEST(RandomModelTest, IsTheSameForTheSameSeedAndAnyThreads) {
  const auto logits = [](uint64_t seed, int threads) {
    const auto model = *BuildRandomModel(TinyConfig(), seed, {.weight_dtype = "bf16", .num_threads = threads});
    const auto pool = *StatePool::Create(TinyConfig(), 1);
    const StateSlot slot = pool->Acquire();
    return Sequential(*model, *pool, slot.id(), {1, 2, 3});
  };
  EXPECT_EQ(logits(3, 1), logits(3, 2));
  EXPECT_NE(logits(3, 1), logits(4, 1));
}

}  // namespace
}  // namespace linspec
