// Rows by what they share: the expert that they are routed to, the adapter of their sequence.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace tokenloom {

class RowGroups {
  public:
    // Makes room; `build` allocates nothing.
    void reserve(int64_t members, int64_t keys) {
        if (static_cast<int64_t>(members_.size()) < members) members_.resize(static_cast<size_t>(members));
        if (static_cast<int64_t>(next_.size()) < keys) {
            next_.resize(static_cast<size_t>(keys));
            groups_.resize(static_cast<size_t>(keys));
        }
    }

    // Groups [0, members) by key_of(member), below `keys`; below 0: in no group.
    template <class KeyOf>
    void build(int64_t members, int64_t keys, KeyOf&& key_of) {
        std::fill(next_.begin(), next_.begin() + keys, 0);
        for (int64_t i = 0; i < members; ++i)
            if (const int64_t key = key_of(i); key >= 0) ++next_[static_cast<size_t>(key)];
        count_ = 0;
        int64_t end = 0;
        for (int64_t key = 0; key < keys; ++key) {
            const int64_t size = next_[static_cast<size_t>(key)], begin = end;
            if (!size) continue;
            end += size;
            next_[static_cast<size_t>(key)] = begin;
            groups_[static_cast<size_t>(count_++)] = {key, begin, end};
        }
        for (int64_t i = 0; i < members; ++i)
            if (const int64_t key = key_of(i); key >= 0)
                members_[static_cast<size_t>(next_[static_cast<size_t>(key)]++)] = static_cast<int32_t>(i);
    }

    // Those that are not empty, by rising key: members()[begin..end), rising.
    struct Group {
        int64_t key, begin, end;
    };
    int64_t count() const { return count_; }
    const Group& group(int64_t index) const { return groups_[static_cast<size_t>(index)]; }
    const int32_t* members() const { return members_.data(); }

  private:
    int64_t count_ = 0;
    std::vector<Group> groups_;
    std::vector<int64_t> next_;
    std::vector<int32_t> members_;
};

}  // namespace tokenloom
