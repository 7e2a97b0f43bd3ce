// A packed weight that owns its bytes.
#pragma once

#include <vector>

#include "kernels.hpp"
#include "memory.hpp"

namespace tokenloom {

struct PackedWeight {
    PackedMatrix matrix;
    Memory data;
    std::vector<float> scales;  // i8: one per column of every panel
};

}  // namespace tokenloom
