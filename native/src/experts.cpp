#include "experts.hpp"

#include <algorithm>

namespace tokenloom {

void ExpertSegments::reserve(int64_t rows, int64_t top_k, int64_t experts) {
    const size_t members = static_cast<size_t>(rows * top_k), most = static_cast<size_t>(experts);
    if (rows_.size() < members) {
        rows_.resize(members);
        owners_.resize(members);
        weights_.resize(members);
    }
    if (segments_.size() < most) {
        segments_.resize(most);
        next_.resize(most);
    }
}

void ExpertSegments::build(const float* routes, int64_t stride, int64_t rows, int64_t top_k, int64_t experts) {
    auto number = [&](int64_t row, int64_t j) { return static_cast<size_t>(routes[row * stride + top_k + j]); };
    std::fill(next_.begin(), next_.begin() + experts, 0);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t j = 0; j < top_k; ++j) ++next_[number(row, j)];
    count_ = 0;
    int64_t end = 0;
    for (int64_t e = 0; e < experts; ++e) {
        const int64_t size = next_[static_cast<size_t>(e)], begin = end;
        if (!size) continue;
        end += size;
        next_[static_cast<size_t>(e)] = begin;
        std::fill(owners_.begin() + begin, owners_.begin() + end, static_cast<int32_t>(count_));
        segments_[static_cast<size_t>(count_++)] = {e, begin, end};
    }
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t j = 0; j < top_k; ++j) {
            const size_t member = static_cast<size_t>(next_[number(row, j)]++);
            rows_[member] = static_cast<int32_t>(row);
            weights_[member] = routes[row * stride + j];
        }
}

}  // namespace tokenloom
