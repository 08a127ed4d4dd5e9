// What stands between the linear layers of a decoder block. In torch each is several passes over memory and, for a
// single token, several calls that cost more than their numbers.
//
//     rms_norm   y = w * r(x / sqrt(mean(x^2) + eps))                                       arXiv 1910.07467 eq. 4
//     rotate     y_i = r(x_i cos_i) - r(x_(i+d/2) sin_i),  y_(i+d/2) = r(x_(i+d/2) cos_(i+d/2)) + r(x_i sin_(i+d/2))
//     swiglu     y = r(g / (1 + exp(-g))) * u                                               arXiv 2002.05202 eq. 6
//     add        y = a + b
//
// r rounds to the format of the tensors, as the same formula does in torch, an operation at a time: rotate gives
// torch's bits, and so does add; the others differ by the order of a sum and the last bit of exp.
#pragma once

#include <cstdint>

#include "isa.h"
#include "numbers.h"

namespace minillm {

// x, y (M, D) · weight (D)
void rms_norm(const void* x, const void* weight, void* y, Dtype dtype, int64_t M, int64_t D, float eps, Isa isa,
              int threads);

// Heads (rows, heads, E) at x + row * row_stride + head * head_stride, in numbers; cos, sin (tables, d), row r reading
// table r % tables; the first d of each head turn, the rest is copied. y (rows, heads, E) without gaps.
struct Rotation {
    const void* x;
    const void* cos;
    const void* sin;
    void* y;
    Dtype dtype;
    int64_t rows, heads, E, d, tables, row_stride, head_stride;
};

void rotate(const Rotation& rotation, Isa isa, int threads);

// gate, up, y (count); y may be gate
void swiglu(const void* gate, const void* up, void* y, Dtype dtype, int64_t count, Isa isa, int threads);

// a, b, y (count), on this thread
void add(const void* a, const void* b, void* y, Dtype dtype, int64_t count, Isa isa);

struct BlockKernels {
    void (*rms_norm_row)(const void* x, const void* weight, void* y, Dtype dtype, int64_t D, float eps);
    void (*rotate_head)(const void* x, const void* cos, const void* sin, void* y, Dtype dtype, int64_t E, int64_t d);
    void (*swiglu)(const void* gate, const void* up, void* y, Dtype dtype, int64_t count);
    void (*add)(const void* a, const void* b, void* y, Dtype dtype, int64_t count);
};

const BlockKernels& block_ref();
#if defined(__x86_64__)
const BlockKernels& block_avx512();
#endif

}  // namespace minillm
