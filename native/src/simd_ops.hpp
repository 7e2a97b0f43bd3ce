// The vector operations one by one, for the test that compares instruction sets.
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace tokenloom {

// One operation on words of three vectors. A result that is narrower than 16 words leaves the rest of out as it
// was; mul_wide and transpose4 fill more than 16.
constexpr int kSimdOut = 64;

struct SimdOp {
    const char* name;
    void (*apply)(const int32_t* a, const int32_t* b, const int32_t* c, int32_t* out);
};

struct SimdKernels {
    const SimdOp* ops;
    int64_t count;
};

const SimdKernels& simd_kernels_for(Isa isa);

}  // namespace tokenloom
