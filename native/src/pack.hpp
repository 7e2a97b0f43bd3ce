// Weights cut into the panels of kernels.hpp. The rounding is that of quantization/round_to_nearest.py.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace tokenloom {

// How a checkpoint holds a weight: floats, or integers that somebody quantised.
enum class SourceType : int32_t { f32, bf16, f16, i8, i4 };

// Some rows of a weight where they lie (in a mapped file, say); a weight may be several such blocks stacked.
// Element (n, k) is `data[n * row_stride + k * k_stride]`, so a transposed block is a source too.
struct SourceRows {
    const void* data;     // i8: int8 in -127..127, i4: uint8 in 0..15
    SourceType type;
    int64_t rows;
    int64_t row_stride;   // in elements
    int64_t k_stride;
    const void* scales;   // i8: float [rows], i4: fp16 [rows, groups]
    const uint8_t* zeros; // i4: [rows, groups] in 0..16
};

// Depths beyond this could overflow the 32-bit sums of an i8 product.
constexpr int64_t kMaxDepthI8 = 65536;

// The shape of a packed weight, without data. `group` counts for i4 only: a multiple of 8. Throws
// std::invalid_argument for a shape that no panel fits.
PackedMatrix packed_shape(Format format, bool paired, int64_t n, int64_t k, int64_t group);

inline int64_t packed_bytes(const PackedMatrix& shape) { return shape.panels * shape.panel_bytes; }
// Sums per row that a quantised source needs, and the least distance of its rows in bytes.
int64_t quantized_groups(const PackedMatrix& shape);
int64_t quantized_stride(const PackedMatrix& shape);

// Throws std::invalid_argument unless the sources fit the shape (i8 into i8, i4 into i4, floats into any).
void check_sources(const PackedMatrix& shape, const std::vector<SourceRows>& sources);

// Fills panels [begin, end) of `data`, and for i8 their `scales` (32 per panel). Panels are independent of
// each other, so threads may share the work. Returns null, or what is wrong with a number of the sources (it does
// not throw: it runs on threads of the pool); the panels are no weight then:
//   i8, i4 from floats     a value is not finite (round_to_nearest.py refuses the same)
//   i4 from floats         a group is too wide for a scale in fp16
//   bf16                   a finite value rounds to infinity
//   i8, i4 from integers   a value or a zero point lies outside its range, or a scale is not finite
const char* pack_panels(const PackedMatrix& shape, const std::vector<SourceRows>& sources, uint8_t* data,
                        float* scales, int64_t begin, int64_t end);

// Row n of the weight in fp32: i8 q * scale, i4 (q - zero) * scale, rounded once.
void unpack_row(const PackedMatrix& weight, int64_t n, float* out);

}  // namespace tokenloom
