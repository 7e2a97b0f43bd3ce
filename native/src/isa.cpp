#include "isa.hpp"

#include <stdexcept>

namespace tokenloom {

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
        case Isa::neon: return "neon";
        default: return "portable";
    }
}

std::vector<Isa> usable_isas() {
    std::vector<Isa> found;
#ifdef TL_HAVE_AVX512
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") &&
        __builtin_cpu_supports("avx512vnni"))
        found.push_back(Isa::avx512);
#endif
#ifdef TL_HAVE_AVX2
    // F16C came before AVX2 on every processor that has it.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(Isa::avx2);
#endif
#ifdef TL_HAVE_NEON
    found.push_back(Isa::neon);
#endif
    found.push_back(Isa::portable);
    return found;
}

Isa find_isa(const std::string& name) {
    std::vector<Isa> usable = usable_isas();
    if (name.empty()) return usable.front();
    std::string names;
    for (Isa isa : usable) {
        if (name == isa_name(isa)) return isa;
        names += names.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
    }
    throw std::invalid_argument("instruction set " + name + " cannot run here; these can: " + names);
}

}  // namespace tokenloom
