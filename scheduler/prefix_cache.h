// Keeps states that token prefixes led to, so that a prompt that begins like an earlier one starts where the two part.
//
// A KV cache can be cut at any token; a recurrent state can only be taken up where it was kept, and costs one slot
// whatever it covers. So states are kept where they are likely to be asked for: at the end of a sequence, which the
// next turn of a chat repeats, and at the end of its prompt, because text that went to the client and back need not
// become the same tokens again; and where two prompts were seen to part (a shared system prompt). A restored state has
// the bits of a computed one (docs/design.md, invariant 2): the cache changes speed only.
//
// An entry belongs to its owner (a tenant, and the salt of its requests); others can neither use it nor learn of it
// from response times. The least recently used entry makes room, and entries that were never asked for go first.
//
// Threads: engine thread only. Holds at most `capacity` slots of the pool, which must outlive it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "models/state_pool.h"

namespace linspec {

class PrefixCache {
 public:
  // Tokens. Shorter prefixes are not worth a slot, and prompts part at multiples of it: what is common by accident
  // beyond a shared beginning (the first words of the next message) would otherwise make a new entry for every pair.
  static constexpr int64_t kGrain = 64;
  // What two prompts share that is worth keeping: a multiple of kGrain, or all of `prompt` but its last token.
  static int64_t Shared(std::span<const int32_t> prompt, std::span<const int32_t> other);

  PrefixCache(StatePool* pool, int capacity) : pool_(pool), capacity_(capacity) {}  // capacity 0: keeps nothing

  int capacity() const { return capacity_; }
  int size() const { return static_cast<int>(entries_.size()); }

  // Puts the longest kept state that `prompt` starts with into `slot` and returns how many tokens it covers: more than
  // `committed`, what the slot covers now, and fewer than the prompt has, since the logits after the last token are
  // wanted. 0: there is none; the slot is untouched.
  int64_t Restore(std::string_view owner, std::span<const int32_t> prompt, int64_t committed, int32_t slot);
  // The most that the prompt shares with what was kept.
  int64_t LongestShared(std::string_view owner, std::span<const int32_t> prompt) const;

  enum class Place : uint8_t { kParting, kPromptEnd, kEnd };
  // `tokens` led to the state in the slot. Snapshot copies the state; Keep takes the slot of a sequence that ended. An
  // end takes over from those that it continues, which go first from then on: a prompt's from all, a sequence's from
  // sequences'. So a long conversation does not push out the others.
  void Snapshot(std::string_view owner, std::span<const int32_t> tokens, int32_t slot, Place place);
  void Keep(std::string_view owner, std::span<const int32_t> tokens, StateSlot slot);

 private:
  struct Entry {
    std::string owner;
    std::vector<int32_t> tokens;
    StateSlot slot;
    Place place;
    bool asked_for = false;  // and so among those that go last
    uint64_t last_use = 0;
  };
  // Makes room for an entry, unless the tokens are too few or known.
  bool Admit(std::string_view owner, std::span<const int32_t> tokens, Place place);
  void Insert(std::string_view owner, std::span<const int32_t> tokens, Place place, StateSlot slot);
  void Touch(Entry* entry);  // it was asked for

  StatePool* const pool_;
  const int capacity_;
  std::vector<Entry> entries_;
  uint64_t clock_ = 0;
};

}  // namespace linspec
