#include "rows.hpp"

TL_DECLARE_PER_ISA(RowKernels, row_kernels)
TL_DEFINE_PER_ISA(RowKernels, row_kernels)
