// Every way in which a model folder can be wrong, from the bytes of one safetensors file to a tensor too many.
#include "models/weights.h"

#include <limits>
#include <string>
#include <vector>

#include "models/safetensors.h"
#include "tests/models/model_test_util.h"

namespace linspec {
namespace {

using ::absl::StatusCode;

absl::StatusOr<TensorMap> Parse(const std::string& bytes) {
  auto owner = std::make_shared<std::string>(bytes);
  return ParseSafetensors(std::as_bytes(std::span(*owner)), owner, "test.safetensors");
}

void ExpectRefused(const std::string& bytes, const std::string& part) {
  ExpectError(Parse(bytes).status(), StatusCode::kInvalidArgument, part);
}

std::string OneTensor(const std::string& entry, size_t data_bytes) {
  return WithHeader("{\"w\":" + entry + "}", std::string(data_bytes, '\0'));
}

TEST(SafetensorsTest, ViewsShapesAndValues) {
  const auto tensors = Parse(Safetensors({{"a", F32Tensor({2, 2}, {1, 2, 3, 4})},
                                          {"b", {"I8", {3}, "\x01\xFF\x02"}},
                                          {"scalar", {"I64", {}, std::string(8, '\0')}},
                                          {"none", {"F16", {0, 4}, ""}}}));
  ASSERT_TRUE(tensors.ok()) << std::string(tensors.status().ToString());
  ASSERT_EQ(tensors->size(), 4u);
  const TensorView& a = tensors->at("a");
  EXPECT_EQ(a.dtype, DType::kF32);
  EXPECT_EQ(a.shape, (std::vector<int64_t>{2, 2}));
  EXPECT_EQ(ToFloats(a), (std::vector<float>{1, 2, 3, 4}));
  EXPECT_EQ(tensors->at("b").num_elements(), 3);
  EXPECT_EQ(tensors->at("none").num_elements(), 0);
  // Not a multiple of 8 into the data, so it had to be copied to be aligned.
  EXPECT_EQ(reinterpret_cast<uintptr_t>(tensors->at("scalar").data) % 8, 0u);
}

TEST(SafetensorsTest, RefusesBadHeaders) {
  ExpectRefused("", "not safetensors, or truncated");
  ExpectRefused("1234567", "not safetensors, or truncated");
  ExpectRefused(std::string(8, '\xFF'), "not safetensors, or truncated");
  ExpectRefused(WithHeader("{}", "").substr(0, 9), "truncated");
  ExpectRefused(WithHeader("{", ""), "not valid JSON");
  ExpectRefused(WithHeader("[]", ""), "not a JSON object");
  ExpectRefused(WithHeader("{\"w\":1}", ""), "tensor w: expected exactly");
  ExpectRefused(WithHeader("{\"w\":{\"dtype\":\"I8\",\"shape\":[1],\"data_offsets\":[0,1]},"
                           "\"w\":{\"dtype\":\"I8\",\"shape\":[1],\"data_offsets\":[0,1]}}",
                           "x"),
                "\"w\" appears twice");
  ExpectRefused(WithHeader("{}", "x"), "1 bytes after the last tensor");
}

TEST(SafetensorsTest, RefusesBadEntries) {
  ExpectRefused(OneTensor(R"({"dtype":"F8","shape":[1],"data_offsets":[0,1]})", 1), "unsupported dtype \"F8\"");
  ExpectRefused(OneTensor(R"({"dtype":8,"shape":[1],"data_offsets":[0,1]})", 1), "unsupported dtype 8");
  ExpectRefused(OneTensor(R"({"dtype":"I8","shape":[-1],"data_offsets":[0,1]})", 1), "bad size -1");
  ExpectRefused(OneTensor(R"({"dtype":"I8","shape":[1.5],"data_offsets":[0,1]})", 1), "bad size 1.5");
  ExpectRefused(OneTensor(R"({"dtype":"I8","shape":1,"data_offsets":[0,1]})", 1), "shape is not a list");
  ExpectRefused(OneTensor(R"({"dtype":"I8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]})", 1), "at most 8");
  ExpectRefused(OneTensor(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]})", 0), "overflows");
  ExpectRefused(OneTensor(R"({"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]})", 0), "overflows");
  ExpectRefused(OneTensor(R"({"dtype":"I8","shape":[1],"data_offsets":[1,0]})", 1), "bad data_offsets [1,0]");
  ExpectRefused(OneTensor(R"({"dtype":"I8","shape":[1],"data_offsets":[0]})", 1), "bad data_offsets [0]");
  ExpectRefused(OneTensor(R"({"dtype":"I8","shape":[1],"data_offsets":[0,18446744073709551615]})", 1), "data_offsets");
  ExpectRefused(OneTensor(R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})", 4),
                "needs 8 bytes, data_offsets give 4");
  ExpectRefused(OneTensor(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})", 7), "truncated");
  ExpectRefused(OneTensor(R"({"dtype":"I8","shape":[1],"data_offsets":[1,2]})", 2), "leaving a hole");
}

TEST(SafetensorsTest, RefusesOverlap) {
  ExpectRefused(WithHeader(R"({"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]},)"
                           R"("b":{"dtype":"I8","shape":[4],"data_offsets":[2,6]}})",
                           "123456"),
                "overlapping");
}

TEST(WeightMapTest, TakesStrictly) {
  const TempFolder folder;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  folder.Write("model.safetensors",
               Safetensors({{"w", F32Tensor({2}, {1, 2})},
                            {"nan", F32Tensor({2}, {1, nan})},
                            {"inf", {"F16", {1}, std::string("\x00\x7C", 2)}},
                            {"left", F32Tensor({1}, {0})},
                            {"model.layers.0.self_attn.rotary_emb.inv_freq", F32Tensor({1}, {1})}}));
  auto weights = WeightMap::Open(folder.path());
  ASSERT_TRUE(weights.ok()) << std::string(weights.status().ToString());
  ExpectError((*weights)->Take("w", {2, 1}).status(), StatusCode::kInvalidArgument, "w has shape [2], expected [2, 1]");
  EXPECT_TRUE((*weights)->Take("w", {2}).ok());
  ExpectError((*weights)->Take("w", {2}).status(), StatusCode::kInvalidArgument, "tensor w is missing");
  ExpectError((*weights)->Take("nan", {2}).status(), StatusCode::kInvalidArgument, "nan holds an infinity or NaN");
  ExpectError((*weights)->Take("inf", {1}).status(), StatusCode::kInvalidArgument, "inf holds an infinity or NaN");
  ExpectError((*weights)->CheckAllTaken(), StatusCode::kInvalidArgument, "unexpected tensor inf (3 in all)");
}

class ShardTest : public ::testing::Test {
 protected:
  absl::Status Open(const std::string& index) {
    folder_.Write("one.safetensors", Safetensors({{"a", F32Tensor({1}, {1})}}));
    folder_.Write("two.safetensors", Safetensors({{"b", F32Tensor({1}, {2})}}));
    folder_.Write("model.safetensors.index.json", index);
    return WeightMap::Open(folder_.path()).status();
  }
  TempFolder folder_;
};

TEST_F(ShardTest, ReadsAllShards) {
  ASSERT_OK(Open(R"({"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})"));
  auto weights = WeightMap::Open(folder_.path());
  EXPECT_TRUE((*weights)->Take("a", {1}).ok());
  EXPECT_TRUE((*weights)->Take("b", {1}).ok());
  EXPECT_TRUE((*weights)->CheckAllTaken().ok());
}

TEST_F(ShardTest, RefusesBadIndexes) {
  const auto refused = [&](const std::string& index, const std::string& part) {
    ExpectError(Open(index), StatusCode::kInvalidArgument, part);
  };
  refused("{", "not valid JSON");
  refused("{}", "weight_map is missing");
  refused(R"({"weight_map": {"a": 1}})", "tensor a: shard 1 is not a plain file name");
  for (const char* name : {"../one.safetensors", "/etc/passwd", "..", "", ".hidden", "sub\\\\one", "a\\u0000b"}) {
    refused(fmt::format(R"({{"weight_map": {{"a": "{}"}}}})", name), "not a plain file name");
  }
  refused(R"({"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}})", "tensor c is not in its shard");
  refused(R"({"weight_map": {"c": "one.safetensors"}})", "tensor a is in shard one.safetensors, but");
  refused(R"({"weight_map": {"a": "two.safetensors"}})", "tensor b is in shard two.safetensors, but");
  ExpectError(Open(R"({"weight_map": {"a": "three.safetensors"}})"), StatusCode::kNotFound, "three.safetensors");
}

TEST(WeightMapTest, SaysWhyThereIsNothingToLoad) {
  const TempFolder folder;
  ExpectError(WeightMap::Open(folder.path()).status(), StatusCode::kNotFound, "neither model.safetensors nor");
  folder.Write("pytorch_model-00001-of-00002.bin", "pickle");
  ExpectError(WeightMap::Open(folder.path()).status(), StatusCode::kFailedPrecondition, "convert them");
  folder.Write("model.safetensors", "");
  ExpectError(WeightMap::Open(folder.path()).status(), StatusCode::kInvalidArgument, "too short");
  ExpectError(WeightMap::Open("/nonexistent/folder").status(), StatusCode::kNotFound, "/nonexistent/folder");
}

}  // namespace
}  // namespace linspec
