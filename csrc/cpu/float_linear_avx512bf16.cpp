// The same for bf16 by vdpbf16ps: 32 products an instruction, x as it lies. Sums are fp32, rounded to nearest;
// subnormals count as zero.

#if defined(__x86_64__)

#include "float_linear.h"
#include "vectors_avx512.h"

#define MINILLM_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,f16c,fma")))

namespace minillm {
namespace {

MINILLM_BF16 inline __m512bh load32(const uint16_t* x, int64_t count) {
    const __mmask32 mask = count >= 32 ? ~0u : (1u << count) - 1;
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, x));
}

MINILLM_BF16 inline __m512bh load_full32(const uint16_t* x) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(x));
}

template <int M, int S>
MINILLM_BF16 void dot_rows(const uint16_t* x, int64_t stride, const uint16_t* w, int64_t K, float* sums) {
    __m512 total[M][S];
    MINILLM_UNROLL
    for (int m = 0; m < M; ++m) {
        MINILLM_UNROLL
        for (int s = 0; s < S; ++s) total[m][s] = _mm512_setzero_ps();
    }
    int64_t k = 0;
    for (; k + 32 * S <= K; k += 32 * S) {
        MINILLM_UNROLL
        for (int s = 0; s < S; ++s) {
            const __m512bh weights = load_full32(w + k + 32 * s);
            MINILLM_UNROLL
            for (int m = 0; m < M; ++m)
                total[m][s] = _mm512_dpbf16_ps(total[m][s], weights, load_full32(x + m * stride + k + 32 * s));
        }
    }
    for (; k < K; k += 32) {
        const __m512bh weights = load32(w + k, K - k);
        MINILLM_UNROLL
        for (int m = 0; m < M; ++m)
            total[m][0] = _mm512_dpbf16_ps(total[m][0], weights, load32(x + m * stride + k, K - k));
    }
    MINILLM_UNROLL
    for (int m = 0; m < M; ++m) {
        MINILLM_UNROLL
        for (int s = 1; s < S; ++s) total[m][0] = _mm512_add_ps(total[m][0], total[m][s]);
        sums[m] = _mm512_reduce_add_ps(total[m][0]);
    }
}

void dot(const void* x, int64_t stride, int64_t M, const void* w, Dtype, int64_t K, float* sums) {
    const uint16_t *rows = static_cast<const uint16_t*>(x), *weights = static_cast<const uint16_t*>(w);
    switch (M) {
        case 1:
            dot_rows<1, 4>(rows, stride, weights, K, sums);
            break;
        case 2:
            dot_rows<2, 4>(rows, stride, weights, K, sums);
            break;
        case 3:
            dot_rows<3, 4>(rows, stride, weights, K, sums);
            break;
        case 4:
            dot_rows<4, 4>(rows, stride, weights, K, sums);
            break;
        default:  // five rows and more together are slower: w comes from the nearest cache the second time
            dot_rows<4, 4>(rows, stride, weights, K, sums);
            dot(rows + 4 * stride, stride, M - 4, w, Dtype::bf16, K, sums + 4);
    }
}

}  // namespace

FloatDot float_dot_avx512bf16() { return dot; }

}  // namespace minillm

#endif
