#include "float_linear.h"

#include <algorithm>

#include "parallel.h"

namespace minillm {
namespace {

void dot(const void* rows, int64_t stride, int64_t M, const void* w, Dtype dtype, int64_t K, float* sums) {
    const float* x = static_cast<const float*>(rows);
    for (int64_t m = 0; m < M; ++m) {
        double sum = 0;
        for (int64_t k = 0; k < K; ++k) sum += static_cast<double>(x[m * stride + k]) * load(w, dtype, k);
        sums[m] = static_cast<float>(sum);
    }
}

bool is_by_bf16(Isa isa, Dtype dtype) { return isa >= Isa::avx512bf16 && dtype == Dtype::bf16; }

FloatDot dot_of(Isa isa, Dtype dtype) {
#if defined(__x86_64__)
    if (is_by_bf16(isa, dtype)) return float_dot_avx512bf16();
    if (isa >= Isa::avx512vnni) return float_dot_avx512();
#endif
    (void)isa, (void)dtype;
    return float_dot_ref();
}

thread_local Scratch wide;

// x in fp32, each thread for itself: cheaper than waiting for another.
const float* widened(const FloatLinear& l, int64_t stride) {
    float* x = wide.get<float>(l.M * stride);
    for (int64_t m = 0; m < l.M; ++m) {
        for (int64_t k = 0; k < l.K; ++k) x[m * stride + k] = load(l.x, l.dtype, m * l.K + k);
        std::fill(x + m * stride + l.K, x + (m + 1) * stride, 0.0f);
    }
    return x;
}

}  // namespace

FloatDot float_dot_ref() { return dot; }

void float_linear(const FloatLinear& l, Isa isa, int threads) {
    const FloatDot kernel = dot_of(isa, l.dtype);
    const bool as_it_is = is_by_bf16(isa, l.dtype);
    const int64_t stride = as_it_is ? l.K : (l.K + 15) / 16 * 16;
    parallel(threads, [&](int thread, int threads) {
        const void* x = as_it_is ? l.x : widened(l, stride);
        const Range rows = share(l.N, 16, thread, threads);
        float sums[max_float_rows];
        for (int64_t n = rows.begin; n < rows.end; ++n) {
            kernel(x, stride, l.M, offset(l.w, l.dtype, n * l.K), l.dtype, l.K, sums);
            const float bias = l.bias ? load(l.bias, l.dtype, n) : 0.0f;
            for (int64_t m = 0; m < l.M; ++m) store(l.y, l.dtype, m * l.N + n, sums[m] + bias);
        }
    });
}

}  // namespace minillm
