// 16 lanes as a plain array: for machines without a path of their own, and as the readable definition of what
// each operation means.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define TL_INLINE static inline __attribute__((always_inline))
#define TL_NOINLINE static __attribute__((noinline))

namespace tokenloom {
namespace TL_ISA {

struct F { float v[16]; };
struct I { int32_t v[16]; };
struct M { uint32_t v; };

constexpr int kMaxTileRows = 4;

#define TL_EACH(i) for (int i = 0; i < 16; ++i)

TL_INLINE F zero() { return F{}; }
TL_INLINE F set(float x) { F r; TL_EACH(i) r.v[i] = x; return r; }
TL_INLINE F load(const float* p) { F r; memcpy(r.v, p, 64); return r; }
TL_INLINE void store(float* p, F a) { memcpy(p, a.v, 64); }
TL_INLINE M first(int n) { return {n >= 16 ? 0xffffu : (1u << n) - 1u}; }
TL_INLINE F load(const float* p, int n) { F r{}; TL_EACH(i) if (i < n) r.v[i] = p[i]; return r; }
TL_INLINE void store(float* p, F a, int n) { TL_EACH(i) if (i < n) p[i] = a.v[i]; }
TL_INLINE F add(F a, F b) { F r; TL_EACH(i) r.v[i] = a.v[i] + b.v[i]; return r; }
TL_INLINE F sub(F a, F b) { F r; TL_EACH(i) r.v[i] = a.v[i] - b.v[i]; return r; }
TL_INLINE F mul(F a, F b) { F r; TL_EACH(i) r.v[i] = a.v[i] * b.v[i]; return r; }
TL_INLINE F div(F a, F b) { F r; TL_EACH(i) r.v[i] = a.v[i] / b.v[i]; return r; }
TL_INLINE F fma(F a, F b, F c) { F r; TL_EACH(i) r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]); return r; }
TL_INLINE F max(F a, F b) { F r; TL_EACH(i) r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return r; }
TL_INLINE F min(F a, F b) { F r; TL_EACH(i) r.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return r; }
TL_INLINE F round_even(F a) { F r; TL_EACH(i) r.v[i] = __builtin_rintf(a.v[i]); return r; }
TL_INLINE F scale_by_power(F a, F n) {
    F r;
    TL_EACH(i) {
        int32_t b = n.v[i] == n.v[i] ? (int32_t(n.v[i]) + 127) << 23 : 0;
        float factor;
        memcpy(&factor, &b, 4);
        r.v[i] = a.v[i] * factor;
    }
    return r;
}
TL_INLINE M lt(F a, F b) { M m{0}; TL_EACH(i) m.v |= uint32_t(a.v[i] < b.v[i]) << i; return m; }
TL_INLINE M gt(F a, F b) { M m{0}; TL_EACH(i) m.v |= uint32_t(a.v[i] > b.v[i]) << i; return m; }
TL_INLINE M ge(F a, F b) { M m{0}; TL_EACH(i) m.v |= uint32_t(a.v[i] >= b.v[i]) << i; return m; }
TL_INLINE M eq(F a, F b) { M m{0}; TL_EACH(i) m.v |= uint32_t(a.v[i] == b.v[i]) << i; return m; }
TL_INLINE F select(M m, F yes, F no) { F r; TL_EACH(i) r.v[i] = (m.v >> i) & 1 ? yes.v[i] : no.v[i]; return r; }
TL_INLINE uint32_t bits(M m) { return m.v; }
TL_INLINE M mask(uint32_t b) { return {b}; }

TL_INLINE I izero() { return I{}; }
TL_INLINE I iset(int32_t x) { I r; TL_EACH(i) r.v[i] = x; return r; }
TL_INLINE I iload(const void* p) { I r; memcpy(r.v, p, 64); return r; }
TL_INLINE void istore(void* p, I a) { memcpy(p, a.v, 64); }
TL_INLINE I iota() { I r; TL_EACH(i) r.v[i] = i; return r; }
TL_INLINE I iadd(I a, I b) { I r; TL_EACH(i) r.v[i] = int32_t(uint32_t(a.v[i]) + uint32_t(b.v[i])); return r; }
TL_INLINE I isub(I a, I b) { I r; TL_EACH(i) r.v[i] = int32_t(uint32_t(a.v[i]) - uint32_t(b.v[i])); return r; }
TL_INLINE I imul(I a, I b) { I r; TL_EACH(i) r.v[i] = int32_t(uint32_t(a.v[i]) * uint32_t(b.v[i])); return r; }
TL_INLINE I iand(I a, I b) { I r; TL_EACH(i) r.v[i] = a.v[i] & b.v[i]; return r; }
TL_INLINE I ior(I a, I b) { I r; TL_EACH(i) r.v[i] = a.v[i] | b.v[i]; return r; }
TL_INLINE I ixor(I a, I b) { I r; TL_EACH(i) r.v[i] = a.v[i] ^ b.v[i]; return r; }
template <int N> TL_INLINE I shl(I a) { I r; TL_EACH(i) r.v[i] = int32_t(uint32_t(a.v[i]) << N); return r; }
template <int N> TL_INLINE I shr(I a) { I r; TL_EACH(i) r.v[i] = int32_t(uint32_t(a.v[i]) >> N); return r; }
template <int N> TL_INLINE I sar(I a) { I r; TL_EACH(i) r.v[i] = a.v[i] >> N; return r; }
TL_INLINE M igt(I a, I b) { M m{0}; TL_EACH(i) m.v |= uint32_t(a.v[i] > b.v[i]) << i; return m; }
TL_INLINE F to_float(I a) { F r; TL_EACH(i) r.v[i] = float(a.v[i]); return r; }
// As the instruction does: what does not fit (NaN too) becomes the lowest integer.
TL_INLINE I to_int(F a) {
    I r;
    TL_EACH(i) {
        float x = __builtin_rintf(a.v[i]);
        r.v[i] = x >= -2147483648.0f && x < 2147483648.0f ? int32_t(x) : INT32_MIN;
    }
    return r;
}
TL_INLINE I as_int(F a) { I r; memcpy(r.v, a.v, 64); return r; }
TL_INLINE F as_float(I a) { F r; memcpy(r.v, a.v, 64); return r; }

struct Wide { I low, high; };
TL_INLINE Wide mul_wide(I a, uint32_t b) {
    Wide r;
    TL_EACH(i) {
        uint64_t product = uint64_t(uint32_t(a.v[i])) * b;
        r.low.v[i] = int32_t(uint32_t(product));
        r.high.v[i] = int32_t(uint32_t(product >> 32));
    }
    return r;
}
TL_INLINE void transpose4(I& a, I& b, I& c, I& d) {
    I* rows[4] = {&a, &b, &c, &d};
    int32_t cells[4][16];
    for (int i = 0; i < 4; ++i) memcpy(cells[i], rows[i]->v, 64);
    for (int i = 0; i < 4; ++i)
        TL_EACH(j) rows[i]->v[j] = cells[j % 4][j / 4 * 4 + i];
}

TL_INLINE I load_u8(const uint8_t* p) { I r; TL_EACH(i) r.v[i] = p[i]; return r; }
TL_INLINE I load_i8(const int8_t* p) { I r; TL_EACH(i) r.v[i] = p[i]; return r; }
TL_INLINE I load_u16(const uint16_t* p) { I r; TL_EACH(i) r.v[i] = p[i]; return r; }
TL_INLINE void store_i8(int8_t* p, I a) { TL_EACH(i) p[i] = int8_t(uint8_t(a.v[i])); }

TL_INLINE float bf16_float(uint32_t half) { uint32_t b = half << 16; float x; memcpy(&x, &b, 4); return x; }
TL_INLINE F load_bf16(const uint16_t* p) { F r; TL_EACH(i) r.v[i] = bf16_float(p[i]); return r; }
TL_INLINE F load_bf16(const uint16_t* p, int n) { F r{}; TL_EACH(i) if (i < n) r.v[i] = bf16_float(p[i]); return r; }
TL_INLINE void store_high(uint16_t* p, I a) { TL_EACH(i) p[i] = uint16_t(uint32_t(a.v[i]) >> 16); }
TL_INLINE void store_high(uint16_t* p, I a, int n) { TL_EACH(i) if (i < n) p[i] = uint16_t(uint32_t(a.v[i]) >> 16); }
TL_INLINE float f16_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff, b;
    if (exponent == 31) {
        b = sign | 0x7f800000u | (fraction << 13) | (fraction ? 0x400000u : 0u);
    } else if (exponent) {
        b = sign | ((exponent + 112) << 23) | (fraction << 13);
    } else {
        float x = float(fraction) * 5.9604644775390625e-8f;  // 2^-24
        memcpy(&b, &x, 4);
        b |= sign;
    }
    float x;
    memcpy(&x, &b, 4);
    return x;
}
TL_INLINE F load_f16(const uint16_t* p) { F r; TL_EACH(i) r.v[i] = f16_float(p[i]); return r; }

TL_INLINE float flush(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0.0f, x) : x; }
// fma with denormals as zero; a result is denormal if it is after rounding to 24 bits (spec.fma_flushed).
TL_INLINE float fma_flushed(float a, float b, float c) {
    a = flush(a), b = flush(b), c = flush(c);
    float r = __builtin_fmaf(a, b, c);
    if (__builtin_fabsf(r) > 1.17549435e-38f) return r;
    double sign = __builtin_copysign(1.0, double(r));
    bool below = sign * (double(a) * double(b)) < (0x1p-126 - 0x1p-151) - sign * double(c);
    return below ? __builtin_copysignf(0.0f, r) : flush(r);
}
TL_INLINE void store_bf16_flushed(uint16_t* p, F a) {
    TL_EACH(i) {
        float x = flush(a.v[i]);
        uint32_t b;
        memcpy(&b, &x, 4);
        p[i] = uint16_t((b + 0x7fffu + (b >> 16 & 1)) >> 16);
    }
}
TL_INLINE F dot_bf16(F acc, I a, I b) {
    F r;
    TL_EACH(i) {
        uint32_t x = uint32_t(a.v[i]), y = uint32_t(b.v[i]);
        float odd = fma_flushed(bf16_float(x >> 16), bf16_float(y >> 16), acc.v[i]);
        r.v[i] = fma_flushed(bf16_float(x & 0xffff), bf16_float(y & 0xffff), odd);
    }
    return r;
}
TL_INLINE I dot_u8s8(I acc, I a, I b) {
    TL_EACH(i) {
        uint8_t x[4];
        int8_t y[4];
        memcpy(x, &a.v[i], 4);
        memcpy(y, &b.v[i], 4);
        acc.v[i] += x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
    }
    return acc;
}

TL_INLINE void prefetch(const void*) {}

struct FlushDenormals { FlushDenormals() {} ~FlushDenormals() {} };

TL_INLINE float sum(F a) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; ++i) a.v[i] = a.v[i] + a.v[i + n];
    return a.v[0];
}
TL_INLINE float max_lane(F a) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; ++i) a.v[i] = a.v[i] > a.v[i + n] ? a.v[i] : a.v[i + n];
    return a.v[0];
}
TL_INLINE int32_t isum(I a) { int32_t r = 0; TL_EACH(i) r += a.v[i]; return r; }

#undef TL_EACH

}  // namespace TL_ISA
}  // namespace tokenloom
