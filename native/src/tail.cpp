#include "tail.hpp"

#include <algorithm>

namespace tokenloom {

void Tail::choose(const Batch& batch, const std::vector<int32_t>& wanted_rows) {
    cut_ = false;
    if (static_cast<int64_t>(wanted_rows.size()) == batch.rows) return;
    rows_.clear();
    logical_.clear();
    parents_.clear();
    slots_.clear();
    page_tables_.clear();
    starts_.assign(1, 0);
    auto wanted = wanted_rows.begin();
    for (int64_t s = 0; s < batch.segments; ++s) {
        const int32_t begin = batch.starts[s], end = batch.starts[s + 1];
        const bool tree = std::any_of(batch.parents + begin, batch.parents + end, [](int32_t p) { return p >= 0; });
        const int32_t shift = begin - static_cast<int32_t>(rows_.size());  // of a tree, which stays together
        for (int32_t row = begin; row < end; ++row) {
            const bool is_wanted = wanted != wanted_rows.end() && *wanted == row;
            if (is_wanted) ++wanted;
            if (!is_wanted && !tree) continue;
            rows_.push_back(row);
            logical_.push_back(batch.logical[row]);
            parents_.push_back(batch.parents[row] >= 0 ? batch.parents[row] - shift : -1);
            slots_.push_back(batch.slots[row]);
        }
        if (static_cast<int32_t>(rows_.size()) == starts_.back()) continue;
        starts_.push_back(static_cast<int32_t>(rows_.size()));
        page_tables_.insert(page_tables_.end(), batch.page_tables + s * batch.table_width,
                            batch.page_tables + (s + 1) * batch.table_width);
    }
    cut_ = static_cast<int64_t>(rows_.size()) < batch.rows;
    batch_ = Batch{static_cast<int64_t>(rows_.size()), static_cast<int64_t>(starts_.size()) - 1, nullptr, nullptr,
                   logical_.data(), slots_.data(), parents_.data(), starts_.data(), page_tables_.data(),
                   batch.table_width, nullptr};
}

int64_t Tail::place(int32_t row) const {
    auto found = std::lower_bound(rows_.begin(), rows_.end(), row);
    return found != rows_.end() && *found == row ? found - rows_.begin() : -1;
}

}  // namespace tokenloom
