// The CUDA attention programs, run on the host: the same index and weight code as on the GPU, against the scalar
// CpuOps.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "kernels/cuda/window_programs.h"
#include "kernels/ops.h"

namespace linspec {
namespace {

struct Shape {
  int heads, kv_heads, d, group, conv;
  bool local;
  GlobalBranch global;
  bool decay;
};

const Shape kShapes[] = {
    {2, 2, 16, 8, 4, true, GlobalBranch::kScaled, false},    {4, 2, 8, 8, 8, true, GlobalBranch::kRmsNorm, true},
    {1, 1, 128, 64, 32, true, GlobalBranch::kRmsNorm, true}, {3, 3, 24, 8, 0, true, GlobalBranch::kNone, false},
    {2, 1, 40, 9, 6, false, GlobalBranch::kScaled, true},    {1, 1, 100, 64, 32, true, GlobalBranch::kScaled, false},
};

class CudaWindowTest : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    shape_ = kShapes[GetParam()];
    ops_ = std::move(*CpuOps::Create({.isa = Isa::kScalar, .num_threads = 1}));
    stride_ = (shape_.heads + 2 * shape_.kv_heads) * shape_.d;
    Fill(gain_, shape_.heads, 1.0f);
    Fill(taps_, shape_.heads * shape_.conv, 1.0f);
    decay_ = {0.7f, 0.9f, 0.95f};
    layer_ = {.num_heads = shape_.heads,
              .num_kv_heads = shape_.kv_heads,
              .head_dim = shape_.d,
              .group_size = shape_.group,
              .conv_kernel = shape_.conv,
              .local = shape_.local,
              .global = shape_.global,
              .global_factor = 0.37f,
              .global_gain = gain_.data(),
              .global_norm_eps = 1e-6f,
              .decay = shape_.decay ? decay_.data() : nullptr,
              .conv_taps = taps_.data()};
    state_.assign(shape_.kv_heads * (shape_.d * shape_.d + 2 * shape_.group * shape_.d), 0.0f);
  }

  void Fill(std::vector<float>& values, int64_t size, float scale) {
    std::normal_distribution<float> normal;
    values.resize(size);
    for (float& x : values) x = normal(generator_) * scale;
  }
  LayerState View(std::vector<float>& state) const {
    float* ring = state.data() + shape_.kv_heads * shape_.d * shape_.d;
    return {state.data(), ring, ring + shape_.kv_heads * shape_.group * shape_.d};
  }
  cuda::AttentionParams Params(std::vector<float>& state, std::vector<float>& out) const {
    return {.layer = {.num_heads = shape_.heads,
                      .num_kv_heads = shape_.kv_heads,
                      .head_dim = shape_.d,
                      .group_size = shape_.group,
                      .conv_kernel = shape_.conv,
                      .local = shape_.local,
                      .global = static_cast<cuda::Global>(shape_.global),
                      .global_factor = layer_.global_factor,
                      .global_norm_eps = layer_.global_norm_eps,
                      .global_gain = layer_.global_gain,
                      .decay = layer_.decay,
                      .conv_taps = layer_.conv_taps},
            .states = {.base = state.data(), .per_slot = 0, .layer_offset = 0},
            .tasks = nullptr,
            .qkv = qkv_.data(),
            .ancestors = nullptr,
            .paths = nullptr,
            .out = out.data(),
            .out_bf16 = nullptr};
  }
  // Brings state_ to `length` tokens on the CPU.
  void Advance(int length) {
    if (length == 0) return;
    Fill(qkv_, int64_t{length} * stride_, 1.0f / std::sqrt(static_cast<float>(shape_.d)));
    std::vector<float> out(int64_t{length} * shape_.heads * shape_.d);
    const WindowRequest request{View(state_), 0, 0, length, nullptr};
    ops_->PrefillAttention({&layer_, qkv_.data(), out.data(), {&request, 1}});
  }
  static void ExpectNear(const std::vector<float>& a, const std::vector<float>& b, float tolerance) {
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) {
      ASSERT_FALSE(std::isnan(a[i]));
      ASSERT_NEAR(a[i], b[i], tolerance * (1.0f + std::fabs(b[i]))) << "element " << i;
    }
  }

  Shape shape_;
  std::unique_ptr<CpuOps> ops_;
  AttentionLayer layer_;
  int stride_ = 0;
  std::mt19937 generator_{7};
  std::vector<float> gain_, taps_, decay_, qkv_, state_;
};

INSTANTIATE_TEST_SUITE_P(Shapes, CudaWindowTest, testing::Range(0, 6));

TEST_P(CudaWindowTest, VerifyAndCommitMatchTheScalarReferenceAtEveryPhase) {
  for (int length = 0; length <= 2 * shape_.group + 1; length += shape_.group > 16 ? 5 : 1) {
    for (const int nodes : {1, 7, 33}) {
      state_.assign(state_.size(), 0.0f);
      Advance(length);
      Fill(qkv_, int64_t{nodes} * stride_, 1.0f / std::sqrt(static_cast<float>(shape_.d)));
      std::vector<int32_t> parents(nodes, -1);
      std::vector<uint64_t> ancestors(nodes, 1);
      for (int i = 1; i < nodes; ++i) {
        parents[i] = i - 1 - static_cast<int>(generator_() % std::min(i, 3));
        ancestors[i] = ancestors[parents[i]] | uint64_t{1} << i;
      }
      const size_t out_size = static_cast<size_t>(nodes) * shape_.heads * shape_.d;
      std::vector<float> expected(out_size), out(out_size, NAN), reversed(out_size, NAN);
      const WindowRequest request{View(state_), length, 0, nodes, parents.data()};
      ops_->VerifyAttention({&layer_, qkv_.data(), expected.data(), {&request, 1}});

      std::vector<int32_t> path;
      for (int node = nodes - 1; node >= 0; node = parents[node]) path.insert(path.begin(), node);
      const cuda::Task task{length, 0, 0, nodes, 0, static_cast<int32_t>(path.size())};
      auto shared = std::make_unique<cuda::AttentionShared>();
      const std::vector<float> before = state_;
      for (int head = 0; head < shape_.kv_heads; ++head) {
        for (const bool backwards : {false, true}) {
          cuda::AttentionParams params = Params(state_, backwards ? reversed : out);
          params.ancestors = ancestors.data();
          cuda::VerifyBlock<0>(cuda::HostBlock{backwards}, params, task, head, *shared);
        }
      }
      ASSERT_EQ(state_, before) << "verify wrote to the state";
      ASSERT_EQ(out, reversed) << "threads of one phase depend on each other";
      ExpectNear(out, expected, 3e-5f);

      std::vector<float> expected_state = state_;
      const CommitRequest commit{View(expected_state), length, 0, path};
      const CommitAttentionParams reference{&layer_, qkv_.data(), {&commit, 1}};
      ops_->CommitAttention({&reference, 1});
      cuda::AttentionParams params = Params(state_, out);
      params.paths = path.data();
      for (int head = 0; head < shape_.kv_heads; ++head) {
        cuda::CommitBlock<0>(cuda::HostBlock{}, params, task, head);
      }
      ASSERT_EQ(state_, expected_state) << "length " << length << " nodes " << nodes;
    }
  }
}

// A draft's levels compute their own row only, above the rows of the levels before.
TEST_P(CudaWindowTest, LastRowsAreThoseOfTheWholeChain) {
  constexpr int kRows = 9;
  const int64_t width = int64_t{shape_.heads} * shape_.d;
  for (const int length : {0, 3, shape_.group - 2, 2 * shape_.group + 1}) {
    state_.assign(state_.size(), 0.0f);
    Advance(length);
    Fill(qkv_, int64_t{kRows} * stride_, 1.0f / std::sqrt(static_cast<float>(shape_.d)));
    const cuda::Task task{length, 0, 0, kRows, 0, 0};
    auto shared = std::make_unique<cuda::AttentionShared>();
    const auto verify = [&](int last_rows) {
      std::vector<float> out(kRows * width, NAN);
      cuda::AttentionParams params = Params(state_, out);
      params.last_rows = last_rows;
      for (int head = 0; head < shape_.kv_heads; ++head) {
        cuda::VerifyBlock<0>(cuda::HostBlock{}, params, task, head, *shared);
      }
      return out;
    };
    const std::vector<float> all = verify(0);
    for (const int last_rows : {1, 3, kRows, kRows + 1}) {
      const std::vector<float> some = verify(last_rows);
      const int64_t skipped = std::max(kRows - last_rows, 0) * width;
      EXPECT_TRUE(std::equal(all.begin() + skipped, all.end(), some.begin() + skipped)) << last_rows << " rows";
      EXPECT_TRUE(std::all_of(some.begin(), some.begin() + skipped, [](float x) { return std::isnan(x); }));
    }
  }
}

TEST_P(CudaWindowTest, PrefillMatchesTheScalarReference) {
  for (const int length : {0, 3, shape_.group - 1, shape_.group + 2}) {
    state_.assign(state_.size(), 0.0f);
    Advance(length);
    const int rows = 2 * shape_.group + 5;
    Fill(qkv_, int64_t{rows} * stride_, 1.0f / std::sqrt(static_cast<float>(shape_.d)));
    std::vector<float> expected(int64_t{rows} * shape_.heads * shape_.d), out(expected.size(), NAN);
    std::vector<float> expected_state = state_;
    const WindowRequest request{View(expected_state), length, 0, rows, nullptr};
    ops_->PrefillAttention({&layer_, qkv_.data(), expected.data(), {&request, 1}});
    auto shared = std::make_unique<cuda::AttentionShared>();
    const cuda::Task task{length, 0, 0, rows, 0, 0};
    for (int head = 0; head < shape_.kv_heads; ++head) {
      cuda::PrefillBlock<0>(cuda::HostBlock{true}, Params(state_, out), task, head, *shared);
    }
    ExpectNear(out, expected, 3e-5f);
    ASSERT_EQ(state_, expected_state);
  }
}

TEST_P(CudaWindowTest, PaddingTouchesNothing) {
  std::vector<float> out(shape_.heads * shape_.d, NAN);
  const cuda::Task padding{0, -1, 0, 1, 0, 1};
  auto shared = std::make_unique<cuda::AttentionShared>();
  const std::vector<float> before = state_;
  cuda::VerifyBlock<0>(cuda::HostBlock{}, Params(state_, out), padding, 0, *shared);
  cuda::PrefillBlock<0>(cuda::HostBlock{}, Params(state_, out), padding, 0, *shared);
  cuda::CommitBlock<0>(cuda::HostBlock{}, Params(state_, out), padding, 0);
  EXPECT_EQ(state_, before);
  EXPECT_TRUE(std::isnan(out[0]));
}

}  // namespace
}  // namespace linspec
