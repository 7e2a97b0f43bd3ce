// A packed weight.
#pragma once

#include <memory>
#include <vector>

#include "kernels.hpp"
#include "memory.hpp"

namespace tokenloom {

// `matrix` points into `data` and `scales`, or into what `owner` keeps: a mapped file.
struct PackedWeight {
    PackedMatrix matrix;
    Memory data;
    std::vector<float> scales;  // i8: one per column of every panel
    std::shared_ptr<void> owner;
};

// Of i8, else 0.
inline int64_t count_scales(const PackedMatrix& m) { return m.format == Format::i8 ? m.panels * kPanel : 0; }

}  // namespace tokenloom
