// Norms over heads, rotation and the KV pool (kernels/spec.py: rms_norm, rope, stored_*).
#include TL_SIMD

#include "kv_store.hpp"
#include "vector_math.hpp"

namespace tokenloom {
namespace TL_ISA {

namespace {

TL_INLINE F load_some(const float* p, int n) { return n >= kLanes ? load(p) : load(p, n); }
TL_INLINE void store_some(float* p, F x, int n) {
    if (n >= kLanes) store(p, x);
    else store(p, x, n);
}

TL_INLINE void norm_head(float* head, const float* weight, int dim, float epsilon) {
    F squares = zero();
    for (int d = 0; d < dim; d += kLanes) {
        F x = load_some(head + d, dim - d);
        squares = add(squares, mul(x, x));
    }
    float mean = sum(squares) / (float)dim + epsilon;
    F scale = set(1.0f / __builtin_sqrtf(mean));
    for (int d = 0; d < dim; d += kLanes) {
        F x = mul(mul(load_some(head + d, dim - d), scale), load_some(weight + d, dim - d));
        store_some(head + d, x, dim - d);
    }
}

// From `head` to `out`, which may be the same.
TL_INLINE void rotate_head(const float* head, float* out, const float* cos, const float* sin, int rotary_dim, int dim) {
    const int half = rotary_dim / 2;
    for (int d = 0; d < half; d += kLanes) {
        int n = half - d;
        F x = load_some(head + d, n), y = load_some(head + half + d, n);
        F c = load_some(cos + d, n), s = load_some(sin + d, n);
        store_some(out + d, sub(mul(x, c), mul(y, s)), n);
        store_some(out + half + d, add(mul(y, c), mul(x, s)), n);
    }
    for (int d = rotary_dim; d < dim; d += kLanes) store_some(out + d, load_some(head + d, dim - d), dim - d);
}

// NaN is 0; nothing is larger than `largest`.
TL_INLINE F tame(F x, F largest) {
    x = select(eq(x, x), x, zero());
    return max(min(x, largest), sub(zero(), largest));
}

// One head rounded, to `stored` [dim]; the scale of int8.
TL_INLINE float round_int8(const float* head, int dim, int8_t* stored) {
    const F largest = set(3.402823466e38f);
    F high = zero();
    for (int d = 0; d < dim; d += kLanes) {
        F x = tame(load_some(head + d, dim - d), largest);
        high = max(high, max(x, sub(zero(), x)));
    }
    float scale = max_lane(high) / 127.0f;
    if (scale == 0.0f) scale = 1.0f;
    const F divisor = set(scale);
    for (int d = 0; d < dim; d += kLanes) {
        F x = round_even(div(tame(load_some(head + d, dim - d), largest), divisor));
        store_i8(stored + d, to_int(max(min(x, set(127.0f)), set(-127.0f))));
    }
    return scale;
}

TL_INLINE void round_bf16(const float* head, int dim, uint16_t* stored) {
    const F largest = set(3.3895313892515355e38f);  // 0x7f7f
    for (int d = 0; d < dim; d += kLanes) store_bf16(stored + d, tame(load_some(head + d, dim - d), largest));
}

TL_INLINE uint8_t* page_at(const KVTarget& target, int64_t slot) {
    int64_t page = slot / kPageSize;
    return target.bytes + page / target.pages_per_frame * target.frame_bytes +
           page % target.pages_per_frame * target.page_bytes + target.layer_offset;
}

template <class T>
TL_INLINE void scatter(uint8_t* to, const T* from, int n, int64_t stride) {
    for (int i = 0; i < n; ++i) *(T*)(to + i * stride) = from[i];
}

// Neighbouring keys may be other threads' rows: nothing but the key's own bytes is written.
TL_INLINE void store_key(const KVTarget& target, int64_t slot, int head, const float* k, const float* v) {
    const int dim = target.head_dim, offset = (int)(slot % kPageSize);
    const int64_t row = target.dim16;
    uint8_t* keys = page_at(target, slot) + head * target.head_bytes;
    uint8_t* values = keys + target.k_bytes;
    alignas(64) float held[kMaxHeadDim + kLanes];
    if (target.format == KVFormat::f32) {
        const F largest = set(3.402823466e38f);
        for (int d = 0; d < dim; d += kLanes) store(held + d, tame(load_some(k + d, dim - d), largest));
        scatter<float>(keys + offset * 4, held, dim, 64);
        float* to = (float*)values + offset * row;
        for (int d = 0; d < dim; d += kLanes) store_some(to + d, tame(load_some(v + d, dim - d), largest), dim - d);
    } else if (target.format == KVFormat::bf16) {
        uint16_t* stored = (uint16_t*)held;
        round_bf16(k, dim, stored);
        scatter<uint32_t>(keys + offset * 4, (const uint32_t*)stored, dim / 2, 64);
        round_bf16(v, dim, stored);
        scatter<uint16_t>(values + offset / 2 * row * 4 + offset % 2 * 2, stored, dim, 4);
    } else {
        int8_t* stored = (int8_t*)held;
        float* scales = (float*)(values + target.v_bytes);
        scales[offset] = round_int8(k, dim, stored);
        scatter<uint16_t>(keys + offset * 2, (const uint16_t*)stored, dim / 2, 32);
        scales[kPageSize + offset] = round_int8(v, dim, stored);
        scatter<int8_t>(values + offset / 2 * row * 2 + offset % 2, stored, dim, 2);
    }
}

// A key lies in as many cache lines as it has steps of the depth, and by the time a sequence stores its next
// one a whole model has gone through the caches: these lines are asked for some rows ahead.
constexpr int64_t kRowsAhead = 3;

TL_INLINE void fetch_slot(const KVTarget& target, int64_t slot) {
    if (slot < 0) return;
    const int64_t item = target.format == KVFormat::f32 ? 4 : target.format == KVFormat::bf16 ? 2 : 1;
    const int64_t offset = slot % kPageSize, width = target.dim16 * item;
    const uint8_t* keys = page_at(target, slot);
    for (int h = 0; h < target.num_kv_heads; ++h, keys += target.head_bytes) {
        for (int64_t at = 0; at < target.k_bytes; at += 64) prefetch(keys + at);
        const uint8_t* values = keys + target.k_bytes + (item == 4 ? offset * width : offset / 2 * width * 2);
        for (int64_t at = 0; at < width * (item == 4 ? 1 : 2); at += 64) prefetch(values + at);
    }
}

void store_rows(const RopeStoreCall& call, int64_t begin, int64_t end) {
    const KVTarget& target = call.target;
    for (int64_t row = begin; row < end && row < begin + kRowsAhead; ++row) fetch_slot(target, call.slots[row]);
    const int dim = target.head_dim, half = call.rotary_dim / 2;
    for (int64_t row = begin; row < end; ++row) {
        float* source = call.source + row * call.source_stride;
        float* out = call.out + row * call.out_stride;
        const float* cos = call.cos + (int64_t)call.positions[row] * half;
        const float* sin = call.sin + (int64_t)call.positions[row] * half;
        if (call.whole_q) norm_head(source, call.q_norm, call.num_heads * dim, call.epsilon);
        for (int h = 0; h < call.num_heads; ++h) {
            float* head = source + h * dim;
            if (call.q_norm && !call.whole_q) norm_head(head, call.q_norm, dim, call.epsilon);
            rotate_head(head, out + h * dim, cos, sin, call.rotary_dim, dim);
        }
        if (row + kRowsAhead < end) fetch_slot(target, call.slots[row + kRowsAhead]);
        if (call.slots[row] < 0) continue;
        float* k = source + (int64_t)call.num_heads * dim;
        const float* v = k + (int64_t)target.num_kv_heads * dim;
        if (call.whole_k) norm_head(k, call.k_norm, target.num_kv_heads * dim, call.epsilon);
        for (int h = 0; h < target.num_kv_heads; ++h, k += dim, v += dim) {
            if (call.k_norm && !call.whole_k) norm_head(k, call.k_norm, dim, call.epsilon);
            rotate_head(k, k, cos, sin, call.rotary_dim, dim);
            store_key(target, call.slots[row], h, k, v);
        }
    }
}

void read_slot(const KVTarget& target, int64_t slot, float* k, float* v) {
    const int dim = target.head_dim, offset = (int)(slot % kPageSize);
    const int64_t row = target.dim16;
    for (int h = 0; h < target.num_kv_heads; ++h) {
        const uint8_t* keys = page_at(target, slot) + h * target.head_bytes;
        const uint8_t* values = keys + target.k_bytes;
        const float* scales = (const float*)(values + target.v_bytes);
        for (int d = 0; d < dim; ++d) {
            int64_t at_k = target.format == KVFormat::f32 ? d * 16 + offset : d / 2 * 32 + offset * 2 + d % 2;
            int64_t at_v = offset / 2 * row * 2 + d * 2 + offset % 2;
            if (target.format == KVFormat::f32) at_v = offset * row + d;
            float x, y;
            if (target.format == KVFormat::f32) {
                x = ((const float*)keys)[at_k];
                y = ((const float*)values)[at_v];
            } else if (target.format == KVFormat::bf16) {
                uint32_t a = (uint32_t)((const uint16_t*)keys)[at_k] << 16;
                uint32_t b = (uint32_t)((const uint16_t*)values)[at_v] << 16;
                __builtin_memcpy(&x, &a, 4);
                __builtin_memcpy(&y, &b, 4);
            } else {
                x = (float)((const int8_t*)keys)[at_k] * scales[offset];
                y = (float)((const int8_t*)values)[at_v] * scales[kPageSize + offset];
            }
            k[h * dim + d] = x;
            v[h * dim + d] = y;
        }
    }
}

}  // namespace

extern const KVStoreKernels kv_store_kernels;
const KVStoreKernels kv_store_kernels = {&store_rows, &read_slot};

}  // namespace TL_ISA
}  // namespace tokenloom
