// See limits.hpp.
#include TL_SIMD

#include "limits.hpp"

namespace tokenloom {
namespace TL_ISA {

static int32_t read(const uint8_t* data, int64_t bytes) {
    I a = izero(), b = izero(), c = izero(), d = izero();
    for (int64_t i = 0; i < bytes; i += 256) {
        prefetch(data + i + 4096);
        a = ixor(a, iload(data + i));
        b = ixor(b, iload(data + i + 64));
        c = ixor(c, iload(data + i + 128));
        d = ixor(d, iload(data + i + 192));
    }
    return isum(ixor(ixor(a, b), ixor(c, d)));
}

constexpr int kChains = 16;

static float multiply(Format format, int64_t iterations) {
    F x = set(1.0f), y = set(0.5f);
    I p = iset(0x3f803f80), q = iset(0x3f003f00);
    F f[kChains];
    I n[kChains];
    for (int c = 0; c < kChains; ++c) f[c] = zero(), n[c] = izero();
    if (format == Format::f32) {
        for (int64_t i = 0; i < iterations; ++i)
            for (int c = 0; c < kChains; ++c) f[c] = fma(x, y, f[c]);
    } else if (format == Format::bf16) {
        for (int64_t i = 0; i < iterations; ++i)
            for (int c = 0; c < kChains; ++c) f[c] = dot_bf16(f[c], p, q);
    } else {
        for (int64_t i = 0; i < iterations; ++i)
            for (int c = 0; c < kChains; ++c) n[c] = dot_u8s8(n[c], p, q);
    }
    float total = 0;
    for (int c = 0; c < kChains; ++c) total += sum(f[c]) + static_cast<float>(isum(n[c]));
    return total;
}

extern const LimitKernels limit_kernels;
const LimitKernels limit_kernels = {&read, &multiply};

}  // namespace TL_ISA
}  // namespace tokenloom
