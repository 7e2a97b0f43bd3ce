// Which instruction sets were compiled, and which this machine can run.
#pragma once

#include <string>
#include <vector>

namespace tokenloom {

enum class Isa { portable, avx2, avx512, neon };

const char* isa_name(Isa isa);
// Those that were compiled and that this processor has, the best first.
std::vector<Isa> usable_isas();
// By name; throws std::invalid_argument for one that is unknown or cannot run here. "" is the best.
Isa find_isa(const std::string& name);

}  // namespace tokenloom

// Declares TABLE kernels_NAME(Isa), which returns the table that each instruction set's translation unit
// defines as `extern const TYPE SYMBOL` in its namespace. Used once, in a neutral file.
#define TL_DECLARE_PER_ISA(TYPE, SYMBOL)                              \
    namespace tokenloom {                                             \
    namespace portable { extern const TYPE SYMBOL; }                  \
    namespace avx2 { extern const TYPE SYMBOL; }                      \
    namespace avx512 { extern const TYPE SYMBOL; }                    \
    namespace neon { extern const TYPE SYMBOL; }                      \
    const TYPE& SYMBOL##_for(Isa isa);                                \
    }

#ifdef TL_HAVE_AVX2
#define TL_CASE_AVX2(SYMBOL) case Isa::avx2: return avx2::SYMBOL;
#else
#define TL_CASE_AVX2(SYMBOL)
#endif
#ifdef TL_HAVE_AVX512
#define TL_CASE_AVX512(SYMBOL) case Isa::avx512: return avx512::SYMBOL;
#else
#define TL_CASE_AVX512(SYMBOL)
#endif
#ifdef TL_HAVE_NEON
#define TL_CASE_NEON(SYMBOL) case Isa::neon: return neon::SYMBOL;
#else
#define TL_CASE_NEON(SYMBOL)
#endif
#define TL_DEFINE_PER_ISA(TYPE, SYMBOL)              \
    namespace tokenloom {                            \
    const TYPE& SYMBOL##_for(Isa isa) {              \
        switch (isa) {                               \
            TL_CASE_AVX2(SYMBOL)                     \
            TL_CASE_AVX512(SYMBOL)                   \
            TL_CASE_NEON(SYMBOL)                     \
            default: return portable::SYMBOL;        \
        }                                            \
    }                                                \
    }
