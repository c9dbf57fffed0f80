// Any bytes as config.json: refused, or a shape whose sizes can be computed without overflow. And as
// generation_config.json: refused, or defaults that a request could ask for.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "models/generation_config.h"
#include "models/model_config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto config = linspec::ParseModelConfig(text);
  if (config.ok() && (config->NumParameters() <= 0 || config->StateBytes(linspec::DType::kF32) <= 0)) std::abort();
  constexpr int64_t kVocab = 1000;
  const auto generation = linspec::ParseGenerationConfig(text, kVocab);
  if (!generation.ok()) return 0;
  linspec::SamplingParams sampling;
  generation->sampling.Apply(&sampling);
  sampling.stop_token_ids = generation->eos_token_ids;
  if (generation->max_new_tokens > 0) sampling.max_tokens = generation->max_new_tokens;
  if (!sampling.Validate(kVocab).ok()) std::abort();
  return 0;
}
