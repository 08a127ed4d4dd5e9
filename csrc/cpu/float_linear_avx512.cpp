// Dot products of one row of weights with up to eight rows of x, sixteen numbers at a time.

#if defined(__x86_64__)

#include "float_linear.h"
#include "vectors_avx512.h"

namespace minillm {
namespace {

// Four sums a row of x for one row, fewer for more: enough in flight to hide four cycles of latency twice.
template <int M, int S>
MINILLM_AVX512 void dot_rows(const float* x, int64_t stride, const void* w, Dtype dtype, int64_t K, float* sums) {
    __m512 total[M][S];
    MINILLM_UNROLL
    for (int m = 0; m < M; ++m) {
        MINILLM_UNROLL
        for (int s = 0; s < S; ++s) total[m][s] = _mm512_setzero_ps();
    }
    int64_t k = 0;
    for (; k + 16 * S <= K; k += 16 * S) {
        MINILLM_UNROLL
        for (int s = 0; s < S; ++s) {
            const __m512 weights = load_full16(w, dtype, k + 16 * s);
            MINILLM_UNROLL
            for (int m = 0; m < M; ++m)
                total[m][s] = _mm512_fmadd_ps(weights, _mm512_loadu_ps(x + m * stride + k + 16 * s), total[m][s]);
        }
    }
    for (; k < K; k += 16) {
        const __m512 weights = load16(w, dtype, k, K - k);
        MINILLM_UNROLL
        for (int m = 0; m < M; ++m)
            total[m][0] = _mm512_fmadd_ps(weights, _mm512_loadu_ps(x + m * stride + k), total[m][0]);
    }
    MINILLM_UNROLL
    for (int m = 0; m < M; ++m) {
        MINILLM_UNROLL
        for (int s = 1; s < S; ++s) total[m][0] = _mm512_add_ps(total[m][0], total[m][s]);
        sums[m] = _mm512_reduce_add_ps(total[m][0]);
    }
}

void dot(const void* rows, int64_t stride, int64_t M, const void* w, Dtype dtype, int64_t K, float* sums) {
    const float* x = static_cast<const float*>(rows);
    switch (M) {
        case 1:
            dot_rows<1, 4>(x, stride, w, dtype, K, sums);
            break;
        case 2:
            dot_rows<2, 4>(x, stride, w, dtype, K, sums);
            break;
        case 3:
            dot_rows<3, 4>(x, stride, w, dtype, K, sums);
            break;
        case 4:
            dot_rows<4, 2>(x, stride, w, dtype, K, sums);
            break;
        case 5:
            dot_rows<5, 2>(x, stride, w, dtype, K, sums);
            break;
        case 6:
            dot_rows<6, 2>(x, stride, w, dtype, K, sums);
            break;
        case 7:
            dot_rows<7, 2>(x, stride, w, dtype, K, sums);
            break;
        default:
            dot_rows<8, 2>(x, stride, w, dtype, K, sums);
    }
}

}  // namespace

FloatDot float_dot_avx512() { return dot; }

}  // namespace minillm

#endif
