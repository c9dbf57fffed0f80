// Window attention: against the definition in double, and the bit-equalities that make speculation exact.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fmt/core.h"
#include "kernels/ops.h"

namespace linspec {
namespace {

struct Shape {
  int heads, kv_heads, d, group, conv;
  bool local;
  GlobalBranch global;
  bool decay;
};

using State = std::vector<std::byte>;

// One layer with random parameters, its rows, and states of a dtype.
struct Fixture {
  Fixture(const Shape& shape, DType dtype, int num_tokens, uint32_t seed)
      : shape(shape), dtype(dtype), num_tokens(num_tokens) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform(0.3f, 0.99f);
    stride = (shape.heads + 2 * shape.kv_heads) * shape.d;
    qkv.resize(static_cast<size_t>(num_tokens) * stride);
    for (float& x : qkv) x = normal(generator) / std::sqrt(static_cast<float>(shape.d));
    for (int h = 0; h < shape.heads; ++h) gain.push_back(normal(generator));
    for (int h = 0; h < shape.kv_heads; ++h) decay.push_back(uniform(generator));
    for (int i = 0; i < shape.heads * shape.conv; ++i) taps.push_back(normal(generator));
    layer = {.num_heads = shape.heads,
             .num_kv_heads = shape.kv_heads,
             .head_dim = shape.d,
             .group_size = shape.group,
             .conv_kernel = shape.conv,
             .local = shape.local,
             .global = shape.global,
             .global_factor = 0.37f,
             .global_gain = gain.data(),
             .global_norm_eps = 1e-6f,
             .decay = shape.decay ? decay.data() : nullptr,
             .conv_taps = taps.data(),
             .index = 3};
  }

  State NewState() const { return State(Bytes(shape.d) + 2 * Bytes(shape.group)); }
  LayerState View(State& state) const {
    std::byte* ring = state.data() + Bytes(shape.d);
    return {state.data(), ring, ring + Bytes(shape.group), dtype};
  }
  size_t Bytes(int rows_of_head) const { return shape.kv_heads * rows_of_head * shape.d * DTypeSize(dtype); }

  const Shape shape;
  const DType dtype;
  const int num_tokens;
  int stride;
  std::vector<float> qkv, gain, decay, taps;
  AttentionLayer layer;
};

int OutDim(const Fixture& f) { return f.shape.heads * f.shape.d; }

// Token by token: verify one row, commit it. rows: which rows of qkv form the sequence.
std::vector<float> Sequential(CpuOps& ops, const Fixture& f, const std::vector<int>& rows, State& state,
                              int64_t length = 0) {
  std::vector<float> out(static_cast<size_t>(f.num_tokens) * OutDim(f), NAN), result;
  const std::vector<int32_t> path = {0};
  for (const int row : rows) {
    const WindowRequest request{f.View(state), length, row, 1, nullptr};
    ops.VerifyAttention({&f.layer, f.qkv.data(), out.data(), {&request, 1}});
    result.insert(result.end(), out.begin() + row * OutDim(f), out.begin() + (row + 1) * OutDim(f));
    const CommitRequest commit{f.View(state), length, row, path};
    const CommitAttentionParams params{&f.layer, f.qkv.data(), {&commit, 1}};
    ops.CommitAttention({&params, 1});
    ++length;
  }
  return result;
}

std::vector<int> Iota(int begin, int end) {
  std::vector<int> out;
  for (int i = begin; i < end; ++i) out.push_back(i);
  return out;
}

// docs/math.md, sums as they stand; k and v as the state holds them, S as it would be without rounding.
std::vector<double> Definition(const Fixture& f, int t, int head) {
  const int d = f.shape.d, kv = head / (f.shape.heads / f.shape.kv_heads), group = t / f.shape.group;
  const auto q = [&](int row, int i) { return static_cast<double>(f.qkv[row * f.stride + head * d + i]); };
  const auto kept = [&f](float x) { return f.dtype == DType::kBF16 ? BFloat16ToFloat(FloatToBFloat16(x)) : x; };
  const auto k = [&](int row, int i) {
    return static_cast<double>(kept(f.qkv[row * f.stride + (f.shape.heads + kv) * d + i]));
  };
  const auto v = [&](int row, int i) {
    return static_cast<double>(kept(f.qkv[row * f.stride + (f.shape.heads + f.shape.kv_heads + kv) * d + i]));
  };
  std::vector<double> y(d), global(d);
  for (int j = 0; j <= t; ++j) {
    double dot = 0;
    for (int i = 0; i < d; ++i) dot += q(t, i) * k(j, i);
    double weight = 0;
    if (f.shape.local && j / f.shape.group == group) weight += std::pow(std::max(dot, 0.0), 2);
    if (t - j < f.shape.conv) weight += f.taps[head * f.shape.conv + t - j];
    // S <- g S + K^T V at each fold: group n is scaled once by every later fold before the reader's group.
    const double decayed = f.shape.decay ? std::pow(f.decay[kv], group - 1 - j / f.shape.group) : 1.0;
    for (int i = 0; i < d; ++i) {
      y[i] += weight * v(j, i);
      if (j / f.shape.group < group) global[i] += decayed * dot * v(j, i);
    }
  }
  double squares = 0;
  for (const double x : global) squares += x * x;
  for (int i = 0; i < d; ++i) {
    if (f.shape.global == GlobalBranch::kScaled) y[i] += f.layer.global_factor * global[i];
    if (f.shape.global == GlobalBranch::kRmsNorm) y[i] += f.gain[head] * global[i] / std::sqrt(squares / d + 1e-6);
  }
  return y;
}

const Shape kShapes[] = {
    {2, 2, 16, 8, 4, true, GlobalBranch::kScaled, false},  {4, 2, 8, 8, 8, true, GlobalBranch::kRmsNorm, true},
    {1, 1, 64, 16, 5, true, GlobalBranch::kRmsNorm, true}, {3, 3, 24, 8, 0, true, GlobalBranch::kNone, false},
    {2, 1, 40, 8, 6, false, GlobalBranch::kScaled, true},
};

class AttentionTest : public testing::TestWithParam<std::tuple<Isa, int, DType>> {
 protected:
  void SetUp() override {
    const Isa isa = std::get<0>(GetParam());
    if (static_cast<int>(isa) > static_cast<int>(DetectIsa())) GTEST_SKIP() << "this machine lacks the instructions";
    ops_ = std::move(*CpuOps::Create({.isa = isa, .num_threads = 2}));
  }
  const Shape& shape() const { return kShapes[std::get<1>(GetParam())]; }
  DType dtype() const { return std::get<2>(GetParam()); }
  std::unique_ptr<CpuOps> ops_;
};

INSTANTIATE_TEST_SUITE_P(All, AttentionTest,
                         testing::Combine(testing::ValuesIn(kIsas), testing::Range(0, 5),
                                          testing::Values(DType::kF32, DType::kBF16)),
                         [](const auto& info) {
                           return fmt::format("{}_shape{}_{}", IsaName(std::get<0>(info.param)),
                                              std::get<1>(info.param), DTypeName(std::get<2>(info.param)));
                         });

TEST_P(AttentionTest, SequentialDecodingMatchesTheDefinition) {
  // Rounding S moves each of its elements by up to 1/128 of itself a fold; before the first fold nothing is rounded.
  const double tolerance = dtype() == DType::kF32 ? 2e-5 : 3e-2;
  Fixture f(shape(), dtype(), 45, 1);
  auto state = f.NewState();
  const auto out = Sequential(*ops_, f, Iota(0, 45), state);
  for (int t = 0; t < 45; ++t) {
    for (int h = 0; h < f.shape.heads; ++h) {
      const auto expected = Definition(f, t, h);
      for (int i = 0; i < f.shape.d; ++i) {
        ASSERT_NEAR(out[t * OutDim(f) + h * f.shape.d + i], expected[i], t < f.shape.group ? 2e-5 : tolerance)
            << "token " << t << " head " << h;
      }
    }
  }
}

TEST_P(AttentionTest, EveryTableGivesTheScalarBits) {
  Fixture f(shape(), dtype(), 45, 2);
  auto state = f.NewState(), scalar_state = f.NewState();
  auto scalar = std::move(*CpuOps::Create({.isa = Isa::kScalar, .num_threads = 1}));
  EXPECT_EQ(Sequential(*ops_, f, Iota(0, 45), state), Sequential(*scalar, f, Iota(0, 45), scalar_state));
  EXPECT_EQ(state, scalar_state);
}

TEST_P(AttentionTest, PrefillInAnyChunkingEqualsTokenByToken) {
  Fixture f(shape(), dtype(), 61, 3);
  auto expected_state = f.NewState();
  const auto expected = Sequential(*ops_, f, Iota(0, 61), expected_state);
  for (const int chunk : {1, 3, 7, 8, 9, 16, 40, 61}) {
    auto state = f.NewState();
    std::vector<float> out(expected.size(), NAN);
    for (int begin = 0; begin < 61; begin += chunk) {
      const WindowRequest request{f.View(state), begin, begin, std::min(chunk, 61 - begin), nullptr};
      ops_->PrefillAttention({&f.layer, f.qkv.data(), out.data(), {&request, 1}});
    }
    ASSERT_EQ(out, expected) << "chunk " << chunk;
    ASSERT_EQ(state, expected_state) << "chunk " << chunk;
  }
}

// A random tree of 24 rows at every phase of the group, some crossing two boundaries: each node has the bits of
// decoding its path token by token, the state is untouched, and committing a path equals feeding it.
TEST_P(AttentionTest, TreeVerifyEqualsSequentialOnEveryPathAndPhase) {
  const int nodes = 24;
  for (int prefix = 0; prefix <= 2 * shape().group + 1; ++prefix) {
    Fixture f(shape(), dtype(), prefix + nodes, 100 + prefix);
    auto state = f.NewState();
    Sequential(*ops_, f, Iota(0, prefix), state);
    std::mt19937 generator(prefix);
    std::vector<int32_t> parents = {-1};
    for (int i = 1; i < nodes; ++i) {  // mostly deep, so that boundaries are crossed
      parents.push_back(generator() % 4 == 0 ? static_cast<int32_t>(generator() % i) : i - 1);
    }
    const auto before = state;
    std::vector<float> out(static_cast<size_t>(prefix + nodes) * OutDim(f), NAN);
    const WindowRequest request{f.View(state), prefix, prefix, nodes, parents.data()};
    ops_->VerifyAttention({&f.layer, f.qkv.data(), out.data(), {&request, 1}});
    ASSERT_EQ(state, before) << "verify wrote state";
    for (int node = 0; node < nodes; ++node) {
      std::vector<int32_t> path;
      for (int at = node; at >= 0; at = parents[at]) path.insert(path.begin(), at);
      std::vector<int> rows;
      for (const int32_t at : path) rows.push_back(prefix + at);
      auto replay = before;
      const auto expected = Sequential(*ops_, f, rows, replay, prefix);
      ASSERT_TRUE(std::equal(expected.end() - OutDim(f), expected.end(), out.begin() + (prefix + node) * OutDim(f)))
          << "prefix " << prefix << " node " << node;
      auto committed = before;
      const CommitRequest commit{f.View(committed), prefix, prefix, path};
      const CommitAttentionParams params{&f.layer, f.qkv.data(), {&commit, 1}};
      ops_->CommitAttention({&params, 1});
      ASSERT_EQ(committed, replay) << "prefix " << prefix << " node " << node;
    }
  }
}

TEST_P(AttentionTest, ARequestDoesNotSeeItsNeighbours) {
  Fixture f(shape(), dtype(), 60, 5);
  auto a = f.NewState(), b = f.NewState();
  Sequential(*ops_, f, Iota(0, 20), a);
  Sequential(*ops_, f, Iota(20, 33), b);
  std::vector<float> alone(60 * OutDim(f), 0.0f), together(60 * OutDim(f), 0.0f);
  const WindowRequest requests[] = {{f.View(a), 20, 40, 9, nullptr}, {f.View(b), 13, 49, 11, nullptr}};
  ops_->VerifyAttention({&f.layer, f.qkv.data(), together.data(), requests});
  for (const WindowRequest& request : requests) {
    ops_->VerifyAttention({&f.layer, f.qkv.data(), alone.data(), {&request, 1}});
  }
  EXPECT_EQ(alone, together);
}

}  // namespace
}  // namespace linspec
