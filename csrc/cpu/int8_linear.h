// LLM.int8() (arXiv 2208.07339): y = x W^T with 8-bit integers, outlier columns of x in floating point.
//
//     scale_x[m] = max |x[m, k]| over the k with |x[m, k]| < threshold
//     q[m, k]    = round(x[m, k] * 127 / scale_x[m]), ties to even; 0 in outlier columns
//     y[m, n]    = scale_x[m] * scale_w[n] / 127^2 * sum_k q[m, k] w[n, k]                    exact in int32
//                + scale_w[n] / 127 * sum_(outlier columns c) x[m, c] w[n, c]                 fp32
//                + bias[n]                                                                    rounded once
//
// An outlier column is one with |x[m, k]| >= threshold in any row m. x (M, K) in any float format; w (N, K) int8,
// row-major, the only copy there is; scale_w (N) = max |W[n, :]|. `minillm.ops.int8` has the same in torch.
//
// Facts that the variants rest on:
//   - a sum of K products of magnitude <= 127^2 fits int32 for K <= 133,144; ops/native.py refuses larger K
//   - vpdpbusd multiplies u8 by s8: w ^ 0x80 is w + 128 as u8, and sum (w + 128) q = sum w q + 128 sum q. Between,
//     int32 may wrap; it does not saturate (vpdpbusds would), so the difference is exact
//   - vpmaddubsw saturates at int16 (2 * 255 * 127 does not fit): AVX2 widens to int16 and uses vpmaddwd
//
// Reading order: this file, int8_ref.cpp (every function in its plainest form), int8_linear.cpp (who does what on which
// thread), int8_avx512vnni.cpp, int8_avx2.cpp.
#pragma once

#include <cstdint>

#include "isa.h"
#include "numbers.h"

namespace minillm {

struct Int8Input {
    const void* x;  // (M, K)
    Dtype dtype;    // of x, bias and y
    int64_t M, K;
    float threshold;  // infinity: no outliers
};

struct Int8Weight {
    const int8_t* w;     // (N, K)
    const float* scale;  // (N)
    const void* bias;    // (N) or null
    void* y;             // (M, N)
    int64_t N;
};

// Several linears of one x, which is then quantised once: q, k and v; gate and up.
void int8_linear(const Int8Input& input, const Int8Weight* weights, int count, Isa isa, int threads);

// The exact sums alone: x (M, K), w (N, K) int8 -> y (M, N) int32.
void int8_product(const int8_t* x, const int8_t* w, int32_t* y, int64_t M, int64_t N, int64_t K, Isa isa, int threads);

// q (M, K), scale (M), is_outlier (K) as above. With threshold infinity also what makes weights int8.
void int8_quantise(const Int8Input& input, int8_t* q, float* scale, uint8_t* is_outlier, Isa isa, int threads);

// w[n, k] * scale[n] / 127 for the N rows given -> out (N, K).
void int8_dequantise(const int8_t* w, const float* scale, void* out, Dtype dtype, int64_t N, int64_t K, Isa isa,
                     int threads);

// --- what a variant implements; q has rows of `stride` bytes, a multiple of 64, zero beyond K

constexpr int64_t max_rows = 8;    // rows of x that `dot` takes
constexpr int64_t max_panel = 64;  // columns of y that are computed together

// What is left of a block of sums: y[m, n0 + j] for m < M, j < n, from sums[m * max_panel + j].
struct Int8Block {
    const int32_t* sums;
    int64_t M, n;
    const float* scale_x;  // (M)
    const float* values;   // (M, outliers) x in outlier columns
    const float* columns;  // (outliers, max_panel) w in outlier columns
    int64_t outliers;
    const float* scale_w;  // (n)
    const void* bias;      // from n0 on, or null
    void* y;               // from n0 on
    int64_t N;             // row length of y
    Dtype dtype;
};

struct Int8Kernels {
    // scale of one row; is_outlier[k] is set to 1, never to 0. NaN in, NaN out.
    float (*absmax)(const void* x, Dtype dtype, int64_t K, float threshold, uint8_t* is_outlier);
    void (*quantise)(const void* x, Dtype dtype, int64_t K, float scale, int8_t* q);
    void (*dequantise)(const int8_t* w, float scale, int64_t K, void* out, Dtype dtype);
    // sums[m * max_panel + j] = sum_k q[m, k] w[j, k] for M <= max_rows, n <= max_panel: streams the weights once.
    void (*dot)(const int8_t* q, int64_t stride, int64_t M, const int8_t* w, int64_t n, int64_t K, int32_t* sums);
    void (*finish)(const Int8Block& block);
    // For many rows of x: n <= max_panel rows of w in the order that `tile` reads; null where a variant has none.
    void (*pack)(const int8_t* w, int64_t n, int64_t K, uint8_t* packed);
    // The same sums from a packed panel, for M <= tile_rows.
    void (*tile)(const int8_t* q, int64_t stride, int64_t M, const uint8_t* packed, int64_t K, int32_t* sums);
    int64_t tile_rows;
};

const Int8Kernels& int8_ref();
#if defined(__x86_64__)
const Int8Kernels& int8_avx2();
const Int8Kernels& int8_avx512vnni();
#endif

}  // namespace minillm
