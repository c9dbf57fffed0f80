// LoadModel on whole folders: names, dtypes, 8-bit companions, the published checkpoints' spelling, and refusals.
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "models/model.h"
#include "tests/models/model_test_util.h"

namespace linspec {
namespace {

using ::absl::StatusCode;

constexpr char kConfig[] = R"({{"model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
  "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 20,
  "tie_word_embeddings": {}, "linear_attention": {{"version": 1, "group_size": 32, "conv_kernel": 32,
  "local": "relu_squared", "global": "{}", "decay": {}}}}})";

std::string FullConfig() { return fmt::format(kConfig, false, "rms_norm", true); }
std::string PublishedConfig() { return fmt::format(kConfig, true, "scaled", false); }

StoredTensor RandomF32(std::vector<int64_t> shape) {
  static std::mt19937 random(1);
  int64_t size = 1;
  for (const int64_t dim : shape) size *= dim;
  std::vector<float> values(size);
  for (float& value : values) value = static_cast<float>(random() % 1000) / 1000.0f - 0.5f;
  return F32Tensor(std::move(shape), values);
}

StoredTensors FullTensors() {
  const std::string layer = "model.layers.0.", attention = layer + "self_attn.", mlp = layer + "mlp.";
  return {{"model.embed_tokens.weight", RandomF32({20, 16})},
          {"lm_head.weight", RandomF32({20, 16})},
          {"model.norm.weight", RandomF32({16})},
          {layer + "input_layernorm.weight", RandomF32({16})},
          {layer + "post_attention_layernorm.weight", RandomF32({16})},
          {attention + "q_proj.weight", RandomF32({16, 16})},
          {attention + "k_proj.weight", RandomF32({8, 16})},
          {attention + "v_proj.weight", RandomF32({8, 16})},
          {attention + "o_proj.weight", RandomF32({16, 16})},
          {mlp + "gate_proj.weight", RandomF32({24, 16})},
          {mlp + "up_proj.weight", RandomF32({24, 16})},
          {mlp + "down_proj.weight", RandomF32({16, 24})},
          {attention + "conv_taps", RandomF32({2, 32})},
          {attention + "global_gain", RandomF32({2})},
          {attention + "global_decay", F32Tensor({1}, {0.9f})}};
}

// The same model for the paper's rule, tied.
StoredTensors PaperTensors() {
  StoredTensors tensors = FullTensors();
  tensors.erase("lm_head.weight");
  tensors.erase("model.layers.0.self_attn.global_gain");
  tensors.erase("model.layers.0.self_attn.global_decay");
  tensors["model.layers.0.self_attn.global_factor"] = F32Tensor({1}, {1.0f});
  return tensors;
}

// Symmetric 8-bit values with one scale per row, under the name and its companion.
void Quantize(StoredTensors& tensors, const std::string& name) {
  StoredTensor& tensor = tensors.at(name);
  const int64_t rows = tensor.shape[0], cols = tensor.shape[1];
  const float* values = reinterpret_cast<const float*>(tensor.bytes.data());
  StoredTensor quantized{"I8", tensor.shape, ""};
  for (int64_t i = 0; i < rows * cols; ++i) {
    quantized.bytes.push_back(static_cast<char>(static_cast<int8_t>(values[i] * 200.0f)));
  }
  tensors[name + "_scale"] = F32Tensor({rows}, std::vector<float>(rows, 0.005f));
  tensors[name] = quantized;
}

class LoadModelTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<Model>> Load(const std::string& config, const StoredTensors& tensors,
                                              const std::string& weight_dtype = "f32") {
    folder_.Write("config.json", config);
    folder_.Write("model.safetensors", Safetensors(tensors));
    LoadOptions options;
    options.path = folder_.path();
    options.weight_dtype = weight_dtype;
    options.num_threads = 1;
    return LoadModel(options);
  }

  std::vector<float> Logits(const std::string& config, const StoredTensors& tensors,
                            const std::string& weight_dtype = "f32") {
    const auto model = Load(config, tensors, weight_dtype);
    EXPECT_TRUE(model.ok()) << std::string(model.status().ToString());
    if (!model.ok()) return {};
    const auto pool = StatePool::Create((*model)->config(), 1);
    const StateSlot slot = (*pool)->Acquire();
    std::vector<float> all;
    for (const auto& row : Sequential(**model, **pool, slot.id(), RandomTokens(70, 20, 3))) {
      all.insert(all.end(), row.begin(), row.end());
    }
    return all;
  }

  void ExpectRefused(const std::function<void(StoredTensors&)>& change, const std::string& part) {
    StoredTensors tensors = FullTensors();
    change(tensors);
    ExpectError(Load(FullConfig(), tensors).status(), StatusCode::kInvalidArgument, part);
  }

  TempFolder folder_;
};

TEST_F(LoadModelTest, LoadsAndReportsProgress) {
  folder_.Write("config.json", FullConfig());
  folder_.Write("model.safetensors", Safetensors(FullTensors()));
  std::vector<double> progress;
  const auto model = LoadModel({.path = folder_.path(), .progress = [&](double done) { progress.push_back(done); }});
  ASSERT_TRUE(model.ok()) << std::string(model.status().ToString());
  ASSERT_FALSE(progress.empty());
  EXPECT_EQ(progress.back(), 1.0);
  EXPECT_NE((*model)->Describe().find("BF16"), std::string::npos) << (*model)->Describe();
  EXPECT_GT((*model)->weight_bytes(), (*model)->streamed_bytes());
}

TEST_F(LoadModelTest, StatesOfADtype) {
  folder_.Write("config.json", FullConfig());
  folder_.Write("model.safetensors", Safetensors(FullTensors()));
  for (const auto& [name, dtype] : {std::pair{"f32", DType::kF32}, std::pair{"bf16", DType::kBF16}}) {
    const auto model = LoadModel({.path = folder_.path(), .state_dtype = name, .num_threads = 1});
    ASSERT_TRUE(model.ok()) << std::string(model.status().ToString());
    EXPECT_EQ((*model)->state_dtype(), dtype);
    EXPECT_EQ((*(*model)->CreatePool(1))->dtype(), dtype);
  }
  ExpectError(LoadModel({.path = folder_.path(), .state_dtype = "f16"}).status(), StatusCode::kInvalidArgument,
              "state dtype \"f16\": expected f32 or bf16");
}

TEST_F(LoadModelTest, StrictAboutTensors) {
  ExpectRefused([](StoredTensors& t) { t["model.layers.1.mlp.up_proj.weight"] = RandomF32({24, 16}); },
                "unexpected tensor model.layers.1.mlp.up_proj.weight");
  for (const auto& [name, tensor] : FullTensors()) {
    ExpectRefused([&](StoredTensors& t) { t.erase(name); }, "tensor " + name + " is missing");
    ExpectRefused([&](StoredTensors& t) { t[name].shape.insert(t[name].shape.begin(), 1); }, "tensor " + name + " has");
    ExpectRefused([&](StoredTensors& t) { t[name].dtype = "I32"; }, "tensor " + name + " is I32");
    ExpectRefused([&](StoredTensors& t) { t[name].bytes.replace(0, 4, "\xFF\xFF\xFF\x7F"); },
                  "tensor " + name + " holds an infinity or NaN");
  }
  ExpectRefused([](StoredTensors& t) { t["model.layers.0.self_attn.global_decay"] = F32Tensor({1}, {1.5f}); },
                "global_decay holds 1.5");
  ExpectRefused([](StoredTensors& t) { t["model.layers.0.self_attn.global_decay"] = F32Tensor({1}, {0.0f}); },
                "global_decay holds 0");
}

TEST_F(LoadModelTest, EightBitWeightsNeedTheirScales) {
  const std::string name = "model.layers.0.mlp.down_proj.weight";
  ExpectRefused(
      [&](StoredTensors& t) {
        Quantize(t, name);
        t.erase(name + "_scale");
      },
      name + "_scale is missing");
  ExpectRefused(
      [&](StoredTensors& t) {
        Quantize(t, name);
        t[name + "_scale"].dtype = "I32";
      },
      name + "_scale is I32, expected F32");
  ExpectRefused([&](StoredTensors& t) { t[name + "_scale"] = F32Tensor({16}, std::vector<float>(16)); },
                "unexpected tensor " + name + "_scale");
}

TEST_F(LoadModelTest, EightBitWeightsMeanIntegerTimesScale) {
  StoredTensors tensors = FullTensors();
  std::vector<std::string> names;
  for (const auto& [name, tensor] : tensors) {
    if (tensor.shape.size() == 2 && !name.ends_with("conv_taps")) names.push_back(name);
  }
  for (const std::string& name : names) Quantize(tensors, name);
  StoredTensors widened = tensors;
  for (const std::string& name : names) {
    const StoredTensor stored = tensors.at(name);
    std::vector<float> values;
    for (const char c : stored.bytes) values.push_back(static_cast<float>(static_cast<int8_t>(c)) * 0.005f);
    widened[name] = F32Tensor(stored.shape, values);
    widened.erase(name + "_scale");
  }
  const std::vector<float> expected = Logits(FullConfig(), widened);
  const std::vector<float> from_int8 = Logits(FullConfig(), tensors);
  EXPECT_TRUE(SameBits(from_int8, expected));
  // Part of a fused group in 8 bits: widened, the same values.
  tensors["model.layers.0.self_attn.k_proj.weight"] = widened["model.layers.0.self_attn.k_proj.weight"];
  tensors.erase("model.layers.0.self_attn.k_proj.weight_scale");
  EXPECT_TRUE(SameBits(Logits(FullConfig(), tensors), expected));
}

TEST_F(LoadModelTest, PublishedNamesMeanTheSame) {
  StoredTensors tensors = PaperTensors();
  const std::string attention = "model.layers.0.self_attn.";
  const std::vector<float> expected = Logits(PublishedConfig(), tensors);

  const StoredTensor taps = tensors.at(attention + "conv_taps");
  const float* values = reinterpret_cast<const float*>(taps.bytes.data());
  std::vector<float> stored(2 * 63, 99.0f);  // taps that look into the future must not matter
  for (int h = 0; h < 2; ++h) {
    for (int lag = 0; lag < 32; ++lag) stored[h * 63 + 31 - lag] = values[h * 32 + lag];
  }
  tensors.erase(attention + "conv_taps");
  tensors.erase(attention + "global_factor");
  tensors[attention + "dwconv.weight"] = F32Tensor({2, 1, 63, 1}, stored);
  tensors[attention + "conv_mask"] = F32Tensor({63}, std::vector<float>(63));
  EXPECT_TRUE(SameBits(Logits(PublishedConfig(), tensors), expected));
}

TEST_F(LoadModelTest, NamesBadOptionsAndFiles) {
  ExpectError(Load(FullConfig(), FullTensors(), "int4").status(), StatusCode::kInvalidArgument, "\"int4\"");
  ExpectError(LoadModel({.path = folder_.path(), .isa = "mmx"}).status(), StatusCode::kInvalidArgument, "\"mmx\"");
  ExpectError(LoadModel({.path = "/nonexistent"}).status(), StatusCode::kNotFound, "/nonexistent/config.json");
  ExpectError(Load("{", FullTensors()).status(), StatusCode::kInvalidArgument, "config.json: config: not valid JSON");
}

}  // namespace
}  // namespace linspec
