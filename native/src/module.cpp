// The Python module tokenloom.kernels.native._native.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "isa.hpp"

namespace nb = nanobind;

namespace tokenloom {
void bind_simd(nb::module_& m);
void bind_limits(nb::module_& m);
void bind_sampler(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_weight(nb::module_& m);
void bind_batch(nb::module_& m);
void bind_model(nb::module_& m);
void bind_draft(nb::module_& m);
}  // namespace tokenloom

NB_MODULE(_native, m) {
    m.def("isas", [] {
        std::vector<std::string> names;
        for (tokenloom::Isa isa : tokenloom::usable_isas()) names.push_back(tokenloom::isa_name(isa));
        return names;
    });
    tokenloom::bind_attention(m);
    tokenloom::bind_sampler(m);
    tokenloom::bind_linear(m);
    tokenloom::bind_weight(m);
    tokenloom::bind_batch(m);
    tokenloom::bind_model(m);
    tokenloom::bind_draft(m);
    tokenloom::bind_simd(m);
    tokenloom::bind_limits(m);
}
