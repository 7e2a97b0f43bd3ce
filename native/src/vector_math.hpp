// Functions on vectors of 16 lanes, as kernels/spec.py defines them. Included once per instruction set.
#pragma once

namespace tokenloom {
namespace TL_ISA {

constexpr float kExpLow = -87.33654f, kExpHigh = 88.72283f;

// e^x / 2^n for x from kExpLow to kExpHigh (spec.exp): n = round(x log2 e), r = x - n ln 2 in two fused steps,
// Cephes' polynomial in fused steps.
TL_INLINE F exp_fraction(F x, F& n) {
    n = round_even(mul(x, set(1.44269504088896341f)));
    F r = fma(n, set(-0.693359375f), x);
    r = fma(n, set(2.12194440e-4f), r);
    F y = set(1.9875691500e-4f);
    y = fma(y, r, set(1.3981999507e-3f));
    y = fma(y, r, set(8.3334519073e-3f));
    y = fma(y, r, set(4.1665795894e-2f));
    y = fma(y, r, set(1.6666665459e-1f));
    y = fma(y, r, set(5.0000001201e-1f));
    y = fma(y, mul(r, r), r);
    return add(y, set(1.0f));
}

// e^x: two exact factors of 2^n. 0 below kExpLow, infinity above kExpHigh; NaN stays.
TL_INLINE F exp(F x) {
    const F low = set(kExpLow), high = set(kExpHigh);
    F n, y = exp_fraction(min(max(x, low), high), n);
    I whole = to_int(n);
    I half = sar<1>(whole);
    I rest = isub(whole, half);
    y = mul(y, as_float(shl<23>(iadd(half, iset(127)))));
    y = mul(y, as_float(shl<23>(iadd(rest, iset(127)))));
    y = select(lt(x, low), zero(), y);
    y = select(gt(x, high), set(__builtin_inff()), y);
    return select(eq(x, x), y, x);
}

// Bits of lanes rounded to bfloat16 in their upper halves (spec.bf16): nearest even by integer arithmetic.
TL_INLINE I round_bf16(F x) {
    I b = as_int(x);
    I odd = iand(shr<16>(b), iset(1));
    return iadd(b, iadd(odd, iset(0x7fff)));
}

TL_INLINE void store_bf16(uint16_t* p, F x) { store_high(p, round_bf16(x)); }
TL_INLINE void store_bf16(uint16_t* p, F x, int n) { store_high(p, round_bf16(x), n); }

// (gate / (1 + exp(-gate))) * up (spec.silu_mul).
TL_INLINE F silu_mul(F gate, F up) {
    F e = exp(sub(zero(), gate));
    return mul(div(gate, add(set(1.0f), e)), up);
}

// Hyperbolic tangent (spec.tanh): a polynomial below 0.625, 1 - 2 / (exp(2|x|) + 1) from there; NaN stays.
TL_INLINE F tanh(F x) {
    const I sign = iset(static_cast<int32_t>(0x80000000u));
    F size = as_float(iand(as_int(x), iset(0x7fffffff)));
    F z = mul(x, x);
    F y = set(-5.70498872745e-3f);
    y = fma(y, z, set(2.06390887954e-2f));
    y = fma(y, z, set(-5.37397155531e-2f));
    y = fma(y, z, set(1.33314422036e-1f));
    y = fma(y, z, set(-3.33332819422e-1f));
    F near = fma(mul(y, z), x, x);
    F far = sub(set(1.0f), div(set(2.0f), add(exp(add(size, size)), set(1.0f))));
    far = as_float(ior(as_int(far), iand(as_int(x), sign)));
    return select(lt(size, set(0.625f)), near, far);
}

// 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) (spec.gelu).
TL_INLINE F gelu(F x) {
    F cube = mul(mul(x, x), x);
    F inner = mul(add(mul(cube, set(0.044715f)), x), set(0.7978845608028654f));
    return mul(mul(add(tanh(inner), set(1.0f)), x), set(0.5f));
}

// x times the normal distribution function of x (spec.gelu_erf): e^(-x^2 / 2) * t * polynomial(t) of
// t = 1 / (1 + |x| / 4) is the function of -|x|, and 1 less it that of |x|.
TL_INLINE F gelu_erf(F x) {
    F size = as_float(iand(as_int(x), iset(0x7fffffff)));
    F t = div(set(1.0f), fma(size, set(0.25f), set(1.0f)));
    F y = set(2.62956712e-2f);
    y = fma(y, t, set(-1.55637473e-1f));
    y = fma(y, t, set(3.02078277e-1f));
    y = fma(y, t, set(-2.12750539e-1f));
    y = fma(y, t, set(2.06698358e-1f));
    y = fma(y, t, set(3.07582691e-2f));
    y = fma(y, t, set(1.04321986e-1f));
    y = fma(y, t, set(9.84327719e-2f));
    y = fma(y, t, set(9.9802658e-2f));
    F tail = mul(exp(mul(mul(x, x), set(-0.5f))), mul(y, t));
    return mul(x, select(lt(x, zero()), tail, sub(set(1.0f), tail)));
}

}  // namespace TL_ISA
}  // namespace tokenloom
