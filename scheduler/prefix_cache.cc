#include "scheduler/prefix_cache.h"

#include <algorithm>
#include <utility>

#include "kernels/check.h"

namespace linspec {
namespace {

bool StartsWith(std::span<const int32_t> tokens, std::span<const int32_t> prefix) {
  return prefix.size() <= tokens.size() && std::equal(prefix.begin(), prefix.end(), tokens.begin());
}

}  // namespace

int64_t PrefixCache::Shared(std::span<const int32_t> prompt, std::span<const int32_t> other) {
  const auto parted = std::mismatch(prompt.begin(), prompt.end(), other.begin(), other.end()).first;
  const int64_t equal = parted - prompt.begin(), most = std::ssize(prompt) - 1;
  if (equal >= most) return most >= kGrain ? most : 0;
  return equal / kGrain * kGrain;
}

int64_t PrefixCache::Restore(std::string_view owner, std::span<const int32_t> prompt, int64_t committed, int32_t slot) {
  Entry* best = nullptr;
  int64_t longest = committed;
  for (Entry& entry : entries_) {
    const int64_t length = std::ssize(entry.tokens);
    if (length <= longest || length >= std::ssize(prompt) || entry.owner != owner) continue;
    if (!StartsWith(prompt, entry.tokens)) continue;
    best = &entry;
    longest = length;
  }
  if (best == nullptr) return 0;
  pool_->CopySlot(best->slot.id(), slot);
  Touch(best);
  return longest;
}

int64_t PrefixCache::LongestShared(std::string_view owner, std::span<const int32_t> prompt) const {
  int64_t longest = 0;
  for (const Entry& entry : entries_) {
    if (entry.owner == owner) longest = std::max(longest, Shared(prompt, entry.tokens));
  }
  return longest;
}

void PrefixCache::Snapshot(std::string_view owner, std::span<const int32_t> tokens, int32_t slot, Place place) {
  if (!Admit(owner, tokens, place)) return;
  StateSlot copy = pool_->Acquire();
  LINSPEC_CHECK(copy.valid());  // the pool has capacity() slots beyond what sequences hold
  pool_->CopySlot(slot, copy.id());
  Insert(owner, tokens, place, std::move(copy));
}

void PrefixCache::Keep(std::string_view owner, std::span<const int32_t> tokens, StateSlot slot) {
  if (Admit(owner, tokens, Place::kEnd)) Insert(owner, tokens, Place::kEnd, std::move(slot));
}

bool PrefixCache::Admit(std::string_view owner, std::span<const int32_t> tokens, Place place) {
  if (capacity_ == 0 || std::ssize(tokens) < kGrain) return false;
  for (Entry& entry : entries_) {
    if (entry.owner != owner || !std::ranges::equal(entry.tokens, tokens)) continue;
    entry.last_use = ++clock_;
    return false;
  }
  for (Entry& entry : entries_) {
    const bool continued = entry.place == Place::kEnd || (entry.place == place && place == Place::kPromptEnd);
    if (!continued || place == Place::kParting || entry.owner != owner || !StartsWith(tokens, entry.tokens)) continue;
    entry.asked_for = false;
    entry.last_use = 0;
  }
  if (size() < capacity_) return true;
  entries_.erase(std::ranges::min_element(
      entries_, {}, [](const Entry& entry) { return std::pair(entry.asked_for, entry.last_use); }));
  return true;
}

void PrefixCache::Insert(std::string_view owner, std::span<const int32_t> tokens, Place place, StateSlot slot) {
  entries_.push_back({.owner = std::string(owner),
                      .tokens = {tokens.begin(), tokens.end()},
                      .slot = std::move(slot),
                      .place = place,
                      .last_use = ++clock_});
}

// A quarter of the room stays with what nobody asked for yet, else nothing new could ever prove itself.
void PrefixCache::Touch(Entry* entry) {
  entry->asked_for = true;
  entry->last_use = ++clock_;
  const int most = capacity_ - std::max(capacity_ / 4, 1);
  if (std::ranges::count_if(entries_, &Entry::asked_for) <= most) return;
  Entry* oldest = entry;
  for (Entry& other : entries_) {
    if (other.asked_for && other.last_use < oldest->last_use) oldest = &other;
  }
  oldest->asked_for = false;
}

}  // namespace linspec
