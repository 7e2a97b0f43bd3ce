// The KV pool of the native backend: frames of pages of 16 slots.
//
//   page = [layers][kv_heads] { K block, V block, scales }       (each block starts at a multiple of 64 bytes)
//   K  f32   [head_dim][16] float           V  f32   [16][dim16] float
//      bf16  [head_dim/2][16][2] uint16        bf16  [8][dim16][2] uint16: pairs of keys 2i, 2i+1
//      i8    [head_dim/2][16][2] int8          i8    [8][dim16][2] int8
//   scales (i8 only): float K [16], then V [16]
// dim16 is head_dim rounded up to 16; its tail is zero. A vector of 16 lanes over K is 16 keys, over V 16
// dimensions. Everything is zero at first and finite always: keys that a row does not see are multiplied by
// exact zeros.
#pragma once

#include <cstdint>

namespace tokenloom {

enum class KVFormat : int32_t { f32 = 0, bf16 = 1, i8 = 2 };

struct KVLayout {
    KVFormat format;
    int32_t num_layers, num_kv_heads, head_dim;
    int64_t dim16, k_bytes, v_bytes, scale_bytes;

    KVLayout(KVFormat format_, int32_t layers, int32_t heads, int32_t dim)
        : format(format_), num_layers(layers), num_kv_heads(heads), head_dim(dim), dim16((dim + 15) / 16 * 16) {
        int64_t item = format == KVFormat::f32 ? 4 : format == KVFormat::bf16 ? 2 : 1;
        k_bytes = aligned(item * dim * 16);
        v_bytes = aligned(item * dim16 * 16);
        scale_bytes = format == KVFormat::i8 ? 128 : 0;
    }
    int64_t head_bytes() const { return k_bytes + v_bytes + scale_bytes; }
    int64_t page_bytes() const { return head_bytes() * num_kv_heads * num_layers; }
    // From the start of a page.
    int64_t k_offset(int64_t layer, int64_t head) const { return (layer * num_kv_heads + head) * head_bytes(); }
    int64_t v_offset(int64_t layer, int64_t head) const { return k_offset(layer, head) + k_bytes; }
    int64_t scale_offset(int64_t layer, int64_t head) const { return v_offset(layer, head) + v_bytes; }

  private:
    static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
};

struct KVPool {
    KVLayout layout;
    uint8_t* bytes;
    int64_t num_frames, frame_bytes, pages_per_frame;

    int64_t num_pages() const { return num_frames * pages_per_frame; }
    uint8_t* page(int64_t id) const {
        return bytes + id / pages_per_frame * frame_bytes + id % pages_per_frame * layout.page_bytes();
    }
};

}  // namespace tokenloom
