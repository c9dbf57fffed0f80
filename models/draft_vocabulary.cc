#include "models/draft_vocabulary.h"

#include <algorithm>

#include "kernels/ops.h"

namespace linspec {
namespace {

constexpr int64_t kSmallVocabulary = 4096;  // too cheap below it to leave anything out
constexpr size_t kRecentTokens = 512;       // of a text

}  // namespace

DraftVocabulary::DraftVocabulary(int64_t vocab_size) {
  if (vocab_size >= kSmallVocabulary) wanted_.resize((vocab_size + kOutputBlock - 1) / kOutputBlock);
  Clear();
}

void DraftVocabulary::Clear() {
  blocks_.clear();
  everything_ = wanted_.empty();
  const auto half = wanted_.begin() + std::ssize(wanted_) / 2;
  std::fill(wanted_.begin(), half, true);
  std::fill(half, wanted_.end(), false);
}

void DraftVocabulary::Add(const DraftContext& context) {
  blocks_.clear();
  everything_ |= context.sampling->temperature > 0;
  if (everything_) return;
  for (const int32_t token : context.tokens.last(std::min(context.tokens.size(), kRecentTokens))) {
    wanted_[token / kOutputBlock] = true;
  }
}

std::span<const int32_t> DraftVocabulary::Blocks() {
  if (everything_ || !blocks_.empty()) return blocks_;
  for (size_t block = 0; block < wanted_.size(); ++block) {
    if (wanted_[block]) blocks_.push_back(static_cast<int32_t>(block));
  }
  return blocks_;
}

}  // namespace linspec
