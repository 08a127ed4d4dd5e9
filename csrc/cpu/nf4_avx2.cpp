// NF4 kernels for AVX2: eight codes at a time, looked up in the two halves of the table.

#if defined(__x86_64__)

#include "nf4.h"
#include "vectors_avx2.h"

namespace minillm {
namespace {

// vpermps looks up with three bits; the fourth, moved to the sign, chooses between the halves.
MINILLM_AVX2 inline __m256 look_up(__m256 lower, __m256 upper, __m256i index) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, index), _mm256_permutevar8x32_ps(upper, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

MINILLM_AVX2 void dequantise(const uint8_t* packed, const float* code, float absmax, int64_t count, void* out,
                             Dtype dtype) {
    const __m256 lower = _mm256_loadu_ps(code), upper = _mm256_loadu_ps(code + 8), scale = _mm256_set1_ps(absmax);
    const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        int32_t eight;
        std::memcpy(&eight, packed + i / 2, 4);
        const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(eight), shifts);
        store8(out, dtype, i, _mm256_mul_ps(look_up(lower, upper, index), scale));
    }
    nf4_ref().dequantise(packed + i / 2, code, absmax, count - i, offset(out, dtype, i), dtype);
}

MINILLM_AVX2 inline float sum_of_lanes(__m256 x) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

MINILLM_AVX2 void multiply(const float* x, int64_t M, const float* w, int64_t K, float* y) {
    for (int64_t m = 0; m < M; ++m, x += K) {
        __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        int64_t k = 0;
        for (; k + 16 <= K; k += 16)
            for (int i = 0; i < 2; ++i)
                total[i] = _mm256_fmadd_ps(_mm256_loadu_ps(x + k + 8 * i), _mm256_loadu_ps(w + k + 8 * i), total[i]);
        float sum = sum_of_lanes(_mm256_add_ps(total[0], total[1]));
        for (; k < K; ++k) sum += x[k] * w[k];
        y[m] = sum;
    }
}

}  // namespace

const Nf4Kernels& nf4_avx2() {
    static const Nf4Kernels kernels = {nf4_ref().quantise, dequantise, nullptr, nf4_ref().widen,
                                       multiply,           nullptr,    nullptr, 0};
    return kernels;
}

}  // namespace minillm

#endif
