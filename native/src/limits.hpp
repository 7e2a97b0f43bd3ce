// What the machine can do at most: the rulers of `tokenloom bench roofline`.
#pragma once

#include "isa.hpp"
#include "kernels.hpp"

namespace tokenloom {

struct LimitKernels {
    // Reads `bytes` (a multiple of 256) and returns something of them, so that the reads stay.
    int32_t (*read)(const uint8_t* data, int64_t bytes);
    // `iterations` rounds of 16 independent products in registers: fp32, bf16 or bytes.
    float (*multiply)(Format format, int64_t iterations);
};

const LimitKernels& limit_kernels_for(Isa isa);

// Operations of one round of `multiply`.
int64_t operations_per_round(Format format);

}  // namespace tokenloom
