// The rows of a step by the experts that they are routed to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tokenloom {

class ExpertSegments {
  public:
    // Makes room; `build` allocates nothing.
    void reserve(int64_t rows, int64_t top_k, int64_t experts);
    // `routes` [rows]: top_k weights, then top_k numbers below `experts`, `stride` apart (kernels/program.py).
    void build(const float* routes, int64_t stride, int64_t rows, int64_t top_k, int64_t experts);

    // Of the experts that have rows, by rising number: members [begin, end) are an expert's rows, rising.
    struct Segment {
        int64_t expert, begin, end;
    };
    int64_t count() const { return count_; }
    const Segment& segment(int64_t index) const { return segments_[static_cast<size_t>(index)]; }
    // The segment of a member.
    int64_t segment_of(int64_t member) const { return owners_[static_cast<size_t>(member)]; }
    // By member.
    const int32_t* rows() const { return rows_.data(); }
    const float* weights() const { return weights_.data(); }

  private:
    int64_t count_ = 0;
    std::vector<Segment> segments_;
    std::vector<int64_t> next_;
    std::vector<int32_t> rows_, owners_;
    std::vector<float> weights_;
};

}  // namespace tokenloom
