#include "linear.hpp"

TL_DECLARE_PER_ISA(LinearKernels, linear_kernels)
TL_DEFINE_PER_ISA(LinearKernels, linear_kernels)
