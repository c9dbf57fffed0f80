// Every op: SIMD tables against the scalar twin (equal bits), the scalar twin against plain double arithmetic, and the
// determinism that exact speculation rests on.
#include "kernels/ops.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "fmt/core.h"

namespace linspec {
namespace {

std::vector<float> Random(int64_t n, uint32_t seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> out(n);
  for (float& x : out) x = normal(generator);
  return out;
}

std::unique_ptr<CpuOps> MakeOps(Isa isa, int threads = 1) {
  auto ops = CpuOps::Create({.isa = isa, .num_threads = threads});
  EXPECT_TRUE(ops.ok()) << ops.status();
  return std::move(*ops);
}

void ExpectSameBits(const std::vector<float>& a, const std::vector<float>& b, const std::string& what) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(std::memcmp(&a[i], &b[i], 4), 0) << what << " differs at " << i << ": " << a[i] << " and " << b[i];
  }
}

class IsaTest : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (static_cast<int>(GetParam()) > static_cast<int>(DetectIsa()))
      GTEST_SKIP() << "this machine lacks the instructions";
    ops_ = MakeOps(GetParam());
    scalar_ = MakeOps(Isa::kScalar);
  }
  std::unique_ptr<CpuOps> ops_, scalar_;
};

INSTANTIATE_TEST_SUITE_P(All, IsaTest, testing::ValuesIn(kIsas),
                         [](const auto& info) { return std::string(IsaName(info.param)); });

std::vector<float> RunMatmul(CpuOps& ops, const std::vector<float>& w, const std::vector<float>& x, int64_t rows,
                             int64_t cols, int64_t m, DType dtype, const std::vector<float>* initial = nullptr) {
  const auto weight = ops.Pack(w.data(), DType::kF32, nullptr, rows, cols, dtype);
  std::vector<float> y(m * rows, NAN);
  if (initial != nullptr) y = *initial;
  ops.Matmul({.x = x.data(), .w = weight.get(), .y = y.data(), .num_rows = m, .accumulate = initial != nullptr});
  return y;
}

TEST_P(IsaTest, MatmulEqualsScalarToTheBitAndDoubleWithinTolerance) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
    for (const auto& [rows, cols] : {std::pair{1, 1}, {16, 4}, {17, 33}, {64, 64}, {130, 50}, {96, 257}}) {
      for (const int m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 23}) {  // every height of a tile
        const auto w = Random(rows * cols, 1, 0.1f), x = Random(m * cols, 2);
        const auto y = RunMatmul(*ops_, w, x, rows, cols, m, dtype);
        ExpectSameBits(y, RunMatmul(*scalar_, w, x, rows, cols, m, dtype),
                       fmt::format("{} {}x{} rows {}", DTypeName(dtype), rows, cols, m));
        double error = 0, norm = 0;
        for (int i = 0; i < m; ++i) {
          for (int n = 0; n < rows; ++n) {
            double expected = 0;
            for (int k = 0; k < cols; ++k) expected += static_cast<double>(x[i * cols + k]) * w[n * cols + k];
            error += std::pow(y[i * rows + n] - expected, 2);
            norm += expected * expected;
          }
        }
        EXPECT_LT(std::sqrt(error / norm), dtype == DType::kF32 ? 1e-5 : dtype == DType::kBF16 ? 4e-3 : 4e-2);
      }
    }
  }
}

TEST_P(IsaTest, MatmulAccumulates) {
  const auto w = Random(20 * 24, 1), x = Random(3 * 24, 2), start = Random(3 * 20, 3);
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
    const auto plain = RunMatmul(*ops_, w, x, 20, 24, 3, dtype);
    const auto sum = RunMatmul(*ops_, w, x, 20, 24, 3, dtype, &start);
    for (size_t i = 0; i < sum.size(); ++i) EXPECT_FLOAT_EQ(sum[i], start[i] + plain[i]);
  }
}

TEST_P(IsaTest, MatmulRowDoesNotDependOnItsNeighboursOrThreads) {
  const int rows = 200, cols = 96, m = 23;
  const auto w = Random(rows * cols, 1), x = Random(m * cols, 2);
  const auto threaded = MakeOps(GetParam(), 3);
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
    const auto all = RunMatmul(*threaded, w, x, rows, cols, m, dtype);
    for (int i = 0; i < m; ++i) {
      const auto one = RunMatmul(*ops_, w, {x.begin() + i * cols, x.begin() + (i + 1) * cols}, rows, cols, 1, dtype);
      ExpectSameBits(one, {all.begin() + i * rows, all.begin() + (i + 1) * rows}, fmt::format("row {}", i));
    }
  }
}

TEST_P(IsaTest, Int8WeightsKeepTheirBitsAndSaturateNowhere) {
  const int rows = 32, cols = 256;
  const std::vector<int8_t> w(rows * cols, 127);
  const std::vector<float> scales(rows, 0.5f), x(cols, -3.0f);
  const auto weight = ops_->Pack(w.data(), DType::kI8, scales.data(), rows, cols, DType::kI8);
  std::vector<float> y(rows);
  ops_->Matmul({.x = x.data(), .w = weight.get(), .y = y.data(), .num_rows = 1});
  for (const float value : y) EXPECT_NEAR(value, -3.0 * 127 * 0.5 * cols, 1e-2);
}

TEST_P(IsaTest, ElementwiseOpsEqualScalarToTheBitAndDouble) {
  for (const int dim : {1, 8, 15, 16, 33, 64, 130}) {
    const int rows = 3;
    const auto x = Random(rows * dim, 4, 3.0f), weight = Random(dim, 5), gate_up = Random(rows * 2 * dim, 6, 8.0f);
    std::vector<float> a(rows * dim), b(rows * dim);
    ops_->RmsNorm({x.data(), weight.data(), a.data(), rows, dim, 1e-5f});
    scalar_->RmsNorm({x.data(), weight.data(), b.data(), rows, dim, 1e-5f});
    ExpectSameBits(a, b, "rms_norm");
    for (int r = 0; r < rows; ++r) {
      double squares = 0;
      for (int i = 0; i < dim; ++i) squares += static_cast<double>(x[r * dim + i]) * x[r * dim + i];
      for (int i = 0; i < dim; ++i) {
        EXPECT_NEAR(a[r * dim + i], x[r * dim + i] / std::sqrt(squares / dim + 1e-5) * weight[i], 1e-5);
      }
    }
    ops_->SiluMul({gate_up.data(), a.data(), rows, dim});
    scalar_->SiluMul({gate_up.data(), b.data(), rows, dim});
    ExpectSameBits(a, b, "silu_mul");
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < dim; ++i) {
        const double gate = gate_up[r * 2 * dim + i], up = gate_up[r * 2 * dim + dim + i];
        EXPECT_NEAR(a[r * dim + i], gate / (1 + std::exp(-gate)) * up, 1e-6 * (1 + std::fabs(gate * up)));
      }
    }
  }
}

TEST_P(IsaTest, SiluSurvivesExtremes) {
  const std::vector<float> gate_up = {-1e30f, 1e30f, -100.0f, 100.0f, 0.0f, 1, 1, 1, 1, 1};
  std::vector<float> out(5);
  ops_->SiluMul({gate_up.data(), out.data(), 1, 5});
  EXPECT_NEAR(out[0], 0, 1e-3);
  EXPECT_FLOAT_EQ(out[1], 1e30f);
  EXPECT_NEAR(out[2], 0, 1e-30);
  EXPECT_FLOAT_EQ(out[3], 100);
  EXPECT_EQ(out[4], 0);
}

TEST_P(IsaTest, RopeNormalizeIsExactFarOut) {
  const int heads = 2, kv_heads = 1, d = 24;
  const std::vector<int64_t> positions = {0, 1, 77, 5'000'000};
  const int rows = static_cast<int>(positions.size()), stride = (heads + 2 * kv_heads) * d;
  const auto original = Random(rows * stride, 7);
  auto qkv = original, twin = original;
  const RopeNormalizeParams params{qkv.data(), positions.data(), rows, heads, kv_heads, d, 10000.0f, 1e-6f};
  ops_->RopeNormalize(params);
  auto scalar_params = params;
  scalar_params.qkv = twin.data();
  scalar_->RopeNormalize(scalar_params);
  ExpectSameBits(qkv, twin, "rope_normalize");
  for (int r = 0; r < rows; ++r) {
    for (int h = 0; h < heads + kv_heads; ++h) {
      const float* in = &original[r * stride + h * d];
      std::vector<double> rotated(d);
      double squares = 0;
      for (int i = 0; i < d / 2; ++i) {
        const double angle = static_cast<double>(positions[r]) * std::pow(10000.0, -2.0 * i / d);
        rotated[i] = in[i] * std::cos(angle) - in[i + d / 2] * std::sin(angle);
        rotated[i + d / 2] = in[i + d / 2] * std::cos(angle) + in[i] * std::sin(angle);
      }
      for (const double x : rotated) squares += x * x;
      for (int i = 0; i < d; ++i)
        EXPECT_NEAR(qkv[r * stride + h * d + i], rotated[i] / std::sqrt(squares + 1e-6), 2e-6);
    }
    for (int i = (heads + kv_heads) * d; i < stride; ++i) EXPECT_EQ(qkv[r * stride + i], original[r * stride + i]);
  }
}

// The fused ops against the plain ones, with few rows (each thread prepares its own input) and many (prepared once).
TEST_P(IsaTest, FusedProductsEqualTheirParts) {
  const int heads = 2, kv_heads = 1, d = 24, cols = 72;
  const auto threaded = MakeOps(GetParam(), 3);
  const auto norm = Random(cols, 11);
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
    for (const int m : {1, 5, 300}) {
      const auto x = Random(m * cols, 12, 3.0f);
      std::vector<float> normed(x.size());
      scalar_->RmsNorm({x.data(), norm.data(), normed.data(), m, cols, 1e-5f});
      const int width = (heads + 2 * kv_heads) * d;
      const auto w = Random(width * cols, 13, 0.1f);
      std::vector<int64_t> positions(m);
      for (int i = 0; i < m; ++i) positions[i] = 7 * i + 3;
      const auto rope = [&](float* qkv) {
        return RopeNormalizeParams{qkv, positions.data(), m, heads, kv_heads, d, 10000.0f, 1e-6f};
      };
      auto expected = RunMatmul(*scalar_, w, normed, width, cols, m, dtype);
      scalar_->RopeNormalize(rope(expected.data()));
      const auto weight = threaded->Pack(w.data(), DType::kF32, nullptr, width, cols, dtype);
      std::vector<float> qkv(m * width, NAN);
      const MatmulParams product{x.data(), weight.get(), qkv.data(), m, false, norm.data(), 1e-5f};
      threaded->ProjectQkv(product, rope(qkv.data()));
      ExpectSameBits(qkv, expected, fmt::format("qkv {} rows {}", DTypeName(dtype), m));

      for (const int dim : {128, 40}) {  // whole blocks, and a block that gate and up share
        const auto gate_up = Random(2 * dim * cols, 14, 0.1f);
        const auto products = RunMatmul(*scalar_, gate_up, normed, 2 * dim, cols, m, dtype);
        std::vector<float> activated(m * dim), out(m * dim, NAN), scratch(m * 2 * dim);
        scalar_->SiluMul({products.data(), activated.data(), m, dim});
        const auto packed = threaded->Pack(gate_up.data(), DType::kF32, nullptr, 2 * dim, cols, dtype);
        threaded->GatedMatmul({{x.data(), packed.get(), scratch.data(), m, false, norm.data(), 1e-5f}, out.data()});
        ExpectSameBits(out, activated, fmt::format("gated {} rows {} dim {}", DTypeName(dtype), m, dim));
      }
    }
  }
}

TEST(CpuOpsTest, RefusesBadOptions) {
  EXPECT_FALSE(CpuOps::Create({.num_threads = -1}).ok());
  EXPECT_FALSE(CpuOps::Create({.num_threads = 100000}).ok());
}

TEST(DTypeTest, Conversions) {
  EXPECT_EQ(HalfToFloat(0x3c00), 1.0f);
  EXPECT_EQ(HalfToFloat(0xc000), -2.0f);
  EXPECT_EQ(HalfToFloat(0x0001), 0x1p-24f);
  EXPECT_TRUE(std::signbit(HalfToFloat(0x8000)));
  EXPECT_TRUE(std::isinf(HalfToFloat(0x7c00)));
  EXPECT_TRUE(std::isnan(HalfToFloat(0x7e00)));
  for (const float x : {0.0f, 1.0f, -3.5f, 1e30f})
    EXPECT_NEAR(BFloat16ToFloat(FloatToBFloat16(x)), x, std::fabs(x) / 128);
  EXPECT_EQ(FloatToBFloat16(1.00390625f), 0x3f80) << "a tie goes to even";
  EXPECT_TRUE(std::isnan(BFloat16ToFloat(FloatToBFloat16(NAN))));
}

}  // namespace
}  // namespace linspec
