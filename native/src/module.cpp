// The Python module tokenloom.kernels.native._native.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "isa.hpp"

namespace nb = nanobind;

NB_MODULE(_native, m) {
    m.def("isas", [] {
        std::vector<std::string> names;
        for (tokenloom::Isa isa : tokenloom::usable_isas()) names.push_back(tokenloom::isa_name(isa));
        return names;
    });
}
