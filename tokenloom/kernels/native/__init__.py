"""The program on native C++ kernels: the same bits on every instruction set, for any batch and thread count."""
