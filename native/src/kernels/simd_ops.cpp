// See simd_ops.hpp.
#include TL_SIMD

#include <cstring>

#include "kernels.hpp"
#include "simd_ops.hpp"
#include "vector_math.hpp"

namespace tokenloom {
namespace TL_ISA {

using Words = const int32_t*;

TL_INLINE F floats(Words p) { return as_float(iload(p)); }
TL_INLINE void put(int32_t* out, F x) { istore(out, as_int(x)); }
TL_INLINE void put(int32_t* out, I x) { istore(out, x); }
TL_INLINE void put(int32_t* out, M x) { out[0] = static_cast<int32_t>(bits(x)); }
TL_INLINE void put(int32_t* out, float x) { memcpy(out, &x, 4); }
TL_INLINE void put(int32_t* out, int32_t x) { out[0] = x; }
TL_INLINE M mask_of(Words p) { return mask(static_cast<uint32_t>(p[0]) & 0xffffu); }
// How many lanes a partial operation takes.
TL_INLINE int lanes_of(Words p) { return p[0] < 0 ? 0 : p[0] > kLanes ? kLanes : p[0]; }

// Names of the arguments: x, y and z as floats; i, j and k as integers.
#define TL_OP(NAME, RESULT)                                         \
    static void op_##NAME(Words a, Words b, Words c, int32_t* out) { \
        const F x = floats(a), y = floats(b), z = floats(c);        \
        const I i = iload(a), j = iload(b), k = iload(c);           \
        (void)x, (void)y, (void)z, (void)i, (void)j, (void)k;       \
        put(out, RESULT);                                           \
    }

TL_OP(zero, zero())
TL_OP(set, set(reinterpret_cast<const float*>(a)[0]))
TL_OP(load, load(reinterpret_cast<const float*>(a)))
TL_OP(load_part, load(reinterpret_cast<const float*>(a), lanes_of(b)))
TL_OP(first, first(lanes_of(a)))
TL_OP(add, add(x, y))
TL_OP(sub, sub(x, y))
TL_OP(mul, mul(x, y))
TL_OP(div, div(x, y))
TL_OP(fma, fma(x, y, z))
TL_OP(max, max(x, y))
TL_OP(min, min(x, y))
TL_OP(round_even, round_even(x))
TL_OP(scale_by_power, scale_by_power(x, y))
TL_OP(lt, lt(x, y))
TL_OP(gt, gt(x, y))
TL_OP(ge, ge(x, y))
TL_OP(eq, eq(x, y))
TL_OP(select, select(lt(x, y), x, z))
TL_OP(select_mask, select(mask_of(a), y, z))
TL_OP(mask, mask_of(a))
TL_OP(izero, izero())
TL_OP(iset, iset(a[0]))
TL_OP(iota, iota())
TL_OP(iadd, iadd(i, j))
TL_OP(isub, isub(i, j))
TL_OP(imul, imul(i, j))
TL_OP(iand, iand(i, j))
TL_OP(ior, ior(i, j))
TL_OP(ixor, ixor(i, j))
TL_OP(shl_1, shl<1>(i))
TL_OP(shl_16, shl<16>(i))
TL_OP(shl_23, shl<23>(i))
TL_OP(shr_1, shr<1>(i))
TL_OP(shr_8, shr<8>(i))
TL_OP(shr_16, shr<16>(i))
TL_OP(sar_1, sar<1>(i))
TL_OP(sar_24, sar<24>(i))
TL_OP(igt, igt(i, j))
TL_OP(to_float, to_float(i))
TL_OP(to_int, to_int(x))
TL_OP(load_u8, load_u8(reinterpret_cast<const uint8_t*>(a)))
TL_OP(load_i8, load_i8(reinterpret_cast<const int8_t*>(a)))
TL_OP(load_u16, load_u16(reinterpret_cast<const uint16_t*>(a)))
TL_OP(load_bf16, load_bf16(reinterpret_cast<const uint16_t*>(a)))
TL_OP(load_bf16_part, load_bf16(reinterpret_cast<const uint16_t*>(a), lanes_of(b)))
TL_OP(load_f16, load_f16(reinterpret_cast<const uint16_t*>(a)))
TL_OP(dot_u8s8, dot_u8s8(i, j, k))
TL_OP(sum, sum(x))
TL_OP(max_lane, max_lane(x))
TL_OP(isum, isum(i))
TL_OP(exp, exp(x))
TL_OP(tanh, tanh(x))
TL_OP(gelu_erf, gelu_erf(x))
TL_OP(silu_mul, silu_mul(x, y))
TL_OP(round_bf16, round_bf16(x))

static void op_store(Words a, Words, Words, int32_t* out) { store(reinterpret_cast<float*>(out), floats(a)); }
static void op_store_part(Words a, Words b, Words, int32_t* out) {
    store(reinterpret_cast<float*>(out), floats(a), lanes_of(b));
}
static void op_store_i8(Words a, Words, Words, int32_t* out) { store_i8(reinterpret_cast<int8_t*>(out), iload(a)); }
static void op_store_high(Words a, Words, Words, int32_t* out) {
    store_high(reinterpret_cast<uint16_t*>(out), iload(a));
}
static void op_store_high_part(Words a, Words b, Words, int32_t* out) {
    store_high(reinterpret_cast<uint16_t*>(out), iload(a), lanes_of(b));
}
static void op_store_bf16(Words a, Words, Words, int32_t* out) {
    store_bf16(reinterpret_cast<uint16_t*>(out), floats(a));
}
static void op_store_bf16_flushed(Words a, Words, Words, int32_t* out) {
    store_bf16_flushed(reinterpret_cast<uint16_t*>(out), floats(a));
}
static void op_mul_wide(Words a, Words b, Words, int32_t* out) {
    Wide product = mul_wide(iload(a), static_cast<uint32_t>(b[0]));
    put(out, product.low);
    put(out + kLanes, product.high);
}
static void op_transpose4(Words a, Words b, Words c, int32_t* out) {
    I rows[4] = {iload(a), iload(b), iload(c), iota()};
    transpose4(rows[0], rows[1], rows[2], rows[3]);
    for (int row = 0; row < 4; ++row) put(out + row * kLanes, rows[row]);
}
TL_NOINLINE void flushed_dot(Words a, Words b, Words c, int32_t* out) {
    put(out, dot_bf16(floats(a), iload(b), iload(c)));
}
static void op_dot_bf16(Words a, Words b, Words c, int32_t* out) {
    FlushDenormals guard;
    flushed_dot(a, b, c, out);
}

#define TL_ROW(NAME) {#NAME, &op_##NAME}
static const SimdOp kOps[] = {
    TL_ROW(zero), TL_ROW(set), TL_ROW(load), TL_ROW(load_part), TL_ROW(first), TL_ROW(add), TL_ROW(sub), TL_ROW(mul),
    TL_ROW(div), TL_ROW(fma), TL_ROW(max), TL_ROW(min), TL_ROW(round_even), TL_ROW(lt), TL_ROW(gt), TL_ROW(ge),
    TL_ROW(eq), TL_ROW(select), TL_ROW(select_mask), TL_ROW(mask), TL_ROW(izero), TL_ROW(iset), TL_ROW(iota),
    TL_ROW(iadd), TL_ROW(isub), TL_ROW(imul), TL_ROW(iand), TL_ROW(ior), TL_ROW(ixor), TL_ROW(shl_1), TL_ROW(shl_16),
    TL_ROW(shl_23), TL_ROW(shr_1), TL_ROW(shr_8), TL_ROW(shr_16), TL_ROW(sar_1), TL_ROW(sar_24), TL_ROW(igt),
    TL_ROW(to_float), TL_ROW(to_int), TL_ROW(load_u8), TL_ROW(load_i8), TL_ROW(load_bf16), TL_ROW(load_bf16_part),
    TL_ROW(load_f16), TL_ROW(dot_u8s8), TL_ROW(sum), TL_ROW(max_lane), TL_ROW(isum), TL_ROW(exp), TL_ROW(tanh),
    TL_ROW(silu_mul), TL_ROW(round_bf16), TL_ROW(store), TL_ROW(store_part), TL_ROW(store_i8), TL_ROW(store_high),
    TL_ROW(store_high_part), TL_ROW(store_bf16), TL_ROW(mul_wide), TL_ROW(transpose4), TL_ROW(dot_bf16),
    TL_ROW(scale_by_power), TL_ROW(gelu_erf), TL_ROW(load_u16), TL_ROW(store_bf16_flushed)};

extern const SimdKernels simd_kernels;
const SimdKernels simd_kernels = {kOps, static_cast<int64_t>(sizeof kOps / sizeof kOps[0])};

}  // namespace TL_ISA
}  // namespace tokenloom
