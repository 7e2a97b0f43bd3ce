#include "limits.hpp"

TL_DECLARE_PER_ISA(LimitKernels, limit_kernels)
TL_DEFINE_PER_ISA(LimitKernels, limit_kernels)

namespace tokenloom {

int64_t operations_per_round(Format format) {
    // 16 chains of 16 lanes; a lane multiplies and adds 1, 2 or 4 pairs.
    int64_t pairs = format == Format::f32 ? 1 : format == Format::bf16 ? 2 : 4;
    return 16 * 16 * pairs * 2;
}

}  // namespace tokenloom
