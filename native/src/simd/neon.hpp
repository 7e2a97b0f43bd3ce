// 16 lanes in four registers: Arm NEON (AArch64, no extensions needed).
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#define TL_INLINE static inline __attribute__((always_inline))
#define TL_NOINLINE static __attribute__((noinline))

namespace tokenloom {
namespace TL_ISA {

struct F { float32x4_t v[4]; };
struct I { int32x4_t v[4]; };
struct M { uint32x4_t v[4]; };

constexpr int kMaxTileRows = 3;

#define TL_EACH(i) for (int i = 0; i < 4; ++i)

TL_INLINE F set(float x) { F r; TL_EACH(i) r.v[i] = vdupq_n_f32(x); return r; }
TL_INLINE F zero() { return set(0.0f); }
TL_INLINE F load(const float* p) { F r; TL_EACH(i) r.v[i] = vld1q_f32(p + 4 * i); return r; }
TL_INLINE void store(float* p, F a) { TL_EACH(i) vst1q_f32(p + 4 * i, a.v[i]); }
TL_INLINE I iota() {
    const int32_t lane[4] = {0, 1, 2, 3};
    I r;
    TL_EACH(i) r.v[i] = vaddq_s32(vld1q_s32(lane), vdupq_n_s32(4 * i));
    return r;
}
TL_INLINE M first(int n) {
    M m;
    I lane = iota();
    TL_EACH(i) m.v[i] = vcltq_s32(lane.v[i], vdupq_n_s32(n));
    return m;
}
TL_INLINE F load(const float* p, int n) {
    if (n >= 16) return load(p);
    float part[16] = {0};
    for (int i = 0; i < n; ++i) part[i] = p[i];
    return load(part);
}
TL_INLINE void store(float* p, F a, int n) {
    if (n >= 16) return store(p, a);
    float part[16];
    store(part, a);
    for (int i = 0; i < n; ++i) p[i] = part[i];
}
TL_INLINE F add(F a, F b) { F r; TL_EACH(i) r.v[i] = vaddq_f32(a.v[i], b.v[i]); return r; }
TL_INLINE F sub(F a, F b) { F r; TL_EACH(i) r.v[i] = vsubq_f32(a.v[i], b.v[i]); return r; }
TL_INLINE F mul(F a, F b) { F r; TL_EACH(i) r.v[i] = vmulq_f32(a.v[i], b.v[i]); return r; }
TL_INLINE F div(F a, F b) { F r; TL_EACH(i) r.v[i] = vdivq_f32(a.v[i], b.v[i]); return r; }
TL_INLINE F fma(F a, F b, F c) { F r; TL_EACH(i) r.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]); return r; }
// Not the instructions, which treat NaN and zeros otherwise.
TL_INLINE F max(F a, F b) { F r; TL_EACH(i) r.v[i] = vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); return r; }
TL_INLINE F min(F a, F b) { F r; TL_EACH(i) r.v[i] = vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); return r; }
TL_INLINE F round_even(F a) { F r; TL_EACH(i) r.v[i] = vrndnq_f32(a.v[i]); return r; }
TL_INLINE F scale_by_power(F a, F n) {
    F r;
    TL_EACH(i) {
        int32x4_t factor = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23);
        r.v[i] = vmulq_f32(a.v[i], vreinterpretq_f32_s32(factor));
    }
    return r;
}
TL_INLINE M lt(F a, F b) { M m; TL_EACH(i) m.v[i] = vcltq_f32(a.v[i], b.v[i]); return m; }
TL_INLINE M gt(F a, F b) { M m; TL_EACH(i) m.v[i] = vcgtq_f32(a.v[i], b.v[i]); return m; }
TL_INLINE M ge(F a, F b) { M m; TL_EACH(i) m.v[i] = vcgeq_f32(a.v[i], b.v[i]); return m; }
TL_INLINE M eq(F a, F b) { M m; TL_EACH(i) m.v[i] = vceqq_f32(a.v[i], b.v[i]); return m; }
TL_INLINE F select(M m, F yes, F no) { F r; TL_EACH(i) r.v[i] = vbslq_f32(m.v[i], yes.v[i], no.v[i]); return r; }
TL_INLINE uint32_t bits(M m) {
    const uint32_t place[4] = {1, 2, 4, 8};
    uint32x4_t bit = vld1q_u32(place);
    uint32_t r = 0;
    TL_EACH(i) r |= vaddvq_u32(vandq_u32(m.v[i], bit)) << (4 * i);
    return r;
}
TL_INLINE M mask(uint32_t b) {
    const uint32_t place[4] = {1, 2, 4, 8};
    uint32x4_t bit = vld1q_u32(place);
    M m;
    TL_EACH(i) m.v[i] = vtstq_u32(vdupq_n_u32(b >> (4 * i)), bit);
    return m;
}

TL_INLINE I iset(int32_t x) { I r; TL_EACH(i) r.v[i] = vdupq_n_s32(x); return r; }
TL_INLINE I izero() { return iset(0); }
TL_INLINE I iload(const void* p) {
    I r;
    TL_EACH(i) r.v[i] = vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p) + 16 * i));
    return r;
}
TL_INLINE void istore(void* p, I a) {
    TL_EACH(i) vst1q_u8(static_cast<uint8_t*>(p) + 16 * i, vreinterpretq_u8_s32(a.v[i]));
}
TL_INLINE I iadd(I a, I b) { I r; TL_EACH(i) r.v[i] = vaddq_s32(a.v[i], b.v[i]); return r; }
TL_INLINE I isub(I a, I b) { I r; TL_EACH(i) r.v[i] = vsubq_s32(a.v[i], b.v[i]); return r; }
TL_INLINE I imul(I a, I b) { I r; TL_EACH(i) r.v[i] = vmulq_s32(a.v[i], b.v[i]); return r; }
TL_INLINE I iand(I a, I b) { I r; TL_EACH(i) r.v[i] = vandq_s32(a.v[i], b.v[i]); return r; }
TL_INLINE I ior(I a, I b) { I r; TL_EACH(i) r.v[i] = vorrq_s32(a.v[i], b.v[i]); return r; }
TL_INLINE I ixor(I a, I b) { I r; TL_EACH(i) r.v[i] = veorq_s32(a.v[i], b.v[i]); return r; }
template <int N> TL_INLINE I shl(I a) { I r; TL_EACH(i) r.v[i] = vshlq_n_s32(a.v[i], N); return r; }
template <int N> TL_INLINE I shr(I a) {
    I r;
    TL_EACH(i) r.v[i] = vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v[i]), N));
    return r;
}
template <int N> TL_INLINE I sar(I a) { I r; TL_EACH(i) r.v[i] = vshrq_n_s32(a.v[i], N); return r; }
TL_INLINE M igt(I a, I b) { M m; TL_EACH(i) m.v[i] = vcgtq_s32(a.v[i], b.v[i]); return m; }
TL_INLINE F to_float(I a) { F r; TL_EACH(i) r.v[i] = vcvtq_f32_s32(a.v[i]); return r; }
// The instruction saturates and makes 0 of NaN: what does not fit becomes the lowest integer.
TL_INLINE I to_int(F a) {
    const float32x4_t end = vdupq_n_f32(2147483648.0f);
    I r;
    TL_EACH(i) r.v[i] = vbslq_s32(vcltq_f32(a.v[i], end), vcvtnq_s32_f32(a.v[i]), vdupq_n_s32(INT32_MIN));
    return r;
}
TL_INLINE I as_int(F a) { I r; TL_EACH(i) r.v[i] = vreinterpretq_s32_f32(a.v[i]); return r; }
TL_INLINE F as_float(I a) { F r; TL_EACH(i) r.v[i] = vreinterpretq_f32_s32(a.v[i]); return r; }

struct Wide { I low, high; };
TL_INLINE Wide mul_wide(I a, uint32_t b) {
    Wide r;
    TL_EACH(i) {
        uint32x4_t x = vreinterpretq_u32_s32(a.v[i]);
        uint32x4_t front = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(x), b));
        uint32x4_t back = vreinterpretq_u32_u64(vmull_n_u32(vget_high_u32(x), b));
        r.low.v[i] = vreinterpretq_s32_u32(vuzp1q_u32(front, back));
        r.high.v[i] = vreinterpretq_s32_u32(vuzp2q_u32(front, back));
    }
    return r;
}
TL_INLINE void transpose4(I& a, I& b, I& c, I& d) {
    TL_EACH(i) {
        int64x2_t ab = vreinterpretq_s64_s32(vzip1q_s32(a.v[i], b.v[i]));
        int64x2_t ab2 = vreinterpretq_s64_s32(vzip2q_s32(a.v[i], b.v[i]));
        int64x2_t cd = vreinterpretq_s64_s32(vzip1q_s32(c.v[i], d.v[i]));
        int64x2_t cd2 = vreinterpretq_s64_s32(vzip2q_s32(c.v[i], d.v[i]));
        a.v[i] = vreinterpretq_s32_s64(vzip1q_s64(ab, cd));
        b.v[i] = vreinterpretq_s32_s64(vzip2q_s64(ab, cd));
        c.v[i] = vreinterpretq_s32_s64(vzip1q_s64(ab2, cd2));
        d.v[i] = vreinterpretq_s32_s64(vzip2q_s64(ab2, cd2));
    }
}

TL_INLINE I load_u8(const uint8_t* p) {
    uint8x16_t bytes = vld1q_u8(p);
    uint16x8_t front = vmovl_u8(vget_low_u8(bytes)), back = vmovl_u8(vget_high_u8(bytes));
    return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(front))),
             vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(front))),
             vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(back))),
             vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(back)))}};
}
TL_INLINE I load_i8(const int8_t* p) {
    int8x16_t bytes = vld1q_s8(p);
    int16x8_t front = vmovl_s8(vget_low_s8(bytes)), back = vmovl_s8(vget_high_s8(bytes));
    return {{vmovl_s16(vget_low_s16(front)), vmovl_s16(vget_high_s16(front)), vmovl_s16(vget_low_s16(back)),
             vmovl_s16(vget_high_s16(back))}};
}
TL_INLINE I load_u16(const uint16_t* p) {
    I r;
    TL_EACH(i) r.v[i] = vreinterpretq_s32_u32(vmovl_u16(vld1_u16(p + 4 * i)));
    return r;
}
TL_INLINE void store_i8(int8_t* p, I a) {
    int16x8_t front = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    int16x8_t back = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(front), vmovn_s16(back)));
}

TL_INLINE F load_bf16(const uint16_t* p) {
    F r;
    TL_EACH(i) r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
    return r;
}
TL_INLINE F load_bf16(const uint16_t* p, int n) {
    if (n >= 16) return load_bf16(p);
    uint16_t part[16] = {0};
    for (int i = 0; i < n; ++i) part[i] = p[i];
    return load_bf16(part);
}
TL_INLINE void store_high(uint16_t* p, I a) {
    TL_EACH(i) vst1_u16(p + 4 * i, vshrn_n_u32(vreinterpretq_u32_s32(a.v[i]), 16));
}
TL_INLINE void store_high(uint16_t* p, I a, int n) {
    if (n >= 16) return store_high(p, a);
    uint16_t part[16];
    store_high(part, a);
    for (int i = 0; i < n; ++i) p[i] = part[i];
}
TL_INLINE F load_f16(const uint16_t* p) {
    F r;
    TL_EACH(i) r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
    return r;
}

// Denormals as zero of the same sign. The processor's own mode cannot be used: it looks at a result before it is
// rounded, where the specification looks at one that is rounded to 24 bits.
TL_INLINE float32x4_t flush(float32x4_t x) {
    uint32x4_t b = vreinterpretq_u32_f32(x);
    uint32x4_t normal = vtstq_u32(b, vdupq_n_u32(0x7f800000u));
    return vreinterpretq_f32_u32(vandq_u32(b, vorrq_u32(normal, vdupq_n_u32(0x80000000u))));
}
// Results of the smallest normal size, which may have been rounded up from just below (spec.fma_flushed).
TL_NOINLINE float32x4_t flush_edge(float32x4_t result, float32x4_t a, float32x4_t b, float32x4_t c) {
    float r[4], x[4], y[4], z[4];
    vst1q_f32(r, result);
    vst1q_f32(x, a);
    vst1q_f32(y, b);
    vst1q_f32(z, c);
    TL_EACH(i) {
        double sign = __builtin_copysign(1.0, static_cast<double>(r[i]));
        bool below = sign * (static_cast<double>(x[i]) * static_cast<double>(y[i])) <
                     (0x1p-126 - 0x1p-151) - sign * static_cast<double>(z[i]);
        if (__builtin_fabsf(r[i]) == 0x1p-126f && below) r[i] = __builtin_copysignf(0.0f, r[i]);
    }
    return vld1q_f32(r);
}
TL_INLINE float32x4_t fma_flushed(float32x4_t a, float32x4_t b, float32x4_t c) {
    float32x4_t r = vfmaq_f32(c, a, b);
    uint32x4_t edge = vceqq_f32(vabsq_f32(r), vdupq_n_f32(0x1p-126f));
    if (vmaxvq_u32(edge)) r = flush_edge(r, a, b, c);
    return flush(r);
}
TL_INLINE F dot_bf16(F acc, I a, I b) {
    const int32x4_t upper = vdupq_n_s32(static_cast<int32_t>(0xffff0000u));
    TL_EACH(i) {
        float32x4_t x = flush(vreinterpretq_f32_s32(vandq_s32(a.v[i], upper)));
        float32x4_t y = flush(vreinterpretq_f32_s32(vandq_s32(b.v[i], upper)));
        float32x4_t odd = fma_flushed(x, y, flush(acc.v[i]));
        x = flush(vreinterpretq_f32_s32(vshlq_n_s32(a.v[i], 16)));
        y = flush(vreinterpretq_f32_s32(vshlq_n_s32(b.v[i], 16)));
        acc.v[i] = fma_flushed(x, y, odd);
    }
    return acc;
}
TL_INLINE void store_bf16_flushed(uint16_t* p, F a) {
    I r;
    TL_EACH(i) {
        uint32x4_t b = vreinterpretq_u32_f32(flush(a.v[i]));
        uint32x4_t odd = vandq_u32(vshrq_n_u32(b, 16), vdupq_n_u32(1));
        r.v[i] = vreinterpretq_s32_u32(vaddq_u32(b, vaddq_u32(odd, vdupq_n_u32(0x7fff))));
    }
    store_high(p, r);
}
// A product of bytes fits 16 bits: at least -32640, at most 32385.
TL_INLINE I dot_u8s8(I acc, I a, I b) {
    TL_EACH(i) {
        uint8x16_t x = vreinterpretq_u8_s32(a.v[i]);
        int8x16_t y = vreinterpretq_s8_s32(b.v[i]);
        int16x8_t front = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(x))), vmovl_s8(vget_low_s8(y)));
        int16x8_t back = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(x))), vmovl_s8(vget_high_s8(y)));
        acc.v[i] = vaddq_s32(acc.v[i], vpaddq_s32(vpaddlq_s16(front), vpaddlq_s16(back)));
    }
    return acc;
}

TL_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

struct FlushDenormals { FlushDenormals() {} ~FlushDenormals() {} };

TL_INLINE float sum(F a) {
    float32x4_t q = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    float32x2_t h = vadd_f32(vget_low_f32(q), vget_high_f32(q));
    return vget_lane_f32(h, 0) + vget_lane_f32(h, 1);
}
TL_INLINE float max_lane(F a) {
    float lanes[16];
    store(lanes, a);
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; ++i) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
    return lanes[0];
}
TL_INLINE int32_t isum(I a) { return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3]))); }

#undef TL_EACH

}  // namespace TL_ISA
}  // namespace tokenloom
