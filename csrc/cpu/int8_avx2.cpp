// int8 kernels for AVX2: int8 widened to int16, pairs of products summed into int32 by vpmaddwd, which cannot overflow.

#if defined(__x86_64__)

#include <algorithm>
#include <limits>

#include "int8_linear.h"
#include "vectors_avx2.h"

namespace minillm {
namespace {

MINILLM_AVX2 float absmax(const void* x, Dtype dtype, int64_t K, float threshold, uint8_t* is_outlier) {
    const __m256 limit = _mm256_set1_ps(threshold), sign = _mm256_set1_ps(-0.0f);
    __m256 largest = _mm256_setzero_ps(), nans = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 8 <= K; k += 8) {
        const __m256 size = _mm256_andnot_ps(sign, load8(x, dtype, k));
        const __m256 outside = _mm256_cmp_ps(size, limit, _CMP_GE_OQ);
        nans = _mm256_or_ps(nans, _mm256_cmp_ps(size, size, _CMP_UNORD_Q));
        largest = _mm256_max_ps(largest, _mm256_andnot_ps(outside, size));
        const int bits = _mm256_movemask_ps(outside);
        for (int i = 0; bits && i < 8; ++i)
            if (bits >> i & 1) is_outlier[k + i] = 1;
    }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, largest);
    float most = *std::max_element(lanes, lanes + 8);
    const float rest = int8_ref().absmax(offset(x, dtype, k), dtype, K - k, threshold, is_outlier + k);
    if (_mm256_movemask_ps(nans) || rest != rest) return std::numeric_limits<float>::quiet_NaN();
    return std::max(most, rest);
}

MINILLM_AVX2 void quantise(const void* x, Dtype dtype, int64_t K, float scale, int8_t* q) {
    const __m256 inverse = _mm256_set1_ps(scale > 0 ? 1.0f / scale * 127.0f : 0.0f);
    const __m256 most = _mm256_set1_ps(127.0f), least = _mm256_set1_ps(-127.0f);
    int64_t k = 0;
    for (; k + 8 <= K; k += 8) {
        const __m256 value = _mm256_mul_ps(load8(x, dtype, k), inverse);
        alignas(32) int32_t rounded[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(rounded),
                           _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(value, most), least)));  // ties to even
        for (int i = 0; i < 8; ++i) q[k + i] = static_cast<int8_t>(rounded[i]);
    }
    int8_ref().quantise(offset(x, dtype, k), dtype, K - k, scale, q + k);
}

MINILLM_AVX2 void dequantise(const int8_t* w, float scale, int64_t K, void* out, Dtype dtype) {
    const __m256 factor = _mm256_set1_ps(scale * (1.0f / 127));
    int64_t k = 0;
    for (; k + 8 <= K; k += 8) {
        const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w + k)));
        store8(out, dtype, k, _mm256_mul_ps(_mm256_cvtepi32_ps(wide), factor));
    }
    int8_ref().dequantise(w + k, scale, K - k, offset(out, dtype, k), dtype);
}

MINILLM_AVX2 inline __m256i widened(const int8_t* x) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

MINILLM_AVX2 inline int32_t sum_of_lanes(__m256i x) {
    const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    const __m128i quarter = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0xb1)));
}

template <int M>
MINILLM_AVX2 void dot_rows(const int8_t* q, int64_t stride, const int8_t* w, int64_t n, int64_t K, int32_t* sums) {
    for (int64_t j = 0; j < n; ++j) {
        const int8_t* row = w + j * K;
        __m256i total[M];
        for (int m = 0; m < M; ++m) total[m] = _mm256_setzero_si256();
        int64_t k = 0;
        for (; k + 16 <= K; k += 16) {
            const __m256i weights = widened(row + k);
            for (int m = 0; m < M; ++m)
                total[m] = _mm256_add_epi32(total[m], _mm256_madd_epi16(weights, widened(q + m * stride + k)));
        }
        for (int m = 0; m < M; ++m) {
            int32_t sum = sum_of_lanes(total[m]);
            for (int64_t i = k; i < K; ++i) sum += row[i] * q[m * stride + i];
            sums[m * max_panel + j] = sum;
        }
    }
}

void dot(const int8_t* q, int64_t stride, int64_t M, const int8_t* w, int64_t n, int64_t K, int32_t* sums) {
    int64_t m = 0;
    for (; m + 4 <= M; m += 4) dot_rows<4>(q + m * stride, stride, w, n, K, sums + m * max_panel);
    for (; m < M; ++m) dot_rows<1>(q + m * stride, stride, w, n, K, sums + m * max_panel);
}

}  // namespace

const Int8Kernels& int8_avx2() {
    static const Int8Kernels kernels = {absmax, quantise, dequantise, dot, int8_ref().finish, nullptr, nullptr, 0};
    return kernels;
}

}  // namespace minillm

#endif
