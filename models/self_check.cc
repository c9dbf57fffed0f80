#include "models/self_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string_view>
#include <vector>

namespace linspec {
namespace {

constexpr int kManyRequests = 128;  // more items of work than a device has blocks
constexpr int kChain = 8;
// Small trees of several requests: rows by which other products are taken, again and again for what depends on when
// memory answers.
constexpr int kTreeNodes = 4, kTreeRequests[] = {2, 4, 8, 16, 32}, kTreeTimes = 8;

// The same text for every way. Its last kChain tokens lie within a group, the first have filled another.
class SelfCheck {
 public:
  SelfCheck(Model* model, StatePool* pool) : model_(model), pool_(pool) {
    const auto group = static_cast<int>(model->config().linear_attention.group_size);
    chain_ = std::clamp(group / 2, 1, kChain);
    uint32_t state = 1;
    for (int i = 0; i < group + std::min(group, 2 * kChain); ++i) {
      state = state * 1664525 + 1013904223;
      tokens_.push_back(static_cast<int32_t>((state >> 8) % model->config().vocab_size));
    }
  }

  absl::Status Run() {
    for (const auto way : {&SelfCheck::Decode, &SelfCheck::Prefill, &SelfCheck::Tree, &SelfCheck::Many}) {
      if (absl::Status status = (this->*way)(); !status.ok()) return status;
    }
    return absl::OkStatus();
  }

 private:
  std::span<const int32_t> Tokens(int count) const { return std::span(tokens_).first(count); }

  absl::Status PrefillInto(const StateSlot& slot, int count) {
    const PrefillChunk chunks[] = {{slot.id(), Tokens(count)}};
    return model_->Prefill(chunks, pool_);
  }

  absl::Status Decode() {
    const StateSlot slot = pool_->Acquire();
    for (const int32_t token : tokens_) {
      VerifyBatch batch;
      batch.Add(slot.id(), DraftTree::Root(token));
      const absl::StatusOr<VerifyResult> result = model_->Verify(batch, *pool_);
      if (!result.ok()) return result.status();
      expected_.assign(result->logits.begin(), result->logits.end());
      const std::vector<int32_t> path[] = {{0}};
      if (absl::Status status = model_->Commit(batch, path, pool_); !status.ok()) return status;
    }
    double mean = 0;
    for (const float logit : expected_) mean += logit / static_cast<double>(expected_.size());
    for (const float logit : expected_) spread_ += (logit - mean) * (logit - mean);
    if (std::isfinite(spread_)) return absl::OkStatus();
    return absl::InternalError("self-check: decoding gives logits that are not finite");
  }

  absl::Status Prefill() {
    const StateSlot slot = pool_->Acquire();
    const auto before = static_cast<int>(tokens_.size()) - 1;
    if (absl::Status status = PrefillInto(slot, before); !status.ok()) return status;
    VerifyBatch batch;
    batch.Add(slot.id(), DraftTree::Root(tokens_.back()));
    return Compare("prefill", batch, [](int) { return 0; });
  }

  // The chain beside a wrong guess at each of its nodes; then what was right of it, committed.
  absl::Status Tree() {
    const StateSlot slot = pool_->Acquire();
    const auto before = static_cast<int>(tokens_.size()) - chain_;
    if (absl::Status status = PrefillInto(slot, before); !status.ok()) return status;
    DraftTree tree = DraftTree::Root(tokens_[before]);
    std::vector<int32_t> path[] = {{}};
    int node = 0;
    for (int i = before + 1; i < std::ssize(tokens_); ++i) {
      path[0].push_back(node);
      tree.Add(tokens_[i - 1], node);
      node = tree.Add(tokens_[i], node);
    }
    VerifyBatch batch;
    batch.Add(slot.id(), tree);
    if (absl::Status status = Compare("a tree", batch, [node](int) { return node; }); !status.ok()) return status;
    if (absl::Status status = model_->Commit(batch, path, pool_); !status.ok()) return status;
    VerifyBatch last;
    last.Add(slot.id(), DraftTree::Root(tokens_.back()));
    return Compare("decoding after a path of a tree", last, [](int) { return 0; });
  }

  absl::Status Many() {
    std::vector<StateSlot> slots;
    slots.push_back(pool_->Acquire());
    const auto before = static_cast<int>(tokens_.size()) - 1;
    if (absl::Status status = PrefillInto(slots[0], before); !status.ok()) return status;
    while (std::ssize(slots) < kManyRequests && pool_->num_free() > 0) {
      slots.push_back(pool_->Acquire());
      pool_->CopySlot(slots[0].id(), slots.back().id());
    }
    VerifyBatch batch;
    for (const StateSlot& slot : slots) batch.Add(slot.id(), DraftTree::Root(tokens_.back()));
    if (absl::Status many = Compare("a request among many", batch, [](int request) { return request; }); !many.ok()) {
      return many;
    }
    return TreesOfMany(slots);
  }

  // slots: whose last token is not committed.
  absl::Status TreesOfMany(std::span<const StateSlot> slots) {
    DraftTree tree = DraftTree::Root(tokens_.back());
    while (tree.num_nodes() < kTreeNodes) tree.Add(tokens_[tree.num_nodes()], tree.num_nodes() - 1);
    for (const int requests : kTreeRequests) {
      if (requests > std::ssize(slots)) break;
      VerifyBatch batch;
      for (const StateSlot& slot : slots.first(requests)) batch.Add(slot.id(), tree);
      const auto root = [](int request) { return request * kTreeNodes; };
      for (int time = 0; time < kTreeTimes; ++time) {
        if (absl::Status status = Compare("a tree among many", batch, root); !status.ok()) return status;
      }
    }
    return absl::OkStatus();
  }

  // row_of(request): the row that looks at the whole text.
  template <typename RowOf>
  absl::Status Compare(std::string_view way, const VerifyBatch& batch, const RowOf& row_of) {
    const absl::StatusOr<VerifyResult> result = model_->Verify(batch, *pool_);
    if (!result.ok()) return result.status();
    for (int request = 0; request < batch.num_requests(); ++request) {
      const auto logits = result->logits.subspan(row_of(request) * expected_.size(), expected_.size());
      double squares = 0;
      for (size_t i = 0; i < logits.size(); ++i) squares += std::pow(logits[i] - expected_[i], 2);
      const double apart = std::sqrt(squares / spread_);
      if (apart <= kSelfCheckTolerance) continue;
      return absl::InternalError(fmt::format(
          "self-check: {} gives logits that are {:.2g} of their spread from those of decoding (request {} of "
          "{}; at most {} is rounding)",
          way, apart, request, batch.num_requests(), kSelfCheckTolerance));
    }
    return absl::OkStatus();
  }

  Model* const model_;
  StatePool* const pool_;
  int chain_ = 1;
  std::vector<int32_t> tokens_;
  std::vector<float> expected_;  // logits after all tokens, decoded one by one
  double spread_ = 0;            // sum of their squared differences from the mean
};

}  // namespace

absl::Status CheckSelf(Model* model, StatePool* pool) { return SelfCheck(model, pool).Run(); }

}  // namespace linspec
