#include "simd_ops.hpp"

TL_DECLARE_PER_ISA(SimdKernels, simd_kernels)
TL_DEFINE_PER_ISA(SimdKernels, simd_kernels)
