#include "models/model_config.h"

#include <string>

#include "tests/models/model_test_util.h"

namespace linspec {
namespace {

constexpr char kConfig[] = R"({
  "model_type": "llama", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3,
  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1000, "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0, "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": [2, 3],
  "max_position_embeddings": 512,
  "linear_attention": {"version": 1, "group_size": 64, "conv_kernel": 32, "local": "relu_squared",
                       "global": "rms_norm", "decay": true, "qk_norm_eps": 1e-6, "global_norm_eps": 1e-5}
})";

// kConfig with the first occurrence of `from` replaced.
std::string With(const std::string& from, const std::string& to) {
  std::string text = kConfig;
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

void ExpectRefused(const std::string& text, const std::string& part) {
  ExpectError(ParseModelConfig(text).status(), absl::StatusCode::kInvalidArgument, part);
}

TEST(ModelConfigTest, ReadsEveryField) {
  const auto config = ParseModelConfig(kConfig);
  ASSERT_TRUE(config.ok()) << std::string(config.status().ToString());
  EXPECT_EQ(config->hidden_size, 128);
  EXPECT_EQ(config->intermediate_size, 352);
  EXPECT_EQ(config->num_layers, 3);
  EXPECT_EQ(config->num_heads, 4);
  EXPECT_EQ(config->num_kv_heads, 2);
  EXPECT_EQ(config->head_dim, 32);
  EXPECT_EQ(config->vocab_size, 1000);
  EXPECT_FLOAT_EQ(config->rms_norm_eps, 1e-5f);
  EXPECT_EQ(config->bos_token_id, 1);
  EXPECT_EQ(config->eos_token_ids, (std::vector<int32_t>{2, 3}));
  EXPECT_EQ(config->max_position_embeddings, 512);
  EXPECT_EQ(config->linear_attention.group_size, 64);
  EXPECT_EQ(config->linear_attention.conv_kernel, 32);
  EXPECT_TRUE(config->linear_attention.local);
  EXPECT_EQ(config->linear_attention.global, GlobalBranch::kRmsNorm);
  EXPECT_TRUE(config->linear_attention.decay);
  EXPECT_FLOAT_EQ(config->linear_attention.global_norm_eps, 1e-5f);
  EXPECT_EQ(config->StateSizePerLayer(), 2 * (32 * 32 + 2 * 64 * 32));
  // Embedding and head, final norm; per layer: norms, q k v o, mlp, taps, gain, decay.
  EXPECT_EQ(config->NumParameters(),
            2 * 1000 * 128 + 128 + 3 * (2 * 128 + 128 * 32 * (4 + 2 + 2 + 4) + 3 * 128 * 352 + 4 * 32 + 4 + 2));
}

TEST(ModelConfigTest, OptionalFieldsHaveDefaults) {
  const auto config = ParseModelConfig(R"({"model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 10, "eos_token_id": 9, "bos_token_id": null,
    "rope_scaling": null, "linear_attention": {"version": 1, "local": "none", "global": "none", "conv_kernel": 0}})");
  ASSERT_TRUE(config.ok()) << std::string(config.status().ToString());
  EXPECT_EQ(config->num_kv_heads, 4);
  EXPECT_EQ(config->head_dim, 16);
  EXPECT_EQ(config->bos_token_id, -1);
  EXPECT_EQ(config->eos_token_ids, std::vector<int32_t>{9});
  EXPECT_FALSE(config->tie_word_embeddings);
  EXPECT_FALSE(config->linear_attention.decay);
}

TEST(ModelConfigTest, NamesFieldAndValue) {
  ExpectRefused("", "JSON");
  ExpectRefused("[]", "JSON object");
  ExpectRefused("{\"hidden_size\": 1e999}", "JSON at byte");
  ExpectRefused(With("\"hidden_size\"", "\"head_dim\": 32, \"hidden_size\""), "\"head_dim\" appears twice");
  ExpectRefused(std::string(100000, '['), "nested deeper");
  ExpectRefused(With("\"llama\"", "\"gpt2\""), "model_type = \"gpt2\"");
  ExpectRefused(With("128", "0"), "hidden_size = 0");
  ExpectRefused(With("128", "65537"), "hidden_size = 65537");
  ExpectRefused(With("128", "18446744073709551615"), "hidden_size = 18446744073709551615");
  ExpectRefused(With("128", "128.0"), "hidden_size = 128.0");
  ExpectRefused(With("128", "\"128\""), "hidden_size = \"128\"");
  ExpectRefused(With("\"hidden_size\"", "\"other\""), "hidden_size is missing");
  ExpectRefused(With("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 513"), "num_hidden_layers = 513");
  ExpectRefused(With("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3"), "num_key_value_heads = 3");
  ExpectRefused(With("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 8"), "num_key_value_heads = 8");
  ExpectRefused(With("\"head_dim\": 32", "\"head_dim\": 33"), "head_dim = 33");
  ExpectRefused(With("\"head_dim\": 32", "\"head_dim\": 1024"), "head_dim = 1024");
  ExpectRefused(With("\"vocab_size\": 1000", "\"vocab_size\": 1048577"), "vocab_size = 1048577");
  ExpectRefused(With("[2, 3]", "[2, 1000]"), "eos_token_id = [2,1000]");
  ExpectRefused(With("[2, 3]", "\"</s>\""), "eos_token_id");
  ExpectRefused(With("\"bos_token_id\": 1", "\"bos_token_id\": -1"), "bos_token_id = -1");
  ExpectRefused(With("1e-5", "-1"), "rms_norm_eps = -1");
  ExpectRefused(With("false", "0"), "tie_word_embeddings = 0");
  ExpectRefused(With("\"model_type\"", "\"rope_scaling\": {\"type\": \"linear\"}, \"model_type\""), "rope_scaling");
  ExpectRefused(With("\"model_type\"", "\"attention_bias\": true, \"model_type\""), "attention_bias = true");
  ExpectRefused(With("\"model_type\"", "\"hidden_act\": \"gelu\", \"model_type\""), "hidden_act = \"gelu\"");
}

TEST(ModelConfigTest, ChecksTheLinearAttentionBlock) {
  ExpectRefused(With("\"linear_attention\"", "\"other\""), "linear_attention = null");
  ExpectRefused(With("\"version\": 1", "\"version\": 2"), "linear_attention.version = 2");
  ExpectRefused(With("\"group_size\": 64", "\"group_size\": 7"), "linear_attention.group_size = 7");
  ExpectRefused(With("\"group_size\": 64", "\"group_size\": 16"), "linear_attention.conv_kernel = 32");
  ExpectRefused(With("\"conv_kernel\": 32", "\"conv_kernel\": 33"), "linear_attention.conv_kernel = 33");
  ExpectRefused(With("\"relu_squared\"", "\"softmax\""), "linear_attention.local = \"softmax\"");
  ExpectRefused(With("\"rms_norm\"", "\"norm\""), "linear_attention.global = \"norm\"");
  ExpectRefused(With("\"decay\": true", "\"decay\": 0.5"), "linear_attention.decay = 0.5");
  ExpectRefused(With("\"decay\"", "\"decays\""), "linear_attention.decays");
  ExpectRefused(With("\"qk_norm_eps\": 1e-6", "\"qk_norm_eps\": 2"), "linear_attention.qk_norm_eps = 2");
}

}  // namespace
}  // namespace linspec
