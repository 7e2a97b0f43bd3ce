// Norms and embedding rows; see rows.hpp.
#include TL_SIMD

#include "rows.hpp"
#include "vector_math.hpp"

namespace tokenloom {
namespace TL_ISA {

static void rms_norm(const RMSNormCall& call, int64_t begin, int64_t end) {
    const int64_t width = call.width;
    for (int64_t row = begin; row < end; ++row) {
        float* x = call.source + row * call.source_stride;
        const float* more = call.add ? call.add + row * call.add_stride : nullptr;
        F squares = zero();
        for (int64_t i = 0; i < width; i += kLanes) {
            int n = width - i < kLanes ? static_cast<int>(width - i) : kLanes;
            F v = load(x + i, n);
            if (more) {
                v = add(v, load(more + i, n));
                store(x + i, v, n);
            }
            squares = add(squares, mul(v, v));
        }
        float mean = sum(squares) / static_cast<float>(width) + call.epsilon;
        F scale = set(1.0f / __builtin_sqrtf(mean));
        for (int64_t i = 0; i < width; i += kLanes) {
            int n = width - i < kLanes ? static_cast<int>(width - i) : kLanes;
            F y = mul(mul(load(x + i, n), scale), load(call.weight + i, n));
            if (call.out_dtype == Dtype::bf16) {
                store_bf16(static_cast<uint16_t*>(call.out) + row * call.out_stride + i, y, n);
            } else {
                store(static_cast<float*>(call.out) + row * call.out_stride + i, y, n);
            }
        }
    }
}

static void layer_norm(const LayerNormCall& call, int64_t begin, int64_t end) {
    const int64_t width = call.width;
    const float size = static_cast<float>(width);
    for (int64_t row = begin; row < end; ++row) {
        const float* x = call.source + row * call.source_stride;
        F total = zero();
        for (int64_t i = 0; i < width; i += kLanes) {
            int n = width - i < kLanes ? static_cast<int>(width - i) : kLanes;
            total = add(total, load(x + i, n));
        }
        const F mean = set(sum(total) / size);
        F squares = zero();
        for (int64_t i = 0; i < width; i += kLanes) {
            int n = width - i < kLanes ? static_cast<int>(width - i) : kLanes;
            F d = sub(load(x + i, n), mean);
            if (n < kLanes) d = select(first(n), d, zero());
            squares = add(squares, mul(d, d));
        }
        const F scale = set(1.0f / __builtin_sqrtf(sum(squares) / size + call.epsilon));
        for (int64_t i = 0; i < width; i += kLanes) {
            int n = width - i < kLanes ? static_cast<int>(width - i) : kLanes;
            F y = mul(mul(sub(load(x + i, n), mean), scale), load(call.weight + i, n));
            if (call.bias) y = add(y, load(call.bias + i, n));
            if (call.out_dtype == Dtype::bf16) {
                store_bf16(static_cast<uint16_t*>(call.out) + row * call.out_stride + i, y, n);
            } else {
                store(static_cast<float*>(call.out) + row * call.out_stride + i, y, n);
            }
        }
    }
}

// spec.route. A choice that compares like this is always one of the experts, also among NaNs.
static void route(const RouteCall& call, int64_t begin, int64_t end) {
    const int64_t experts = call.experts, top_k = call.top_k;
    for (int64_t row = begin; row < end; ++row) {
        const float* x = call.source + row * call.source_stride;
        float* weights = call.out + row * call.out_stride;
        float* numbers = weights + top_k;
        bool taken[kMaxExperts] = {false};
        alignas(64) float e[kMaxChosen] = {0};
        for (int64_t j = 0; j < top_k; ++j) {
            int64_t best = -1;
            for (int64_t i = 0; i < experts; ++i)
                if (!taken[i] && (best < 0 || x[i] > x[best])) best = i;
            taken[best] = true;
            numbers[j] = static_cast<float>(best);
            e[j] = x[best];
        }
        const F top = set(e[0]);
        for (int64_t i = 0; i < top_k; i += kLanes) store(e + i, exp(sub(load(e + i), top)));
        float total = 0;
        if (call.normalized) {
            for (int64_t j = 0; j < top_k; ++j) total += e[j];
        } else {
            F all = zero();
            for (int64_t i = 0; i < experts; i += kLanes) {
                int n = experts - i < kLanes ? static_cast<int>(experts - i) : kLanes;
                F part = exp(sub(load(x + i, n), top));
                if (n < kLanes) part = select(first(n), part, zero());
                all = add(all, part);
            }
            total = sum(all);
        }
        for (int64_t j = 0; j < top_k; ++j) weights[j] = e[j] / total;
    }
}

static void widen(const void* source, TableDtype dtype, int64_t width, bool rounded, float* out) {
    const uint16_t* narrow_source = static_cast<const uint16_t*>(source);
    for (int64_t i = 0; i < width; i += kLanes) {
        int n = width - i < kLanes ? static_cast<int>(width - i) : kLanes;
        F v;
        if (dtype == TableDtype::f32) {
            v = load(static_cast<const float*>(source) + i, n);
        } else if (dtype == TableDtype::bf16) {
            v = load_bf16(narrow_source + i, n);
        } else {
            uint16_t part[kLanes] = {0};
            for (int j = 0; j < n; ++j) part[j] = narrow_source[i + j];
            v = load_f16(part);
        }
        if (rounded) v = as_float(iand(round_bf16(v), iset(static_cast<int32_t>(0xffff0000u))));
        store(out + i, v, n);
    }
}

static void narrow(const float* source, int64_t width, Dtype dtype, void* out) {
    for (int64_t i = 0; i < width; i += kLanes) {
        int n = width - i < kLanes ? static_cast<int>(width - i) : kLanes;
        F v = load(source + i, n);
        if (dtype == Dtype::bf16) {
            store_bf16(static_cast<uint16_t*>(out) + i, v, n);
        } else {
            store(static_cast<float*>(out) + i, v, n);
        }
    }
}

extern const RowKernels row_kernels;
const RowKernels row_kernels = {&rms_norm, &layer_norm, &route, &widen, &narrow};

}  // namespace TL_ISA
}  // namespace tokenloom
