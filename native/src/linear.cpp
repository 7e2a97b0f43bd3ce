#include "linear.hpp"

#include "refuse.hpp"

TL_DECLARE_PER_ISA(LinearKernels, linear_kernels)
TL_DEFINE_PER_ISA(LinearKernels, linear_kernels)

namespace tokenloom {

Epilogue find_epilogue(const std::string& name) {
    if (name == "none") return Epilogue::none;
    if (name == "silu_mul") return Epilogue::silu_mul;
    if (name == "gelu_mul") return Epilogue::gelu_mul;
    if (name == "gelu") return Epilogue::gelu;
    if (name == "gelu_erf") return Epilogue::gelu_erf;
    if (name == "relu") return Epilogue::relu;
    if (name == "residual") return Epilogue::residual;
    refuse("epilogue " + name + " is none of none, silu_mul, gelu_mul, gelu, gelu_erf, relu, residual");
}

}  // namespace tokenloom
