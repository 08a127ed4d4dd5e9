// y = x W^T + b for few rows of x: the weights are streamed once, at the memory's speed, sums in fp32, rounded once.
//
// x (M, K) · w (N, K) · bias (N) or null · y (M, N), all of one format. For many rows torch's matrix products are used.
#pragma once

#include <cstdint>

#include "isa.h"
#include "numbers.h"

namespace minillm {

constexpr int64_t max_float_rows = 8;

struct FloatLinear {
    const void* x;
    const void* w;
    const void* bias;
    void* y;
    Dtype dtype;
    int64_t M, N, K;
};

void float_linear(const FloatLinear& linear, Isa isa, int threads);

// sums[m] = sum_k x[m, k] w[k] of one row of w; x (M, stride) fp32, stride a multiple of 16, zero beyond K; for
// avx512bf16 x is bf16 and has no gaps.
using FloatDot = void (*)(const void* x, int64_t stride, int64_t M, const void* w, Dtype dtype, int64_t K, float* sums);

FloatDot float_dot_ref();
#if defined(__x86_64__)
FloatDot float_dot_avx512();
FloatDot float_dot_avx512bf16();  // bf16 only
#endif

}  // namespace minillm
