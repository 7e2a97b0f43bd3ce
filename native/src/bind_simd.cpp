// Single vector operations, for tests: tokenloom.kernels.native._native.simd_apply.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "simd_ops.hpp"

namespace nb = nanobind;

namespace tokenloom {

namespace {

using Words = nb::ndarray<const int32_t, nb::numpy, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<nb::numpy, int32_t, nb::ndim<2>>;

const SimdOp& find_op(const SimdKernels& kernels, const std::string& name) {
    for (int64_t i = 0; i < kernels.count; ++i) {
        if (name == kernels.ops[i].name) return kernels.ops[i];
    }
    throw std::invalid_argument("name: there is no operation " + name);
}

nb::object apply(const std::string& name, const Words& a, const Words& b, const Words& c, const std::string& isa) {
    const SimdOp& op = find_op(simd_kernels_for(find_isa(isa)), name);
    size_t count = a.shape(0);
    for (const Words* words : {&a, &b, &c}) {
        if (words->shape(0) != count || words->shape(1) != 16) throw std::invalid_argument("a, b, c must be [n, 16]");
    }
    int32_t* out = new int32_t[count * kSimdOut + 1]();
    nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<int32_t*>(p); });
    for (size_t i = 0; i < count; ++i) {
        op.apply(a.data() + i * 16, b.data() + i * 16, c.data() + i * 16, out + i * kSimdOut);
    }
    return nb::cast(Result(out, {count, static_cast<size_t>(kSimdOut)}, owner));
}

}  // namespace

void bind_simd(nb::module_& m) {
    m.def("simd_ops", [] {
        const SimdKernels& kernels = simd_kernels_for(Isa::portable);
        std::vector<std::string> names;
        for (int64_t i = 0; i < kernels.count; ++i) names.push_back(kernels.ops[i].name);
        return names;
    });
    m.def("simd_apply", &apply, nb::arg("name"), nb::arg("a").noconvert(), nb::arg("b").noconvert(),
          nb::arg("c").noconvert(), nb::arg("isa") = "",
          "One vector operation on the words of int32 [n, 16] arrays; int32 [n, 64], zero where nothing is written.\n"
          "For tests.");
}

}  // namespace tokenloom
