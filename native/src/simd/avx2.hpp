// 16 lanes in two registers: AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define TL_INLINE static inline __attribute__((always_inline))
#define TL_NOINLINE static __attribute__((noinline))

namespace tokenloom {
namespace TL_ISA {

struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct M { __m256 a, b; };

constexpr int kMaxTileRows = 3;

TL_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
TL_INLINE F set(float x) { __m256 v = _mm256_set1_ps(x); return {v, v}; }
TL_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TL_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
TL_INLINE M first(int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)),
            _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane))};
}
TL_INLINE F load(const float* p, int n) {
    M m = first(n);
    return {_mm256_maskload_ps(p, _mm256_castps_si256(m.a)), _mm256_maskload_ps(p + 8, _mm256_castps_si256(m.b))};
}
TL_INLINE void store(float* p, F x, int n) {
    M m = first(n);
    _mm256_maskstore_ps(p, _mm256_castps_si256(m.a), x.a);
    _mm256_maskstore_ps(p + 8, _mm256_castps_si256(m.b), x.b);
}
TL_INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
TL_INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
TL_INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
TL_INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
TL_INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
TL_INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
TL_INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
TL_INLINE F round_even(F x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
TL_INLINE F scale_by_power(F x, F n) {
    const __m256i one = _mm256_set1_epi32(127);
    __m256i a = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.a), one), 23);
    __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.b), one), 23);
    return {_mm256_mul_ps(x.a, _mm256_castsi256_ps(a)), _mm256_mul_ps(x.b, _mm256_castsi256_ps(b))};
}
TL_INLINE M lt(F x, F y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)}; }
TL_INLINE M gt(F x, F y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)}; }
TL_INLINE M ge(F x, F y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ)}; }
TL_INLINE M eq(F x, F y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ)}; }
TL_INLINE F select(M m, F yes, F no) { return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)}; }
TL_INLINE uint32_t bits(M m) {
    return static_cast<uint32_t>(_mm256_movemask_ps(m.a)) | static_cast<uint32_t>(_mm256_movemask_ps(m.b)) << 8;
}
TL_INLINE M mask(uint32_t b) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i low = _mm256_set1_epi32(static_cast<int>(b & 0xff)), high = _mm256_set1_epi32(static_cast<int>(b >> 8 & 0xff));
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(low, bit), bit)),
            _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(high, bit), bit))};
}

TL_INLINE I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
TL_INLINE I iset(int32_t x) { __m256i v = _mm256_set1_epi32(x); return {v, v}; }
TL_INLINE I iload(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
TL_INLINE void istore(void* p, I x) { _mm256_storeu_si256((__m256i*)p, x.a); _mm256_storeu_si256((__m256i*)p + 1, x.b); }
TL_INLINE I iota() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)}; }
TL_INLINE I iadd(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
TL_INLINE I isub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
TL_INLINE I imul(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
TL_INLINE I iand(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
TL_INLINE I ior(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
TL_INLINE I ixor(I x, I y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
template <int N> TL_INLINE I shl(I x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
template <int N> TL_INLINE I shr(I x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
template <int N> TL_INLINE I sar(I x) { return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)}; }
TL_INLINE M igt(I x, I y) {
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(x.a, y.a)), _mm256_castsi256_ps(_mm256_cmpgt_epi32(x.b, y.b))};
}
TL_INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
TL_INLINE I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
TL_INLINE I as_int(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
TL_INLINE F as_float(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

struct Wide { I low, high; };
TL_INLINE void mul_half(__m256i a, __m256i factor, __m256i& low, __m256i& high) {
    __m256i even = _mm256_mul_epu32(a, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
TL_INLINE Wide mul_wide(I x, uint32_t y) {
    Wide r;
    mul_half(x.a, _mm256_set1_epi64x(y), r.low.a, r.high.a);
    mul_half(x.b, _mm256_set1_epi64x(y), r.low.b, r.high.b);
    return r;
}
TL_INLINE void transpose_half(__m256i& a, __m256i& b, __m256i& c, __m256i& d) {
    __m256i ab = _mm256_unpacklo_epi32(a, b), ab2 = _mm256_unpackhi_epi32(a, b);
    __m256i cd = _mm256_unpacklo_epi32(c, d), cd2 = _mm256_unpackhi_epi32(c, d);
    a = _mm256_unpacklo_epi64(ab, cd);
    b = _mm256_unpackhi_epi64(ab, cd);
    c = _mm256_unpacklo_epi64(ab2, cd2);
    d = _mm256_unpackhi_epi64(ab2, cd2);
}
TL_INLINE void transpose4(I& x, I& y, I& z, I& w) {
    transpose_half(x.a, y.a, z.a, w.a);
    transpose_half(x.b, y.b, z.b, w.b);
}

TL_INLINE I load_u8(const uint8_t* p) {
    __m128i v = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
}
TL_INLINE I load_i8(const int8_t* p) {
    __m128i v = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))};
}
TL_INLINE I load_u16(const uint16_t* p) {
    __m128i low = _mm_loadu_si128((const __m128i*)p), high = _mm_loadu_si128((const __m128i*)p + 1);
    return {_mm256_cvtepu16_epi32(low), _mm256_cvtepu16_epi32(high)};
}
TL_INLINE void store_i8(int8_t* p, I x) {
    int32_t wide[16];
    istore(wide, x);
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(static_cast<uint8_t>(wide[i]));
}

TL_INLINE F load_bf16(const uint16_t* p) {
    __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + 1));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
}
TL_INLINE F load_bf16(const uint16_t* p, int n) {
    uint16_t part[16] = {0};
    for (int i = 0; i < 16; ++i) if (i < n) part[i] = p[i];
    return load_bf16(part);
}
TL_INLINE void store_high(uint16_t* p, I x) {
    __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(x.a, 16), _mm256_srli_epi32(x.b, 16));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
TL_INLINE void store_high(uint16_t* p, I x, int n) {
    uint16_t part[16];
    store_high(part, x);
    for (int i = 0; i < 16; ++i) if (i < n) p[i] = part[i];
}
TL_INLINE void store_bf16_flushed(uint16_t* p, F x) {
    const __m256i one = _mm256_set1_epi32(1), half = _mm256_set1_epi32(0x7fff), size = _mm256_set1_epi32(0x7fffffff);
    const __m256i sign = _mm256_set1_epi32(INT32_MIN), denormal = _mm256_set1_epi32(0x007fffff);
    __m256i a = _mm256_castps_si256(x.a), b = _mm256_castps_si256(x.b);
    a = _mm256_and_si256(a, _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_and_si256(a, size), denormal), sign));
    b = _mm256_and_si256(b, _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_and_si256(b, size), denormal), sign));
    a = _mm256_add_epi32(a, _mm256_add_epi32(half, _mm256_and_si256(_mm256_srli_epi32(a, 16), one)));
    b = _mm256_add_epi32(b, _mm256_add_epi32(half, _mm256_and_si256(_mm256_srli_epi32(b, 16), one)));
    store_high(p, {a, b});
}
TL_INLINE F load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}

TL_INLINE __m256 dot_half(__m256 acc, __m256i x, __m256i y) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    acc = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(x, upper)), _mm256_castsi256_ps(_mm256_and_si256(y, upper)), acc);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(y, 16)), acc);
}
// Under FlushDenormals.
TL_INLINE F dot_bf16(F acc, I x, I y) { return {dot_half(acc.a, x.a, y.a), dot_half(acc.b, x.b, y.b)}; }

// vpmaddubsw would saturate, so bytes are widened to 16 bits first: even and odd ones apart.
TL_INLINE __m256i dot_bytes(__m256i acc, __m256i x, __m256i y) {
    const __m256i low = _mm256_set1_epi16(0xff);
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(x, low), _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(y, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
TL_INLINE I dot_u8s8(I acc, I x, I y) { return {dot_bytes(acc.a, x.a, y.a), dot_bytes(acc.b, x.b, y.b)}; }

TL_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

struct FlushDenormals {
    unsigned saved;
    FlushDenormals() : saved(_mm_getcsr()) { _mm_setcsr(saved | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved); }
};

TL_INLINE float sum(F x) {
    __m256 h = _mm256_add_ps(x.a, x.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
TL_INLINE float max_lane(F x) {
    __m256 h = _mm256_max_ps(x.a, x.b);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
TL_INLINE int32_t isum(I x) {
    int32_t wide[16], total = 0;
    istore(wide, x);
    for (int i = 0; i < 16; ++i) total += wide[i];
    return total;
}

}  // namespace TL_ISA
}  // namespace tokenloom
