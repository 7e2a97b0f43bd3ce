// Products of activations and packed weights.
#pragma once

#include <string>

#include "isa.hpp"
#include "kernels.hpp"

namespace tokenloom {

struct LinearKernels {
    // All rows of the call times the panels [begin, end) of its weight. Threads split panels, never the depth.
    void (*linear)(const LinearCall& call, int64_t begin, int64_t end);
    // Quantises rows [begin, end) of `source` (float or bf16 by `dtype`, `stride` elements apart) for `weight`.
    void (*quantize_rows)(const void* source, Dtype dtype, int64_t stride, const PackedMatrix& weight,
                          const QuantizedRows& out, int64_t begin, int64_t end);
};

const LinearKernels& linear_kernels_for(Isa isa);

// By its name in kernels/program.py. Throws std::invalid_argument.
Epilogue find_epilogue(const std::string& name);

}  // namespace tokenloom
