// 16 lanes in one register: AVX-512 F/BW/VL/DQ with BF16 and VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define TL_INLINE static inline __attribute__((always_inline))
#define TL_NOINLINE static __attribute__((noinline))

namespace tokenloom {
namespace TL_ISA {

struct F { __m512 v; };
struct I { __m512i v; };
struct M { __mmask16 v; };

// The widest register tile of a product: rows by vectors of columns.
constexpr int kMaxTileRows = 12;

// --- floats ---------------------------------------------------------------------------------------------
TL_INLINE F zero() { return {_mm512_setzero_ps()}; }
TL_INLINE F set(float x) { return {_mm512_set1_ps(x)}; }
TL_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
TL_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
TL_INLINE M first(int n) { return {static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u)}; }
// Lanes from n on are zero; nothing past p[n-1] is read.
TL_INLINE F load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n).v, p)}; }
TL_INLINE void store(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first(n).v, a.v); }
TL_INLINE F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
TL_INLINE F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
TL_INLINE F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
TL_INLINE F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
TL_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c, one rounding
TL_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }                // a > b ? a : b
TL_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }                // a < b ? a : b
TL_INLINE F round_even(F a) { return {_mm512_roundscale_ps(a.v, 8)}; }
TL_INLINE F scale_by_power(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n, n whole in [-126, 127]
TL_INLINE M lt(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
TL_INLINE M gt(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
TL_INLINE M ge(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
TL_INLINE M eq(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
TL_INLINE F select(M m, F yes, F no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }
TL_INLINE uint32_t bits(M m) { return m.v; }
TL_INLINE M mask(uint32_t b) { return {static_cast<__mmask16>(b)}; }

// --- integers -------------------------------------------------------------------------------------------
TL_INLINE I izero() { return {_mm512_setzero_si512()}; }
TL_INLINE I iset(int32_t x) { return {_mm512_set1_epi32(x)}; }
TL_INLINE I iload(const void* p) { return {_mm512_loadu_si512(p)}; }
TL_INLINE void istore(void* p, I a) { _mm512_storeu_si512(p, a.v); }
TL_INLINE I iota() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
TL_INLINE I iadd(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
TL_INLINE I isub(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
TL_INLINE I imul(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
TL_INLINE I iand(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
TL_INLINE I ior(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
TL_INLINE I ixor(I a, I b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int N> TL_INLINE I shl(I a) { return {_mm512_slli_epi32(a.v, N)}; }
template <int N> TL_INLINE I shr(I a) { return {_mm512_srli_epi32(a.v, N)}; }
template <int N> TL_INLINE I sar(I a) { return {_mm512_srai_epi32(a.v, N)}; }
TL_INLINE M igt(I a, I b) { return {_mm512_cmpgt_epi32_mask(a.v, b.v)}; }
TL_INLINE F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }      // nearest even
TL_INLINE I to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }        // nearest even
TL_INLINE I as_int(F a) { return {_mm512_castps_si512(a.v)}; }
TL_INLINE F as_float(I a) { return {_mm512_castsi512_ps(a.v)}; }

// The halves of unsigned 64-bit products.
struct Wide { I low, high; };
TL_INLINE Wide mul_wide(I a, uint32_t b) {
    __m512i factor = _mm512_set1_epi64(b);
    __m512i even = _mm512_mul_epu32(a.v, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
    return {{_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, (_MM_PERM_ENUM)0xa0)},
            {_mm512_mask_shuffle_epi32(odd, 0x5555, even, (_MM_PERM_ENUM)0xf5)}};
}
// In each group of four lanes, the 4 x 4 matrix of a, b, c and d transposed.
TL_INLINE void transpose4(I& a, I& b, I& c, I& d) {
    __m512i ab = _mm512_unpacklo_epi32(a.v, b.v), ab2 = _mm512_unpackhi_epi32(a.v, b.v);
    __m512i cd = _mm512_unpacklo_epi32(c.v, d.v), cd2 = _mm512_unpackhi_epi32(c.v, d.v);
    a = {_mm512_unpacklo_epi64(ab, cd)};
    b = {_mm512_unpackhi_epi64(ab, cd)};
    c = {_mm512_unpacklo_epi64(ab2, cd2)};
    d = {_mm512_unpackhi_epi64(ab2, cd2)};
}

// 16 bytes as integers.
TL_INLINE I load_u8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
TL_INLINE I load_i8(const int8_t* p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
TL_INLINE I load_u16(const uint16_t* p) { return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p))}; }
// The low bytes of 16 integers.
TL_INLINE void store_i8(int8_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }

// --- narrow floats --------------------------------------------------------------------------------------
TL_INLINE F load_bf16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
TL_INLINE F load_bf16(const uint16_t* p, int n) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n).v, p)), 16))};
}
// Upper halves of lanes, as they are.
TL_INLINE void store_high(uint16_t* p, I a) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(a.v, 16)));
}
TL_INLINE void store_high(uint16_t* p, I a, int n) {
    _mm256_mask_storeu_epi16(p, first(n).v, _mm512_cvtepi32_epi16(_mm512_srli_epi32(a.v, 16)));
}
TL_INLINE F load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
// Rounded to bf16, denormals as zero.
TL_INLINE void store_bf16_flushed(uint16_t* p, F a) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v));
}

// --- products -------------------------------------------------------------------------------------------
// acc + a.odd * b.odd, then + a.even * b.even: pairs of bf16 in 32-bit lanes, each step fused, denormals zero.
TL_INLINE F dot_bf16(F acc, I a, I b) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)}; }
// acc + the sum of four products of unsigned bytes of a and signed bytes of b; nothing saturates.
TL_INLINE I dot_u8s8(I acc, I a, I b) { return {_mm512_dpbusd_epi32(acc.v, a.v, b.v)}; }

TL_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

// Denormals count as zero while it lives, where dot_bf16 is not an instruction that does so by itself.
// Calls into TL_NOINLINE functions only: the compiler may move arithmetic across it.
struct FlushDenormals { FlushDenormals() {} ~FlushDenormals() {} };

// --- reductions: fixed folds ------------------------------------------------------------------------------
// Lanes i and i + 8, then i and i + 4, + 2, + 1.
TL_INLINE float sum(F a) {
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
TL_INLINE float max_lane(F a) { return _mm512_reduce_max_ps(a.v); }
TL_INLINE int32_t isum(I a) { return _mm512_reduce_add_epi32(a.v); }

}  // namespace TL_ISA
}  // namespace tokenloom
